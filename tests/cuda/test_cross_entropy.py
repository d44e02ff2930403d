"""cross_entropy's CUDA kernels on the host: values, bits, shared memory, far rows, wrong labels."""

import ctypes
from itertools import product

import pytest
import torch
from launching import DTYPES, call, far, pointer
from same import assert_same

from fastft.ops import cross_entropy as op

IGNORED = -100


class CrossEntropy(ctypes.Structure):
    """kernels/cuda/cross_entropy.h"""

    _fields_ = [
        ("dtype", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("logits_stride", ctypes.c_int64),
        ("labels", ctypes.c_void_p),
        ("labels_stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("weight_sum", ctypes.c_void_p),
        ("ignore_index", ctypes.c_int64),
        ("label_smoothing", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("logit_scale", ctypes.c_float),
        ("dlosses", ctypes.c_void_p),
        ("dlosses_stride", ctypes.c_int64),
        ("losses", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("dlogits", ctypes.c_void_p),
        ("dlogits_stride", ctypes.c_int64),
    ]


class Launchers:
    """The three launchers, with the signatures of the operators they implement."""

    def __init__(self, library):
        self.library = library

    def _launch(self, name, logits, labels, weight, dlosses, ignore_index, numbers, **outputs):
        total = None if weight is None else weight.sum()
        dlogits = outputs.get("dlogits")
        smoothing, softcap, scale = numbers
        argument = CrossEntropy(
            DTYPES[logits.dtype], *logits.shape, pointer(logits), logits.stride(0),
            pointer(labels), labels.stride(0), pointer(weight), pointer(total), ignore_index,
            smoothing, softcap, scale, pointer(dlosses),
            0 if dlosses is None else dlosses.stride(0), pointer(outputs.get("losses")),
            pointer(outputs.get("stats")), pointer(dlogits),
            0 if dlogits is None else dlogits.stride(0),
        )  # fmt: skip
        call(getattr(self.library, f"fastft_cross_entropy_{name}"), argument)

    def forward(self, logits, labels, weight, ignore_index, numbers):
        losses, stats = torch.empty(logits.shape[0]), torch.empty(logits.shape[0], 2)
        self._launch(
            "forward", logits, labels, weight, None, ignore_index, numbers,
            losses=losses, stats=stats,
        )  # fmt: skip
        return losses, stats

    def backward(self, dlosses, logits, labels, weight, stats, ignore_index, numbers):
        dlogits = torch.empty(logits.shape, dtype=logits.dtype)
        self._launch(
            "backward", logits, labels, weight, dlosses, ignore_index, numbers,
            stats=stats, dlogits=dlogits,
        )  # fmt: skip
        return dlogits

    def both(self, logits, labels, weight, dlosses, ignore_index, numbers):
        """As the reference's in place, but giving the gradient too, over a private copy."""
        own = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype).copy_(logits)
        losses = torch.empty(logits.shape[0])
        self._launch(
            "both", own, labels, weight, dlosses, ignore_index, numbers, losses=losses, dlogits=own
        )
        return losses, own


class Forward:
    """Statistics of ignored rows are nobody's: the backward does not read them."""

    @staticmethod
    def reference(logits, labels, *rest):
        losses, stats = op._cross_entropy.reference(logits, labels, *rest)
        return losses, stats[labels != IGNORED]


class Both:
    @staticmethod
    def reference(logits, *rest):
        own = logits.clone()
        return op._cross_entropy_in_place.reference(own, *rest), own


@pytest.fixture
def launchers(order):
    return Launchers(order("cross_entropy"))


def batch(rows, vocab, dtype, pad=0, weighted=False):
    """Logits whose rows lie vocab + pad apart, labels of which some are ignored, class weights."""
    logits = (3 * torch.randn(rows, vocab + pad)).to(dtype)[:, :vocab]
    labels = torch.randint(0, vocab, (rows,))
    labels[1::3] = IGNORED
    return logits, labels, torch.rand(vocab) + 0.5 if weighted else None


PLAIN, ALL = [0.0, 0.0, 1.0], [0.1, 8.0, 0.7]
# One pack and less, rows at odd addresses, more packs than threads, a tail.
SHAPES = [(4, 1, 0), (3, 7, 0), (3, 50, 3), (2, 4103, 1), (2, 9000, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, vocab, pad", SHAPES)
@pytest.mark.parametrize("numbers", [PLAIN, ALL], ids=["plain", "all"])
def test_against_the_reference(launchers, rows, vocab, pad, dtype, numbers):
    logits, labels, weight = batch(rows, vocab, dtype, pad, weighted=numbers is ALL)
    rest = IGNORED, numbers

    def forward(*args):
        losses, stats = launchers.forward(*args)
        return losses, stats[labels != IGNORED]

    assert_same(forward, Forward, (logits, labels, weight, *rest))
    dlosses = torch.randn(rows, 2)[:, 0]
    stats = op._cross_entropy.reference(logits, labels, weight, *rest)[1]
    assert_same(
        launchers.backward, op._cross_entropy_backward,
        (dlosses, logits, labels, weight, stats, *rest),
    )  # fmt: skip
    for upstream in (None, dlosses):
        assert_same(launchers.both, Both, (logits, labels, weight, upstream, *rest))


@pytest.mark.parametrize("kept", [0, 4096, 100 << 10])
def test_bits_do_not_depend_on_what_shared_memory_holds(launchers, kept):
    logits, labels, _ = batch(2, 9001, torch.float16)
    wanted = launchers.both(logits, labels, None, None, IGNORED, PLAIN)
    try:
        launchers.library.emulator_shared(2 * (kept + 2048))
        got = launchers.both(logits, labels, None, None, IGNORED, PLAIN)
    finally:
        launchers.library.emulator_shared(100 << 10)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_a_row_has_the_same_bits_anywhere(launchers):
    row = 3 * torch.randn(1, 4103)
    alone = launchers.forward(row, torch.tensor([5]), None, IGNORED, PLAIN)[0]
    # At every address modulo 16, beside other rows.
    many = row.repeat(5, 1)
    many[2] = 100.0
    losses = launchers.forward(many, torch.full((5,), 5), None, IGNORED, PLAIN)[0]
    assert losses[[0, 1, 3, 4]].eq(alone).all()


@pytest.mark.parametrize("numbers", [[0.0, 8.0, 1.0], [0.1, 8.0, -0.5], [0.0, 0.0, -1.0]], ids=str)
def test_infinity_under_a_softcap_and_negative_scales(launchers, numbers):
    """A cap makes a finite logit of an infinite one, and what lies behind a row's end is none."""
    logits = torch.randn(3, 37)
    if numbers[1]:
        logits[0, 3:9], logits[1, 5] = float("-inf"), float("-inf")
    labels = torch.tensor([0, 5, 36])
    weight = torch.rand(37) + 0.5
    assert_same(launchers.both, Both, (logits, labels, weight, None, IGNORED, numbers))
    assert launchers.both(logits, labels, weight, None, IGNORED, numbers)[0].isfinite().all()


@pytest.mark.parametrize("vocab", [24500, 30522])
def test_rows_that_need_more_shared_memory_than_comes_unasked_for(launchers, vocab):
    logits, labels, _ = batch(1, vocab, torch.float16)
    assert_same(launchers.both, Both, (logits, labels, None, None, IGNORED, PLAIN))


def test_wrong_labels_and_odd_values(launchers):
    logits = torch.randn(5, 37)
    logits[2, 4:9], logits[3] = float("-inf"), -1e30
    labels = torch.tensor([37, -1, 0, 1, IGNORED])
    losses, grad = launchers.both(logits, labels, None, None, IGNORED, PLAIN)
    assert losses[:2].isnan().all() and grad[:2].isnan().all()
    eager = logits[2:4].clone().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(eager, labels[2:4], reduction="none")
    wanted.sum().backward()
    torch.testing.assert_close(losses[2:4], wanted.detach())
    torch.testing.assert_close(grad[2:4], eager.grad)
    assert losses[4] == 0 and grad[4].eq(0).all()


def test_every_block_is_launched_once(launchers):
    """Rows times pieces, more than one: a wrong grid leaves NaN or goes out of bounds."""
    for rows, vocab in product((1, 5), (8192, 8193, 40000)):
        logits, labels, _ = batch(rows, vocab, torch.float32)
        labels[:] = 0
        stats = op._cross_entropy.reference(logits, labels, None, IGNORED, PLAIN)[1]
        grad = launchers.backward(torch.ones(rows), logits, labels, None, stats, IGNORED, PLAIN)
        torch.testing.assert_close(grad.sum(1), torch.zeros(rows), atol=1e-5, rtol=0)


def test_rows_beyond_2_to_the_31_elements(launchers):
    logits, labels, _ = batch(3, 1000, torch.float16)
    labels[:] = torch.tensor([3, 999, 0])
    distant = far(logits)
    wanted = launchers.forward(logits, labels, None, IGNORED, PLAIN)
    for a, b in zip(launchers.forward(distant, labels, None, IGNORED, PLAIN), wanted, strict=True):
        assert torch.equal(a, b)
    dlosses, stats = torch.ones(3), wanted[1]
    rest = labels, None, stats, IGNORED, PLAIN
    grad = launchers.backward(dlosses, logits, *rest)
    assert torch.equal(launchers.backward(dlosses, distant, *rest), grad)
    launchers._launch(
        "both", distant, labels, None, None, IGNORED, PLAIN,
        losses=torch.empty(3), dlogits=distant,
    )  # fmt: skip
    assert torch.equal(distant, grad)
