"""The blockwise head and loss, interpreted, against the reference of the chunked operator."""

import pytest
import torch
from fastft.kernels import linear_cross_entropy as blockwise
from same import assert_same

from fastft.ops.linear_cross_entropy import _linear_cross_entropy


class Chunked:
    """Losses, dx and dweight of the operator that computes the same in chunks."""

    @staticmethod
    def reference(x, weight, labels, dlosses, softcap, scale, ignore_index):
        numbers, needs = [1.0, 0.0, softcap, scale], [True, True, False, False, False]
        head = [weight, None, None, None]
        losses, dx, dweight, *_ = _linear_cross_entropy.reference(
            x, head, labels, None, dlosses, ignore_index, numbers, needs
        )
        return losses, dx, dweight


def launch(x, weight, labels, dlosses, softcap, scale, ignore_index, splits=None):
    options = softcap, scale, ignore_index
    lse, target = blockwise.blockwise_forward(x, weight, labels, *options, splits)
    grads = blockwise.blockwise_backward(x, weight, labels, lse, dlosses, *options)
    return torch.where(labels == ignore_index, 0.0, lse - target), *grads


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
    assert_same(launch, Chunked, (x, weight, labels, dlosses, softcap, 0.7, -100))
    # An ignored index that is a class, and the small upstream gradients of a mean.
    ignored = int(labels[0])
    labels = labels.clamp(min=0)
    assert_same(launch, Chunked, (x, weight, labels, dlosses / 5000, softcap, 1.0, ignored))


@pytest.mark.parametrize("splits", [1, 2, 3, 100])
def test_splits_of_the_vocabulary_agree(splits):
    x, weight, labels, _ = problem(5, 8, 150, torch.float32)
    lse, target = blockwise.blockwise_forward(x, weight, labels, splits=splits)
    logits = x.double() @ weight.double().t()
    torch.testing.assert_close(lse.double(), logits.logsumexp(1), rtol=1e-6, atol=1e-6)
    own = logits.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(target.double(), own, rtol=1e-6, atol=1e-6)


def test_rows_that_lie_apart_and_the_same_bits_twice():
    x, weight, labels, dlosses = problem(40, 12, 70, torch.float32)
    x, weight = torch.stack((x, -x), 1)[:, 0], torch.cat((weight, weight), 1)[:, :12]
    args = x, weight, labels, dlosses[:1].expand(40), 0.0, 1.0, -100
    assert_same(launch, Chunked, args)
    assert all(torch.equal(a, b) for a, b in zip(launch(*args), launch(*args), strict=True))


def test_no_rows_and_all_rows_ignored():
    x, weight, labels, dlosses = problem(4, 8, 20, torch.float32)
    assert_same(launch, Chunked, (x[:0], weight, labels[:0], dlosses[:0], 0.0, 1.0, -100))
    for upstream in (dlosses, torch.zeros(4)):
        args = x, weight, torch.full((4,), -100), upstream, 0.0, 1.0, -100
        losses, *grads = launch(*args)
        assert not losses.any() and not any(g.any() for g in grads)


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
    _, _, dweight = launch(x, weight, labels, dlosses, 0.0, 1.0, -100)
    assert bool(dweight[64:].any()) == (dtype is torch.float32)
    assert_same(launch, Chunked, (x, weight, labels, dlosses, 0.0, 1.0, -100))


def test_the_weight_alone_is_frozen():
    x, weight, labels, dlosses = problem(6, 8, 20, torch.float32)
    lse, _ = blockwise.blockwise_forward(x, weight, labels)
    (dx,) = blockwise.blockwise_backward(x, weight, labels, lse, dlosses, weight_grad=False)
    _, wanted, _ = Chunked.reference(x, weight, labels, dlosses, 0.0, 1.0, -100)
    torch.testing.assert_close(dx, wanted, rtol=1e-5, atol=1e-6)
