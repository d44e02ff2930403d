"""What GPUs run of linear_cross_entropy, here on the CPU: their chunks, and the blockwise form."""

import pytest
import torch
from heads import DTYPES, eager, fused, inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from truth import assert_as_exact

import fastft.ops.linear_cross_entropy_blockwise as blockwise
import fastft.ops.linear_cross_entropy_chunked as chunked
from fastft.ops.linear_cross_entropy import Head, linear_cross_entropy

REDUCTIONS = ["mean", "sum", "none"]


class NoWaiting(TorchDispatchMode):
    """Fails where a GPU's host would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("nonzero", "_local_scalar_dense", "masked_select", "equal", "is_nonzero")
        assert func.overloadpacket.__name__ not in waits, func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The CUDA key's function in place of the operator, over more than one chunk."""
    monkeypatch.setattr(chunked, "_on_gpu", lambda x: True)
    monkeypatch.setattr(chunked, "_GPU_ROWS", 1)
    monkeypatch.setattr(chunked, "_GPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(chunked, "_linear_cross_entropy", chunked._for_cuda)
    return monkeypatch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("waiting", [0, 1 << 60])
def test_a_gpus_chunks_are_as_exact_as_eager(as_on_a_gpu, dtype, reduction, waiting):
    as_on_a_gpu.setattr(chunked, "_GPU_WORTH_WAITING", waiting)
    for rows, bias in ((300, True), (300, False), (5, False)):
        args = inputs(dtype, rows, 33, bias=bias)
        assert_as_exact(fused, eager, (*args, {"reduction": reduction}))
        args[3] = args[4] = None
        options = {"label_smoothing": 0.1, "softcap": 3.0, "reduction": reduction}
        assert_as_exact(fused, eager, (*args, options))


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_chunks_with_adapters_wider_than_the_head(as_on_a_gpu, lora_dtype):
    args = inputs(torch.bfloat16, 40, 90, lora_dtype=lora_dtype)
    assert_as_exact(fused, eager, (*args, {}))


def test_a_gpus_chunks_add_a_heads_gradient_up_in_float32(as_on_a_gpu):
    """Hundreds of chunks with gradients of one sign: a sum in bfloat16 would stand still."""
    rows = 128 * 600
    x, weight = torch.ones(rows, 4).bfloat16(), torch.zeros(8, 4).bfloat16().requires_grad_()
    linear_cross_entropy(x, Head(weight), torch.zeros(rows, dtype=torch.long)).backward()
    wanted = torch.full((8, 4), 1 / 8)
    wanted[0] = 1 / 8 - 1
    torch.testing.assert_close(weight.grad.float(), wanted, rtol=1e-2, atol=0)


def test_the_chunks_of_a_gpu():
    class Rows(torch.Tensor):
        is_cuda = True

    def rows(count, vocab, dtype=torch.bfloat16):
        x = torch.empty(count, 1, dtype=dtype, device="meta").as_subclass(Rows)
        return chunked._chunk_rows(x, vocab)

    assert rows(16384, 128_256) == 2048  # half a GB of logits
    assert rows(8192, 256_000) == 1024
    assert rows(8192, 256_000, torch.float32) == 1024  # a GB rather than slow products
    assert rows(2100, 128_256) == 1152  # equal, in whole tiles
    assert rows(100, 50_257) == 128 and rows(0, 50_257) == 1


def test_rows_of_logits_begin_at_16_bytes(as_on_a_gpu):
    x, weight, bias, *_ = inputs(torch.bfloat16, 7, 33)
    for each in (None, bias.detach()):
        logits = chunked._logits(x.detach(), weight.detach(), each)
        assert logits.stride() == (40, 1) and logits.shape == (7, 33)
        torch.testing.assert_close(logits, F.linear(x, weight, each).detach())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_small_products_do_not_make_the_host_wait(as_on_a_gpu, reduction):
    args = inputs(torch.float32, 40, 33)
    args[6][3] = 5
    head = Head(args[1])
    big = 40 * 24 * 33
    for worth in (big + 1, big):
        as_on_a_gpu.setattr(chunked, "_GPU_WORTH_WAITING", worth)
        as_on_a_gpu.setattr(chunked, "refuse_wrong_labels", lambda *_: None)
        # The public function reads the labels on the CPU before.
        arguments = [args[0].detach(), [head.weight.detach(), None, None, None], args[6], None]
        numbers, needs = [1.0, 0.0, 0.0, 1.0], [True, True, False, False, False]
        if worth == big:
            with NoWaiting(), pytest.raises(AssertionError, match="nonzero"):
                chunked._for_cuda(*arguments, None, -100, numbers, needs)
        else:
            with NoWaiting():
                chunked._for_cuda(*arguments, None, -100, numbers, needs)


def test_where_the_host_waits_it_refuses_wrong_labels(as_on_a_gpu):
    x, weight, *_, labels = inputs(torch.float32, 40, 33)
    labels[3] = 33
    as_on_a_gpu.setattr(chunked, "_GPU_WORTH_WAITING", 0)
    head, needs = [weight.detach(), None, None, None], [True] * 2 + [False] * 3
    with pytest.raises(ValueError, match="got 33 at position 3"):
        chunked._for_cuda(x.detach(), head, labels, None, None, -100, [1.0, 0.0, 0.0, 1.0], needs)


def test_traces_for_a_gpu_without_one():
    """Also the product with a sum wider than its operands, which the CPU does not have."""
    numbers, needs = [1.0, 0.0, 0.0, 1.0], [True, True, False, False, False]
    with FakeTensorMode():
        # Without gradients of its own: autograd's threads would look for the device.
        x = torch.empty(4096, 64, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(256_001, 64, dtype=torch.bfloat16, device="cuda")
        labels = torch.empty(4096, dtype=torch.long, device="cuda")
        head = [weight, None, None, None]
        losses, *grads = chunked._linear_cross_entropy(
            x, head, labels, None, None, -100, numbers, needs
        )
        others, lse = blockwise._blockwise(x, weight, labels, -100, [0.0, 1.0])
        grads[2:] = blockwise._blockwise_backward(
            losses, x, weight, labels, lse, -100, [0.0, 1.0], [True, True]
        )
        for t in (losses, others, lse):
            assert t.shape == (4096,) and t.dtype is torch.float32 and t.device.type == "cuda"
        for grad, t in zip(grads, (x, weight) * 2, strict=True):
            assert grad.shape == t.shape and grad.dtype is t.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_blockwise_is_as_exact_as_eager(monkeypatch, dtype, reduction):
    monkeypatch.setattr(blockwise, "_ROWS", 16)

    def form(x, weight, labels, options):
        return fused(x, weight, None, None, None, None, labels, {**options, "form": "blockwise"})

    def plain(x, weight, labels, options):
        return eager(x, weight, None, None, None, None, labels, options)

    for rows, vocab in [(1, 5), (40, 33), (50, 301)]:
        x, weight, *_, labels = inputs(dtype, rows, vocab)
        options = {"reduction": reduction, "logit_scale": 0.7}
        assert_as_exact(form, plain, (x, weight, labels, options))
        assert_as_exact(form, plain, (x, weight, labels, {**options, "softcap": 3.0}))
        assert_as_exact(form, plain, (x, weight.detach(), labels, options))
        assert_as_exact(form, plain, (x.detach(), weight, labels, options))


def test_blockwise_without_labels_and_without_rows():
    for rows in (0, 5):
        x, weight, *_ = inputs(torch.float32, rows, 20)
        labels = torch.full((rows,), -100)
        loss = linear_cross_entropy(x, Head(weight), labels, form="blockwise")
        grads = torch.autograd.grad(loss, (x, weight))
        assert loss == 0 and not any(g.any() for g in grads)


def test_blockwise_operators_and_compilation():
    x, weight, *_, labels = inputs(torch.float32, 20, 30)
    numbers = [5.0, 0.7]
    args = x.detach(), weight.detach(), labels
    opcheck(blockwise._blockwise.op, (*args, -100, numbers))
    _, lse = blockwise._blockwise(*args, -100, numbers)
    for needs in ([True, True], [True, False], [False, True]):
        backward = torch.randn(20), *args, lse, -100, numbers, needs
        opcheck(blockwise._blockwise_backward.op, backward)

    def form(x, weight, labels):
        return linear_cross_entropy(x, Head(weight), labels, form="blockwise", softcap=4.0)

    def plain(x, weight, labels):
        return eager(x, weight, None, None, None, None, labels, {"softcap": 4.0})

    assert_as_exact(torch.compile(form, fullgraph=True), plain, (x, weight, labels))
    wide = [t.double().requires_grad_() for t in args[:2]]
    assert torch.autograd.gradcheck(lambda *t: form(*t, labels), wide)


def test_blockwise_refuses_what_only_the_chunks_do():
    x, weight, bias, a, b, class_weight, labels = inputs(torch.float32, 4, 9, weighted=True)
    for name, head, options in (
        ("head.bias", Head(weight, bias), {}),
        ("head.lora", Head(weight, None, (a, b, 1.0)), {}),
        ("weight", Head(weight), {"weight": class_weight}),
        ("label_smoothing", Head(weight), {"label_smoothing": 0.1}),
    ):
        with pytest.raises(ValueError, match=f"form: expected 'chunked' with {name}"):
            linear_cross_entropy(x, head, labels, form="blockwise", **options)
    with pytest.raises(ValueError, match="form: expected 'chunked' or 'blockwise', got 'fast'"):
        linear_cross_entropy(x, Head(weight), labels, form="fast")
