"""cross_entropy against PyTorch eager and a float64 truth: values, gradients, errors, tracing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn import functional as F
from truth import (
    assert_as_exact,
    assert_same_bits_for_any_threads,
    beside_logits,
    leaves,
    run,
    same_bits,
)

from fastft.ops.cross_entropy import (
    LossOptions,
    _cross_entropy,
    _cross_entropy_backward,
    _cross_entropy_in_place,
    cross_entropy,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(logits, weight, labels, options):
    options = dict(options)
    softcap = options.pop("softcap", None)
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(z.flatten(0, -2), labels.flatten(), weight, **options)
    loss = loss.view(labels.shape) if options.get("reduction") == "none" else loss
    return loss.to(torch.promote_types(loss.dtype, torch.float32))


def fused(logits, weight, labels, options):
    return cross_entropy(logits, labels, weight=weight, **options)


def inputs(dtype, shape, weighted=False, ignored=0.3, ignore_index=-100, scale=2.0):
    *rows, vocab = shape
    logits = (torch.randn(*shape) * scale).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, rows)
    labels[torch.rand(rows) < ignored] = ignore_index
    if labels.numel():
        labels.view(-1)[0] = vocab // 2  # one label at least, where eager would give NaN
    return logits, torch.rand(vocab).to(dtype) + 0.1 if weighted else None, labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_as_exact_as_eager(isa, dtype, reduction):
    for shape in [(1, 2), (7, 17), (2, 3, 100), (5, 1024), (3, 1025), (4, 5003)]:
        for weighted in (False, True):
            args = inputs(dtype, shape, weighted)
            assert_as_exact(fused, eager, (*args, {"reduction": reduction}))
            rest = {"label_smoothing": 0.1, "softcap": 3.0, "reduction": reduction}
            assert_as_exact(fused, eager, (*args, rest))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(2, 3000),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([None, 2.0, 30.0]),
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from([-100, -1, 1, 5000]),
)
def test_any_combination(rows, vocab, dtype, weighted, smoothing, softcap, reduction, ignore):
    args = inputs(dtype, (rows, vocab), weighted, ignore_index=ignore)
    if args[2][0] == ignore:
        args[2][0] = 0
    options = {"label_smoothing": smoothing, "softcap": softcap, "reduction": reduction}
    options["ignore_index"] = ignore
    assert_as_exact(beside_logits(fused), beside_logits(eager), (*args, options))


def test_logits_far_from_zero_very_sure_and_masked(isa):
    logits, _, labels = inputs(torch.float32, (9, 2500), scale=30.0)
    for offset in (1e4, -1e4):
        moved = (logits.detach() + offset).requires_grad_()
        assert_as_exact(fused, eager, (moved, None, labels, {}))
        assert_as_exact(fused, eager, (moved, None, labels, {"label_smoothing": 0.1}))
    sure = logits.detach().scatter(1, labels.clamp(min=0)[:, None], 300.0).requires_grad_()
    assert_as_exact(fused, eager, (sure, None, labels, {"reduction": "none"}))
    masked = logits.detach().clone()
    masked[:, :1100] = -torch.inf
    labels = torch.where(labels >= 0, 1100 + labels.clamp(min=0) % 1400, labels)
    assert_as_exact(fused, eager, (masked.requires_grad_(), None, labels, {}))


def test_nan_and_infinity_reach_the_loss(isa):
    for value in (torch.nan, torch.inf):
        logits = torch.randn(3, 1500, requires_grad=True)
        with torch.no_grad():
            logits[1, 700] = value
        losses = cross_entropy(logits, torch.tensor([1, 2, 3]), reduction="none")
        assert losses.isnan().tolist() == [False, True, False]
        (grad,) = torch.autograd.grad(losses.sum(), logits)
        assert grad.isnan().any(1).tolist() == [False, True, False]


def test_what_ignored_rows_hold_does_not_matter(isa):
    """Padding may hold anything. Eager's gradient of an ignored NaN is NaN all the same."""
    clean, labels = torch.randn(3, 1500), torch.tensor([1, -100, 3])
    results = []
    for value in (0.0, torch.nan, torch.inf):
        logits = clean.index_fill(0, torch.tensor([1]), value).requires_grad_()
        outs, (grad,) = run(fused, (logits, None, labels, {"label_smoothing": 0.1}))
        assert not grad[1].any() and grad[::2].any(1).all()
        results.append((*outs, grad))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_logits_are_read_in_place_and_left_alone(dtype):
    base = (torch.randn(8, 6, 90) * 3).to(dtype)
    for view in (base[:, :-1], base[:, 1:], base.transpose(0, 1), base[..., ::2], base[0].T):
        logits = view.detach().requires_grad_()
        labels = torch.randint(0, logits.shape[-1], logits.shape[:-1])
        kept = logits.detach().clone()
        assert_as_exact(fused, eager, (logits, None, labels, {}))
        cross_entropy(logits, labels, softcap=3.0).backward()
        assert torch.equal(logits.detach(), kept) and logits.grad.shape == logits.shape


@pytest.mark.parametrize("num_items", [3, 7.5, torch.tensor(11), torch.tensor([2.5])])
def test_num_items_divides_the_sum(num_items):
    logits, weight, labels = inputs(torch.float32, (6, 33), True)
    ours = run(lambda z: cross_entropy(z, labels, weight=weight, num_items=num_items), [logits])
    divisor = float(num_items)
    wide, wide_weight = leaves((logits, weight), torch.float64)
    truth = run(
        lambda z: F.cross_entropy(z, labels, wide_weight, reduction="sum") / divisor, [wide]
    )
    for got, wanted in zip(ours[0] + ours[1], truth[0] + truth[1], strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_labels_the_loss_is_zero(reduction, weighted):
    logits, weight, labels = inputs(torch.float32, (5, 20), weighted)
    for options in ({}, {"num_items": 0}, {"num_items": torch.tensor(0)}):
        if options and reduction != "mean":
            continue
        loss = cross_entropy(
            logits, torch.full_like(labels, -100), weight=weight, reduction=reduction, **options
        )
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (0, 0), (3, 0)])
def test_no_rows_or_no_classes(shape):
    logits = torch.randn(*shape, requires_grad=True)
    loss = cross_entropy(logits, torch.full(shape[:-1], -100))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and grad.shape == logits.shape
    none = cross_entropy(logits, torch.full(shape[:-1], -100), reduction="none")
    assert none.shape == shape[:-1] and (none == 0).all()


def test_backward_twice_and_no_second_order():
    logits, weight, labels = inputs(torch.float32, (6, 40), True)
    loss = cross_entropy(logits, labels, weight=weight)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss * 3, logits, retain_graph=True)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 3 * kept)
    with pytest.raises(RuntimeError, match="cross_entropy: .* first derivatives only"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_gradcheck_of_the_reference():
    logits, weight, labels = inputs(torch.float64, (5, 7), True)
    for w in (None, weight):
        for reduction in ("none", "mean"):
            rest = {"label_smoothing": 0.2, "softcap": 4.0, "reduction": reduction}
            assert torch.autograd.gradcheck(lambda z: fused(z, w, labels, rest), logits)  # noqa: B023


def test_the_kernels_agree_with_the_reference_on_a_logit_scale():
    logits, weight, labels = inputs(torch.float32, (5, 70), True)
    logits = logits.detach()
    args = (labels, weight, -100, [0.1, 5.0, 0.3])
    dlosses = torch.randn(5)
    losses, stats = _cross_entropy.op(logits, *args)
    wanted, wanted_stats = _cross_entropy.reference(logits.double(), *args)
    wanted_grad = _cross_entropy_backward.reference(
        dlosses, logits.double(), labels, weight, wanted_stats, *args[2:]
    )
    grad = _cross_entropy_backward.op(dlosses, logits, labels, weight, stats, *args[2:])
    private = logits.clone()
    again = _cross_entropy_in_place.op(private, labels, weight, dlosses, *args[2:])
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-5, atol=1e-7)
    assert torch.equal(again, losses) and torch.equal(private, grad)


def test_same_bits_for_any_thread_count():
    logits, weight, labels = inputs(torch.float32, (37, 3000), True)

    def bits():
        loss = cross_entropy(logits, labels, weight=weight, label_smoothing=0.1)
        return loss, *torch.autograd.grad(loss, logits)

    assert_same_bits_for_any_threads(bits)


def test_opcheck():
    logits, weight, labels = inputs(torch.float32, (5, 20), True)
    logits = logits.detach()
    for w, numbers in ((None, [0.0, 0.0, 1.0]), (weight, [0.1, 4.0, 0.5])):
        _, stats = _cross_entropy.op(logits, labels, w, -100, numbers)
        dlosses = torch.randn(5)
        opcheck(_cross_entropy.op, (logits, labels, w, -100, numbers))
        opcheck(_cross_entropy_backward.op, (dlosses, logits, labels, w, stats, -100, numbers))
        opcheck(_cross_entropy_in_place.op, (logits.clone(), labels, w, dlosses, -100, numbers))


def test_compiles_in_one_graph():
    logits, weight, labels = inputs(torch.float32, (8, 40), True)
    compiled = torch.compile(fused, fullgraph=True)
    options = {"label_smoothing": 0.1, "softcap": 5.0}
    assert_as_exact(compiled, eager, (logits, weight, labels, options))
    labels[3] = 40
    with pytest.raises((ValueError, RuntimeError), match="position 3"):
        compiled(logits, weight, labels, options)


def test_wrong_labels_are_named():
    logits = torch.randn(2, 3, 10)
    labels = torch.zeros(2, 3, dtype=torch.long)
    for wrong in (10, -1, -101):
        labels[1, 2] = wrong
        with pytest.raises(ValueError, match=f"labels: expected 0 to 9.*got {wrong} at.*1, 2"):
            cross_entropy(logits, labels)
    with pytest.raises(RuntimeError, match="labels: position 5 has -101"):
        _cross_entropy.op(logits.view(6, 10), labels.view(-1), None, -100, [0.0, 0.0, 1.0])


def test_errors_name_the_argument():
    logits, labels = torch.randn(2, 8), torch.zeros(2, dtype=torch.long)
    for error, match, call in (
        (TypeError, "logits: expected floating-point", lambda: cross_entropy(labels, labels)),
        (TypeError, "labels: expected torch.int64", lambda: cross_entropy(logits, labels.int())),
        (ValueError, "labels: expected shape", lambda: cross_entropy(logits, labels[:1])),
        (ValueError, "weight: expected", lambda: cross_entropy(logits, labels, weight=logits)),
        (
            TypeError,
            "weight: expected",
            lambda: cross_entropy(logits, labels, weight=torch.ones(8, dtype=torch.long)),
        ),
        (
            ValueError,
            "num_items: expected reduction",
            lambda: cross_entropy(logits, labels, num_items=2, reduction="sum"),
        ),
        (
            ValueError,
            "num_items: expected one",
            lambda: cross_entropy(logits, labels, num_items=torch.ones(2)),
        ),
        (ValueError, "label_smoothing: expected", lambda: LossOptions(label_smoothing=1.5)),
        (ValueError, "softcap: expected", lambda: LossOptions(softcap=0.0)),
        (ValueError, "reduction: expected", lambda: LossOptions(reduction="avg")),
        (TypeError, "temperature", lambda: cross_entropy(logits, labels, temperature=1)),
    ):
        with pytest.raises(error, match=match):
            call()
