"""Encoders on the GPU, patched against themselves: steps of every head, and prediction."""

# ruff: noqa: F401

import pytest
from test_encoders import (
    packed,
    test_batches_of_a_step_share_one_mean,
    test_prediction_is_the_same_and_padded_places_are_zero,
    test_rows_that_are_all_padding,
    test_step_is_the_same,
)

pytestmark = pytest.mark.usefixtures("on_device")
