"""cross_entropy on the GPU."""

# ruff: noqa: F401
# The tests imported by name are the CPU's; they run here again, on the device.

import pytest
import torch
from gpu import suite
from ops import test_cross_entropy as losses
from ops.test_cross_entropy import (
    test_any_combination,
    test_backward_twice_and_no_second_order,
    test_logits_far_from_zero_very_sure_and_masked,
    test_nan_and_infinity_reach_the_loss,
    test_no_rows_or_no_classes,
    test_num_items_divides_the_sum,
    test_opcheck,
    test_strided_logits_are_read_in_place_and_left_alone,
    test_the_kernels_agree_with_the_reference_on_a_logit_scale,
    test_without_labels_the_loss_is_zero,
)
from truth import assert_close

from fastft.ops import cross_entropy as fastft_losses

pytestmark = pytest.mark.usefixtures("on_device")


def cases():
    for shape in ((1, 2), (7, 17), (2, 3, 1025), (4, 50_003), (3, 128_256)):
        for reduction in ("mean", "none"):
            for options in ({}, {"label_smoothing": 0.1, "softcap": 3.0}):

                def make(dtype, shape=shape, options=options, reduction=reduction):
                    args = losses.inputs(dtype, shape, bool(options))
                    return *args, {**options, "reduction": reduction}

                yield (
                    f"cross_entropy {shape} {reduction}{' all options' * bool(options)}",
                    suite.Case(
                        losses.beside_logits(losses.fused), losses.beside_logits(losses.eager), make
                    ),
                )


test_as_exact_as_eager, test_twice_the_same_bits, test_compiles_in_one_graph = suite.tests(
    dict(cases()), compiled="cross_entropy (4, 50003) mean all options"
)


@pytest.mark.parametrize("wrong", [-1, 40, 2**40])
def test_a_label_outside_the_vocabulary_is_never_read_wildly(wrong):
    """It raises, or where the host would have to wait for that, its loss is NaN."""
    *args, labels = losses.inputs(torch.float32, (30, 40))
    labels[3] = wrong
    try:
        loss = losses.fused(*args, labels, {})
    except ValueError as error:
        assert f"got {wrong} at position 3" in str(error)
    else:
        assert loss.isnan()
    labels[3] = 0
    assert losses.fused(*args, labels, {}).isfinite()


@pytest.mark.parametrize("dtype", suite.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 40), (6, 50_257), (3, 128_256)])
@pytest.mark.parametrize("numbers", [[0.0, 0.0, 1.0], [0.1, 8.0, 0.7]], ids=["plain", "all"])
def test_the_cuda_kernels_agree_with_the_reference(device, shape, numbers, dtype):
    """`fastft_cuda::` stands beside what serves the operators: the same contract."""
    if device != "cuda" or not torch._C._dispatch_has_kernel("fastft_cuda::cross_entropy"):
        pytest.skip("CUDA C++ is not built here")
    logits = (3 * torch.randn(shape)).to(dtype)
    labels = torch.randint(0, shape[1], shape[:1])
    labels[1] = -100
    weight = torch.rand(shape[1]) + 0.5 if numbers[0] else None
    dlosses = torch.randn(shape[:1])
    ours = torch.ops.fastft_cuda
    arguments = labels, weight, -100, numbers
    truth = fastft_losses._cross_entropy.reference(logits.double(), *arguments)
    eager = fastft_losses._cross_entropy.reference(logits, *arguments)
    got = ours.cross_entropy(logits, *arguments)
    assert_close(got[0], eager[0], truth[0], "losses")
    truth_grad, eager_grad = (
        fastft_losses._cross_entropy_backward.reference(
            dlosses, z, labels, weight, stats, -100, numbers
        )
        for z, stats in ((logits.double(), truth[1]), (logits, eager[1]))
    )
    grad = ours.cross_entropy_backward(dlosses, logits, labels, weight, got[1], -100, numbers)
    assert_close(grad, eager_grad, truth_grad, "gradient")
    for _ in range(2):
        own = logits.clone()
        both = ours.cross_entropy_in_place(own, labels, weight, dlosses, -100, numbers)
        assert torch.equal(both, got[0]) and torch.equal(own, grad)
