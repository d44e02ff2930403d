"""The Triton forms of a head and its loss, interpreted, against the operators' references."""

import pytest
import torch
from fastft.kernels import cross_entropy
from fastft.kernels import linear_cross_entropy as kernels
from same import assert_same
from torch.utils._python_dispatch import TorchDispatchMode

import fastft.ops.linear_cross_entropy_chunked as chunked
from fastft.ops.linear_cross_entropy_blockwise import _blockwise, _blockwise_backward

BOTH = [True, True]


def check(x, weight, labels, dlosses, softcap, scale, ignore_index, needs=BOTH):
    args = x, weight, labels
    rest = ignore_index, [softcap, scale]
    assert_same(kernels.linear_cross_entropy_blockwise, _blockwise, (*args, *rest))
    _, lse = _blockwise.reference(*args, *rest)
    backward = kernels.linear_cross_entropy_blockwise_backward
    assert_same(backward, _blockwise_backward, (dlosses, *args, lse.float(), *rest, needs))


def problem(rows, hidden, vocab, dtype):
    x, weight = torch.randn(rows, hidden).to(dtype), (torch.randn(vocab, hidden) * 0.3).to(dtype)
    labels = torch.randint(0, vocab, (rows,))
    return x, weight, labels, torch.randn(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("shape", [(1, 3, 2), (70, 20, 35), (33, 70, 130)])
def test_losses_and_gradients(dtype, softcap, shape):
    x, weight, labels, dlosses = problem(*shape, dtype)
    labels[1::3] = -100
    check(x, weight, labels, dlosses, softcap, 0.7, -100)
    # An ignored index that is a class, and the small upstream gradients of a mean.
    ignored = int(labels[0])
    check(x, weight, labels.clamp(min=0), dlosses / 5000, softcap, 1.0, ignored)


@pytest.mark.parametrize("splits", [1, 2, 3, 100])
def test_splits_of_the_vocabulary_agree(splits):
    x, weight, labels, _ = problem(5, 8, 150, torch.float32)
    options = -100, [0.0, 1.0]
    losses, lse = kernels.linear_cross_entropy_blockwise(x, weight, labels, *options, splits)
    logits = x.double() @ weight.double().t()
    torch.testing.assert_close(lse.double(), logits.logsumexp(1), rtol=1e-6, atol=1e-6)
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-6)


def test_rows_that_lie_apart_and_the_same_bits_twice():
    x, weight, labels, dlosses = problem(40, 12, 70, torch.float32)
    x, weight = torch.stack((x, -x), 1)[:, 0], torch.cat((weight, weight), 1)[:, :12]
    check(x, weight, labels, dlosses[:1].expand(40), 0.0, 1.0, -100)

    def bits():
        losses, lse = kernels.linear_cross_entropy_blockwise(x, weight, labels, -100, [0.0, 1.0])
        args = losses, x, weight, labels, lse, -100, [0.0, 1.0], BOTH
        return losses, lse, *kernels.linear_cross_entropy_blockwise_backward(*args)

    assert all(torch.equal(a, b) for a, b in zip(bits(), bits(), strict=True))


def test_no_rows_and_all_rows_ignored():
    x, weight, labels, dlosses = problem(4, 8, 20, torch.float32)
    check(x[:0], weight, labels[:0], dlosses[:0], 0.0, 1.0, -100)
    for upstream in (dlosses, torch.zeros(4)):
        check(x, weight, torch.full((4,), -100), upstream, 0.0, 1.0, -100)


def test_rows_without_a_label_are_not_computed():
    x, weight, labels, dlosses = problem(100, 8, 20, torch.float32)
    labels[::2] = -100
    x[::2] = float("nan")
    losses, lse = kernels.linear_cross_entropy_blockwise(x, weight, labels, -100, [0.0, 1.0])
    args = dlosses, x, weight, labels, lse, -100, [0.0, 1.0], BOTH
    dx, dweight = kernels.linear_cross_entropy_blockwise_backward(*args)
    assert not losses[::2].any() and not lse[::2].any() and not dx[::2].any()
    assert losses[1::2].all() and dx[1::2].any(1).all() and dweight.isfinite().all()


@pytest.mark.parametrize("label", [-1, 20])
def test_wrong_labels_give_nan(label):
    x, weight, labels, dlosses = problem(5, 8, 20, torch.float32)
    labels[1], labels[3] = label, -100
    losses, lse = kernels.linear_cross_entropy_blockwise(x, weight, labels, -100, [0.0, 1.0])
    args = dlosses, x, weight, labels, lse, -100, [0.0, 1.0], BOTH
    dx, _ = kernels.linear_cross_entropy_blockwise_backward(*args)
    wrong = torch.tensor([False, True, False, False, False])
    assert torch.equal(losses.isnan(), wrong) and torch.equal(dx.isnan().all(1), wrong)
    assert dx[~wrong].isfinite().all() and lse.isfinite().all()


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("nonzero", "_local_scalar_dense"), func
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_nothing(monkeypatch):
    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(grid)

    launches = []
    monkeypatch.setattr(kernels, "_forward", Recorder())
    monkeypatch.setattr(kernels, "_backward", Recorder())
    x, weight, labels, dlosses = problem(70, 8, 20, torch.float32)
    with NoWaiting():
        losses, lse = kernels.linear_cross_entropy_blockwise(x, weight, labels, -100, [0.0, 1.0])
        args = dlosses, x, weight, labels, lse, -100, [0.0, 1.0], BOTH
        kernels.linear_cross_entropy_blockwise_backward(*args)
    assert len(launches) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_half_types_skip_tiles_that_round_to_nothing(dtype):
    x, weight, labels, dlosses = problem(10, 8, 200, dtype)
    # Probabilities below eps / 32, but not 0, in all tiles but the first.
    x[:, 0], weight[:, 0] = 1.0, -12.0 if dtype is torch.float16 else -25.0
    weight[:64] *= 0.1
    weight[0, 0] = 0.0
    labels[:] = torch.arange(10)
    probability = (x.double() @ weight.double().t()).softmax(1)[:, 64:]
    assert 1e-15 < probability.max() < torch.finfo(dtype).eps / 32
    _, lse = _blockwise.reference(x, weight, labels, -100, [0.0, 1.0])
    args = dlosses, x, weight, labels, lse, -100, [0.0, 1.0], BOTH
    _, dweight = kernels.linear_cross_entropy_blockwise_backward(*args)
    assert bool(dweight[64:].any()) == (dtype is torch.float32)
    check(x, weight, labels, dlosses, 0.0, 1.0, -100)


@pytest.mark.parametrize("needs", [[True, False], [False, True]])
def test_only_what_is_needed(needs):
    check(*problem(6, 8, 20, torch.float32), 0.0, 1.0, -100, needs)


@pytest.mark.parametrize(("dtype", "waiting"), [(torch.float32, 0), (torch.float16, 1 << 60)])
def test_chunks_with_the_row_pass_of_the_gpu(monkeypatch, dtype, waiting):
    """What the CUDA key runs, but for cuBLAS: the row pass is Triton's, on rows set apart."""
    monkeypatch.setattr(chunked, "_on_gpu", lambda x: True)
    monkeypatch.setattr(chunked, "_GPU_ROWS", 1)
    monkeypatch.setattr(chunked, "_GPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(chunked, "_GPU_WORTH_WAITING", waiting)
    monkeypatch.setattr(chunked, "_cross_entropy_in_place", cross_entropy.cross_entropy_in_place)
    monkeypatch.setattr(chunked, "_cross_entropy", cross_entropy.cross_entropy)
    x, weight, labels, dlosses = problem(140, 12, 35, dtype)
    labels[1::3] = -100
    bias, a, b = torch.randn(35).to(dtype), torch.randn(3, 12), torch.randn(35, 3)
    a, b = a.to(dtype), b.to(dtype)
    for head, needs, upstream in (
        ([weight, None, None, None], [True] + [False] * 4, None),
        ([weight, bias, a, b], [True] * 5, dlosses),
        ([weight, None, None, None], [False] * 5, None),
    ):
        args = x, head, labels, None, upstream, -100, [0.5, 0.1, 3.0, 0.7], needs
        assert_same(chunked._for_cuda, chunked._linear_cross_entropy, args)
