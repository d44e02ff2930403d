"""The Triton cross_entropy, interpreted, against the reference."""

import pytest
import torch
from fastft.kernels import common, cross_entropy
from same import assert_same

from fastft.ops.cross_entropy import (
    _cross_entropy,
    _cross_entropy_backward,
    _cross_entropy_in_place,
)

PLAIN = [0.0, 0.0, 1.0]


def all_three(logits, labels, weight, dlosses, ignore_index, numbers):
    """Values of the three operators; the statistics of the rows that have a label."""
    kept = labels != ignore_index
    rest = (labels, weight, ignore_index, numbers)

    def forward(op):
        def call(logits, *args):
            losses, stats = op(logits, *args)
            return losses, stats[kept]

        call.reference = call
        return call

    assert_same(
        forward(cross_entropy.cross_entropy), forward(_cross_entropy.reference), (logits, *rest)
    )
    assert torch.equal(
        cross_entropy.cross_entropy(logits, *rest)[0][~kept], torch.zeros(int((~kept).sum()))
    )
    _, stats = cross_entropy.cross_entropy(logits, *rest)
    args = (dlosses, logits, labels, weight, stats, ignore_index, numbers)
    assert_same(cross_entropy.cross_entropy_backward, _cross_entropy_backward, args)
    assert cross_entropy.cross_entropy_backward(*args).is_contiguous()

    def in_place(op):
        def call(logits, *args):
            private = logits.clone()
            return op(private, *args), private

        call.reference = call
        return call

    for given in (dlosses, None):
        args = (logits, labels, weight, given, ignore_index, numbers)
        launch, reference = cross_entropy.cross_entropy_in_place, _cross_entropy_in_place.reference
        assert_same(in_place(launch), in_place(reference), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "numbers",
    [PLAIN, [0.0, 0.0, -0.7], [0.1, 0.0, 1.0], [0.0, 3.0, 0.5], [0.2, 30.0, 2.0], [1.0, 0.0, 1.0]],
)
def test_values(dtype, weighted, numbers):
    for rows, vocab in ((5, 33), (1, 2), (2, cross_entropy.BLOCK + 5)):
        logits = (4 * torch.randn(rows, vocab)).to(dtype)
        labels = torch.randint(vocab, (rows,))
        labels[1:2] = -100
        weight = torch.rand(vocab).to(dtype) if weighted else None
        all_three(logits, labels, weight, torch.randn(rows), -100, numbers)


def test_the_label_is_found_anywhere():
    vocab = 2 * cross_entropy.BLOCK + 1
    labels = torch.tensor([0, cross_entropy.BLOCK - 1, cross_entropy.BLOCK, vocab - 1])
    logits = torch.randn(4, vocab)
    logits[range(4), labels] += 12  # sure of it, so that p - 1 cancels
    all_three(logits, labels, None, torch.ones(4), -100, PLAIN)
    # ignore_index may be a class.
    all_three(logits, labels, None, torch.ones(4), vocab - 1, PLAIN)


def test_distances_and_types():
    base = torch.randn(8, 3, 40)
    logits, labels = base[::2, 1], torch.randint(40, (8,))[::2]
    weight = torch.rand(80, dtype=torch.float16)[::2]
    all_three(logits, labels, weight, torch.tensor(0.3).expand(4), -100, [0.1, 0.0, 1.0])
    columns = torch.randn(40, 4).t()
    all_three(columns, labels, None, torch.randn(8)[::2], -100, PLAIN)
    private, wanted = columns.clone(memory_format=torch.preserve_format), columns.clone()
    assert private.stride() == columns.stride()
    cross_entropy.cross_entropy_in_place(private, labels, None, None, -100, PLAIN)
    _cross_entropy_in_place.reference(wanted, labels, None, None, -100, PLAIN)
    assert torch.allclose(private, wanted, atol=1e-6)


def test_the_rows_between_are_not_touched():
    base = torch.randn(6, 40)
    before, labels = base.clone(), torch.randint(33, (3,))
    cross_entropy.cross_entropy_in_place(base[::2, :33], labels, None, None, -100, PLAIN)
    assert torch.equal(base[1::2], before[1::2]) and torch.equal(base[:, 33:], before[:, 33:])
    assert not torch.equal(base[::2, :33], before[::2, :33])


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_extreme_logits(softcap):
    logits = torch.randn(4, 50) + torch.tensor([1e4, -1e4, 0.0, 0.0])[:, None]
    logits[2, 10:] = float("-inf")
    logits[3, 0] = 3e38
    labels = torch.tensor([3, 4, 5, 0])
    all_three(logits, labels, None, torch.randn(4), -100, [0.0, softcap, 1.0])
    logits[2] = 7.0
    all_three(logits[:3], labels[:3], None, torch.randn(3), -100, [0.1, softcap, 1.0])


def test_not_numbers_are_told():
    logits = torch.randn(3, 50)
    logits[0, 7], logits[1, 8] = float("nan"), float("inf")
    losses, stats = cross_entropy.cross_entropy(logits, torch.tensor([1, 2, 3]), None, -100, PLAIN)
    assert losses.isnan().tolist() == [True, True, False]


def test_what_ignored_rows_hold_does_not_matter():
    logits, labels = torch.randn(3, 50), torch.tensor([1, -100, 3])
    for value in (float("nan"), float("inf")):
        logits[1] = value
        private = logits.clone()
        losses = cross_entropy.cross_entropy_in_place(private, labels, None, None, -100, PLAIN)
        assert losses[1] == 0 and not private[1].any() and private.isfinite().all()
        losses, stats = cross_entropy.cross_entropy(logits, labels, None, -100, PLAIN)
        args = torch.ones(3), logits, labels, None, stats, -100, PLAIN
        grad = cross_entropy.cross_entropy_backward(*args)
        assert losses[1] == 0 and torch.equal(grad, private)


@pytest.mark.parametrize("wrong", [-1, 50, 1 << 40, -(1 << 62)])
def test_a_wrong_label_reads_nothing_and_is_told(wrong):
    logits, labels = torch.randn(4, 50), torch.tensor([1, wrong, -100, 49])
    right, rest = torch.tensor([1, 0, -100, 49]), (torch.rand(50), -100, [0.1, 5.0, 1.0])
    losses, stats = cross_entropy.cross_entropy(logits, labels, *rest)
    wanted, _ = cross_entropy.cross_entropy(logits, right, *rest)
    other = [0, 2, 3]
    assert losses[1].isnan() and torch.equal(losses[other], wanted[other])
    assert stats.isfinite().all()
    dlosses = torch.ones(4)
    grad = cross_entropy.cross_entropy_backward(dlosses, logits, labels, rest[0], stats, *rest[1:])
    assert grad[1].isnan().all() and grad[other].isfinite().all()
    told = cross_entropy.cross_entropy_in_place(logits, labels, rest[0], None, *rest[1:])
    assert torch.equal(told.isnan(), losses.isnan()) and logits[1].isnan().all()
    assert torch.equal(logits[other], grad[other])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing(shape):
    labels = torch.full(shape[:1], -100)
    all_three(torch.randn(*shape), labels, None, torch.randn(shape[0]), -100, PLAIN)


def test_one_class():
    all_three(torch.randn(2, 1), torch.zeros(2).long(), None, torch.randn(2), -100, PLAIN)


def test_nothing_labelled():
    all_three(torch.randn(3, 9), torch.full((3,), 4), None, torch.randn(3), 4, [0.1, 0.0, 1.0])


def test_tanh_near_zero_and_far():
    @common.triton.jit
    def kernel(x, y):
        lanes = common.tl.arange(0, 1024)
        common.tl.store(y + lanes, common.tanh(common.tl.load(x + lanes)))

    x = torch.cat((torch.logspace(-20, 1, 511), -torch.logspace(-20, 2, 511), torch.zeros(2)))
    x[-1] = float("-inf")
    y = torch.empty(1024)
    kernel[(1,)](x, y)
    wanted = x.double().tanh()
    assert ((y - wanted).abs() <= 3e-7 * wanted.abs()).all()
