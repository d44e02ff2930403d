"""linear_cross_entropy on the GPU."""

# ruff: noqa: F401
# The tests imported by name are the CPU's; they run here again, on the device.

import pytest
import torch
from gpu import suite
from ops import test_linear_cross_entropy as heads
from ops.test_linear_cross_entropy import (
    test_adapters_wider_than_the_head,
    test_backward_twice_gives_the_same_and_inputs_stay,
    test_half_precision_head_adds_its_gradient_up_in_float32,
    test_num_items_divides_the_sum,
    test_only_what_is_asked_gets_a_gradient,
    test_opcheck,
    test_small_gradients_survive_float16_when_the_loss_is_scaled,
    test_strided_and_batched_inputs,
    test_without_labels_everything_is_zero,
)

pytestmark = pytest.mark.usefixtures("on_device")


def cases():
    plain = {}
    capped = {"softcap": 3.0, "logit_scale": 0.7, "label_smoothing": 0.1}
    for rows, vocab, hidden in ((1, 5, 24), (50, 301, 24), (2100, 4099, 72)):
        for adapters in (False, True):
            for options in (plain, capped):

                def make(dtype, sizes=(rows, vocab, hidden), adapters=adapters, options=options):
                    args = heads.inputs(dtype, *sizes)
                    if not adapters:
                        args[3] = args[4] = None
                    return *args, options

                name = f"{rows}x{vocab}x{hidden}{' LoRA' * adapters}"
                name += " all options" * bool(options)
                yield (
                    f"linear_cross_entropy {name}",
                    suite.Case(
                        heads.beside_logits(heads.fused), heads.beside_logits(heads.eager), make
                    ),
                )


test_as_exact_as_eager, test_twice_the_same_bits, test_compiles_in_one_graph = suite.tests(
    dict(cases()), compiled="linear_cross_entropy 50x301x24 LoRA"
)


@pytest.mark.parametrize("wrong", [-1, 40, 2**40])
def test_a_label_outside_the_vocabulary_is_never_read_wildly(wrong):
    """It raises, or where the host would have to wait for that, its loss is NaN."""
    *args, labels = heads.inputs(torch.float32, 30, 40)
    labels[3] = wrong
    try:
        loss = heads.fused(*args, labels, {})
    except ValueError as error:
        assert f"got {wrong} at position 3" in str(error)
    else:
        assert loss.isnan()
    labels[3] = 0
    assert heads.fused(*args, labels, {}).isfinite()
