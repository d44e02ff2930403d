"""The CPU's tests of the operators, as they are, on tensors of the GPU.

Left out are those that look at the CPU's own means: threads, autocast of the CPU, products counted.
"""

import importlib

import pytest

pytestmark = pytest.mark.usefixtures("on_device")
AGAIN = {
    "norm": "strided_inputs weight_of_another_dtype_and_frozen_weight tiny_hidden_sizes"
    " rows_far_from_zero any_shape opcheck errors_name_the_argument",
    "gated_mlp": "strided_inputs upstream_gradient_of_any_layout no_gradient_that_nobody_needs"
    " backward_gives_the_forward_again infinity_and_nan_as_eager_in_float64 any_shape opcheck",
    "rotary": "same_meaning_as_llama strided_inputs results_and_gradients_lie_as_the_inputs_do"
    " float32_angles_with_half_precision_queries angles_of_another_half_dtype"
    " no_gradient_that_nobody_needs kernel_and_reference_agree_in_layout any_shape opcheck",
    "cross_entropy": "any_combination logits_far_from_zero_very_sure_and_masked"
    " nan_and_infinity_reach_the_loss strided_logits_are_read_in_place_and_left_alone"
    " num_items_divides_the_sum without_labels_the_loss_is_zero no_rows_or_no_classes"
    " backward_twice_and_no_second_order the_kernels_agree_with_the_reference_on_a_logit_scale"
    " opcheck",
    "linear_cross_entropy": "only_what_is_asked_gets_a_gradient adapters_wider_than_the_head"
    " half_precision_head_adds_its_gradient_up_in_float32"
    " small_gradients_survive_float16_when_the_loss_is_scaled num_items_divides_the_sum"
    " without_labels_everything_is_zero backward_twice_gives_the_same_and_inputs_stay"
    " strided_and_batched_inputs opcheck",
    "lora": "gradients_of_a_trained_base no_gradient_that_nobody_needs strided_inputs"
    " several_linears_on_one_input onto_a_base_product_made_elsewhere any_shape opcheck",
    "lora_mlp": "without_adapters_and_with_a_trained_base partly_frozen",
    "attention": "unequal_lengths rows_that_see_no_key_are_zero_with_zero_gradients length_one"
    " strided_inputs large_scores one_sequence_never_reaches_another nan_is_not_hidden"
    " computes_no_gradient_nobody_needs opcheck",
}
for _operator, _names in AGAIN.items():
    _module = importlib.import_module(f"ops.test_{_operator}")
    for _name in _names.split():
        # With its marks: parameters, and hypothesis' shapes.
        globals()[f"test_{_operator}_{_name}"] = getattr(_module, f"test_{_name}")
