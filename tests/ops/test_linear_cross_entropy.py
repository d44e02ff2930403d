"""linear_cross_entropy against eager and a float64 truth: gradients, memory, errors, tracing."""

from itertools import product

import pytest
import torch
from heads import DTYPES, LORA_SCALE, eager, fused, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from truth import assert_as_exact, beside_logits, leaves, run

import fastft.ops.linear_cross_entropy_chunked as module
from fastft.ops.linear_cross_entropy import Head, linear_cross_entropy
from fastft.ops.linear_cross_entropy_chunked import _labelled_only, _linear_cross_entropy


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    """Every test runs over more than one chunk."""
    monkeypatch.setattr(module, "_CHUNK", 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_as_exact_as_eager(isa, dtype, reduction):
    for rows, vocab in [(1, 5), (40, 33), (50, 301)]:
        args = inputs(dtype, rows, vocab)
        assert_as_exact(fused, eager, (*args, {"reduction": reduction}))
        args[3] = args[4] = None
        rest = {"label_smoothing": 0.1, "softcap": 3.0, "logit_scale": 0.7, "reduction": reduction}
        assert_as_exact(fused, eager, (*args, rest))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(5, 300),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([None, 5.0]),
    st.sampled_from(["mean", "sum", "none"]),
)
def test_any_combination(rows, vocab, dtype, weighted, smoothing, softcap, reduction):
    args = inputs(dtype, rows, vocab, weighted=weighted)
    options = {"label_smoothing": smoothing, "softcap": softcap, "reduction": reduction}
    assert_as_exact(beside_logits(fused), beside_logits(eager), (*args, options))


def test_large_products(monkeypatch):
    """Sizes at which the faster library for products is chosen, in chunks of the usual size."""
    monkeypatch.undo()
    args = inputs(torch.float32, 300, 30_000, hidden=64)
    assert module._chunk_rows(args[0], 30_000) < 300
    assert_as_exact(fused, eager, (*args, {}))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_asked_gets_a_gradient(reduction):
    everything = inputs(torch.float32, 30, 50)
    for asked in product([False, True], repeat=5):
        if any(asked):
            args = [
                t.detach().requires_grad_(wanted)
                for t, wanted in zip(everything[:5], asked, strict=True)
            ]
            assert_as_exact(fused, eager, (*args, *everything[5:], {"reduction": reduction}))


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_adapters_wider_than_the_head(lora_dtype, reduction):
    args = inputs(torch.bfloat16, 40, 90, lora_dtype=lora_dtype)
    assert_as_exact(fused, eager, (*args, {"reduction": reduction}))


def test_half_precision_head_adds_its_gradient_up_in_float32():
    """Hundreds of chunks with gradients of one sign: a sum in bfloat16 would stand still."""
    x = torch.ones(4096, 4).bfloat16()
    weight = torch.zeros(8, 4).bfloat16().requires_grad_()
    loss = linear_cross_entropy(x, Head(weight), torch.zeros(4096, dtype=torch.long))
    loss.backward()
    wanted = torch.full((8, 4), 1 / 8)
    wanted[0] = 1 / 8 - 1
    torch.testing.assert_close(weight.grad.float(), wanted, rtol=1e-2, atol=0)


def test_small_gradients_survive_float16_when_the_loss_is_scaled():
    """As torch.amp.GradScaler does it: the divisor must not push them below float16's range."""
    args = inputs(torch.float16, 64, 200, bias=False)
    many = args[6].repeat(64)
    x = args[0].detach().repeat(64, 1).requires_grad_()
    head = args[1].detach() * 1e-3
    (grad,) = torch.autograd.grad(linear_cross_entropy(x, Head(head), many) * 2.0**16, x)
    wide = x.detach().double().requires_grad_()
    truth = F.cross_entropy(F.linear(wide, head.double()), many) * 2.0**16
    (wanted,) = torch.autograd.grad(truth, wide)
    assert (grad.double() - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize("num_items", [3, 7.5, torch.tensor(11)])
def test_num_items_divides_the_sum(num_items):
    args = inputs(torch.float32, 30, 40, weighted=True)
    ours = run(fused, (*args, {"num_items": num_items}))
    truth = run(
        lambda *a: eager(*a, {"reduction": "sum"}) / float(num_items), leaves(args, torch.float64)
    )
    for got, wanted in zip(ours[0] + ours[1], truth[0] + truth[1], strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 7])
def test_without_labels_everything_is_zero(reduction, rows):
    args = inputs(torch.float32, rows, 20, weighted=True)
    args[6] = torch.full((rows,), -100)
    outs, grads = run(fused, (*args, {"reduction": reduction}))
    assert all((t == 0).all() for t in outs + grads) and len(grads) == 5
    assert [g.shape for g in grads] == [t.shape for t in args[:5]]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_gives_the_same_and_inputs_stay(reduction):
    args = inputs(torch.float32, 40, 50)
    kept = leaves(args)
    needing = args[:5]
    loss = fused(*args, {"reduction": reduction}).sum()
    first = torch.autograd.grad(loss, needing, retain_graph=True)
    bits = [g.clone() for g in first]
    second = torch.autograd.grad(loss * 2, needing, retain_graph=True)
    third = torch.autograd.grad(loss, needing)
    for a, b, c, d in zip(first, bits, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(b, d)
        torch.testing.assert_close(c, 2 * b)
    assert all(torch.equal(a, b) for a, b in zip(args[:5], kept[:5], strict=True))


class _Largest(TorchDispatchMode):
    """The most elements of any storage that came to be meanwhile."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.elements = {t.data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                size = t.untyped_storage().nbytes() // t.element_size()
                self.elements = max(self.elements, size)
        return out


def test_never_holds_the_logits():
    x, weight, *_, labels = inputs(torch.float32, 400, 500)
    x, head, numbers = x.detach(), [weight.detach(), None, None, None], [1.0, 0.0, 0.0, 1.0]
    needs = [True, False, False, False, False]
    for dlosses in (None, torch.randn(400)):
        with torch.no_grad(), _Largest(x, weight) as largest:
            _labelled_only(x, head, labels, None, dlosses, -100, numbers, needs)
        assert largest.elements == max(400 * 24, 16 * 500)


def test_rows_without_a_label_are_not_computed(monkeypatch):
    x, weight, *_, labels = inputs(torch.float32, 100, 50)
    seen = []
    real = module.gemm.matmul
    monkeypatch.setattr(
        module.gemm, "matmul", lambda a, *rest: seen.append(a.shape[0]) or real(a, *rest)
    )
    linear_cross_entropy(x, Head(weight.detach()), labels).backward()
    assert sum(seen) == 2 * int((labels >= 0).sum())
    assert (x.grad[labels < 0] == 0).all()


def test_no_product_for_gradients_nobody_needs(monkeypatch):
    x, weight, *_, labels = inputs(torch.float32, 100, 50)
    calls = []
    real = module.gemm.matmul
    monkeypatch.setattr(module.gemm, "matmul", lambda *args: calls.append(1) or real(*args))
    chunks = -(-int((labels >= 0).sum()) // 16)
    with torch.no_grad():
        linear_cross_entropy(x, Head(weight), labels)
    assert len(calls) == chunks
    linear_cross_entropy(x.detach(), Head(weight), labels)
    assert len(calls) == 2 * chunks
    linear_cross_entropy(x, Head(weight), labels)
    assert len(calls) == 4 * chunks


def test_strided_and_batched_inputs():
    args = inputs(torch.float32, 60, 40)
    args[6] = args[6].view(4, 15)
    base = torch.randn(4, 30, 48)
    for view in (base[:, ::2, :24], base[:, 15:, ::2], base.transpose(1, 2)[:, :15, :24]):
        args[0] = view.detach().requires_grad_()
        for reduction in ("mean", "none"):
            assert_as_exact(fused, eager, (*args, {"reduction": reduction}))
    args[1] = args[1].detach().t().contiguous().t().requires_grad_()
    assert_as_exact(fused, eager, (*args, {}))


def test_gradcheck_of_the_reference():
    args = inputs(torch.float64, 20, 6, hidden=4, weighted=True)
    for reduction in ("mean", "none"):
        rest = {"label_smoothing": 0.1, "softcap": 4.0, "logit_scale": 0.8, "reduction": reduction}
        assert torch.autograd.gradcheck(
            lambda *t: fused(*t, *args[5:], rest),  # noqa: B023
            args[:5],
        )


def test_same_bits_from_run_to_run():
    args = inputs(torch.float32, 64, 700)

    def bits():
        outs, grads = run(fused, (*args, {}))
        return outs + grads

    two, again = bits(), bits()
    assert all(torch.equal(a, b) for a, b in zip(two, again, strict=True))


def test_opcheck():
    x, weight, bias, a, b, class_weight, labels = inputs(torch.float32, 20, 30, weighted=True)
    tensors = [t.detach() for t in (x, weight, bias, a, b)]
    for head, needs in (
        ([tensors[1], None, None, None], [True] + [False] * 4),
        (tensors[1:], [True] * 5),
        (tensors[1:], [False] * 5),
    ):
        numbers = [0.5, 0.1, 5.0, 0.7]
        for dlosses in (None, torch.randn(20)):
            args = (tensors[0], head, labels, class_weight, dlosses, -100, numbers, needs)
            opcheck(_linear_cross_entropy.op, args)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(reduction):
    args = inputs(torch.float32, 30, 40, weighted=True)
    compiled = torch.compile(fused, fullgraph=True)
    options = {"label_smoothing": 0.1, "softcap": 5.0, "reduction": reduction}
    assert_as_exact(compiled, eager, (*args, options))
    args[6][3] = 40
    with pytest.raises((ValueError, RuntimeError), match="got 40 at position 3"):
        compiled(*args, options)


def test_autocast_casts_the_products():
    args = inputs(torch.float32, 30, 40)
    half = [t.detach().bfloat16().requires_grad_() for t in args[:5]]

    def loss_and_grads(x, weight, bias, a, b):
        loss = linear_cross_entropy(x, Head(weight, bias, (a, b, LORA_SCALE)), args[6])
        return loss, torch.autograd.grad(loss, (x, weight, bias, a, b))

    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = loss_and_grads(*args[:5])
    wanted, wanted_grads = loss_and_grads(*half)
    assert loss.dtype is torch.float32 and torch.equal(loss, wanted)
    for got, grad in zip(grads, wanted_grads, strict=True):
        assert got.dtype is torch.float32 and torch.equal(got, grad.float())


def test_errors_name_the_argument():
    x, weight, bias, a, b, _, labels = inputs(torch.float32, 4, 9)
    for error, match, head in (
        (ValueError, "head.weight: expected", Head(weight[:, 1:])),
        (TypeError, "head.weight: expected", Head(weight.bfloat16())),
        (ValueError, "head.bias: expected", Head(weight, bias[1:])),
        (TypeError, "head.bias: expected", Head(weight, bias.double())),
        (ValueError, "head.lora: expected A", Head(weight, None, (a[:, 1:], b, 1.0))),
        (ValueError, "head.lora: expected B", Head(weight, None, (a, b[1:], 1.0))),
    ):
        with pytest.raises(error, match=match):
            linear_cross_entropy(x, head, labels)
    with pytest.raises(TypeError, match="x: expected floating-point"):
        linear_cross_entropy(labels[:, None], Head(weight), labels)
    with pytest.raises(ValueError, match="label_smoothing"):
        linear_cross_entropy(x, Head(weight), labels, label_smoothing=2)
    labels[1] = 9
    with pytest.raises(ValueError, match="labels: expected 0 to 8.*got 9 at position 1"):
        linear_cross_entropy(x, Head(weight), labels)
