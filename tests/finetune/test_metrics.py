"""Metrics against values counted by hand, and what is no input for them."""

import json
import math

import numpy as np
import pytest

from fastft.finetune import UserError, metrics

PROBABILITIES = np.array([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.4, 0.3, 0.3], [0.1, 0.1, 0.8]])


def test_classification_by_hand():
    found = metrics.classification([0, 1, 1, 2], PROBABILITIES, ["a", "b", "c"])
    assert found["accuracy"] == 0.75
    assert found["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert found["per_class"]["b"] == {"precision": 1, "recall": 0.5, "f1": 2 / 3, "support": 2}
    # Precisions 1/2, 1, 1; recalls 1, 1/2, 1; supports 1, 2, 1.
    assert found["precision_macro"] == pytest.approx(5 / 6)
    assert found["precision_weighted"] == pytest.approx(7 / 8)
    assert found["f1_micro"] == pytest.approx(0.75)
    assert found["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    # Squared distances 0.02, 0.38, 0.74, 0.06.
    assert found["brier"] == pytest.approx(0.3)
    # Each confidence has a bin of its own: |1 - 0.9| + |1 - 0.5| + |0 - 0.4| + |1 - 0.8|, over 4.
    assert found["ece"] == pytest.approx(1.2 / 4)
    assert json.loads(json.dumps(found)) == found


def test_a_class_that_is_never_there_counts_as_nothing():
    found = metrics.classification([0, 0], PROBABILITIES[:2], ["a", "b", "c"])
    assert found["per_class"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert np.shape(found["confusion"]) == (3, 3)


def test_calibrated_confidence_has_no_error():
    # Half of those that are sure by a half are right; bins are closed above.
    assert metrics.calibration_error([0.5] * 4, [True, False, True, False]) == 0
    assert metrics.calibration_error([1.0, 0.0], [True, False]) == 0
    # In one bin, errors of opposite sign cancel: the share is compared, not each example.
    assert metrics.calibration_error([0.7, 0.9], [False, True], bins=1) == pytest.approx(0.3)


def test_multi_label_by_hand():
    found = metrics.multi_label([[1, 0], [1, 1]], [[0.9, 0.2], [0.3, 0.6]], ["x", "y"])
    assert found["accuracy"] == 0.5
    assert found["precision_micro"] == 1 and found["recall_micro"] == pytest.approx(2 / 3)
    assert found["brier"] == pytest.approx((0.01 + 0.04 + 0.49 + 0.16) / 4)
    lower = metrics.multi_label([[1, 0], [1, 1]], [[0.9, 0.2], [0.3, 0.6]], ["x", "y"], 0.3)
    assert lower["accuracy"] == 1


def test_entities_count_whole():
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC"]]
    # The person is cut short, one place is found.
    found = metrics.entities(true, [["B-PER", "O", "O", "B-LOC"], ["O"]])
    assert found["precision_micro"] == 0.5 and found["recall_micro"] == pytest.approx(1 / 3)
    assert found["per_class"]["PER"]["f1"] == 0 and found["per_class"]["LOC"]["support"] == 2
    assert found["accuracy"] == pytest.approx(3 / 5) and "LOC" in found["report"]
    assert metrics.entities([["O"]], [["O"]])["f1_micro"] == 0
    assert metrics.entities([["O"]], [["B-PER"]])["precision_micro"] == 0


def test_tags_without_a_prefix_are_entities_of_their_own_name():
    found = metrics.entities([["PER", "PER", "O", "X"]], [["PER", "PER", "O", "O"]])
    assert set(found["per_class"]) == {"PER", "X"} and found["recall_micro"] == 0.5


def test_perplexity():
    assert metrics.perplexity(math.log(7)) == pytest.approx(7)
    assert metrics.perplexity(1e6) == math.inf


@pytest.mark.parametrize(
    "labels, probabilities, said",
    [
        ([], np.empty((0, 3)), "nothing to evaluate"),
        ([0, 1, 3, 0], PROBABILITIES, "label 3 is none of the 3"),
        ([0, 1, -1, 0], PROBABILITIES, "label -1"),
        ([0, 1, 1, 0], PROBABILITIES[:, :2], r"expected \(4, 3\)"),
        ([0, 1, 1, 0], PROBABILITIES * [1, np.nan, 1], "example 0 are not finite"),
    ],
)
def test_what_is_no_input(labels, probabilities, said):
    with pytest.raises(UserError, match=said):
        metrics.classification(labels, probabilities, ["a", "b", "c"])


def test_entities_need_a_tag_for_each_word():
    with pytest.raises(UserError, match="sentence 0: 2 words and 1"):
        metrics.entities([["O", "O"]], [["O"]])
    with pytest.raises(UserError, match="no sentences"):
        metrics.entities([], [])
