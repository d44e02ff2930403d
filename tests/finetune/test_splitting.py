"""Splits: their sizes, the share of every label in each, and the seed."""

from collections import Counter

import pytest

from fastft.finetune.splitting import rarest, split

SHARES = {"validation": 0.1, "test": 0.2}


def test_sizes_and_the_share_of_every_label():
    strata = ["a"] * 700 + ["b"] * 250 + ["c"] * 50
    found = split(strata, SHARES, 0)
    counts = Counter(zip(found, strata, strict=True))
    for name, share in SHARES.items():
        for label, size in (("a", 700), ("b", 250), ("c", 50)):
            assert counts[name, label] == pytest.approx(share * size, abs=1)
    assert Counter(found) == {"train": 700, "validation": 100, "test": 200}


def test_many_small_labels_give_a_split_of_its_size():
    found = split([i // 3 for i in range(300)], SHARES, 0)
    assert Counter(found) == {"train": 210, "validation": 30, "test": 60}
    assert {i // 3 for i, name in enumerate(found) if name == "train"} == set(range(100))


def test_every_label_is_left_in_train():
    found = split([i // 3 for i in range(300)], {"validation": 0.45, "test": 0.45}, 0)
    assert {i // 3 for i, name in enumerate(found) if name == "train"} == set(range(100))


def test_one_of_a_label_stays_in_train():
    found = split([*range(20), *["many"] * 80], {"test": 0.5}, 0)
    assert found[:20] == ["train"] * 20 and found.count("test") == 50


@pytest.mark.parametrize(
    "count, expected",
    [(0, {}), (1, {"train": 1}), (2, {"train": 1, "validation": 1})],
)
def test_few_rows(count, expected):
    assert Counter(split([None] * count, SHARES, 0)) == expected


def test_at_least_one_row_each():
    assert Counter(split([None] * 5, SHARES, 0)) == {"train": 3, "validation": 1, "test": 1}
    assert Counter(split([None] * 5, {"validation": 0, "test": 0.0}, 0)) == {"train": 5}


def test_the_seed_decides():
    strata = [0, 1] * 50
    assert split(strata, SHARES, 1) == split(strata, SHARES, 1) != split(strata, SHARES, 2)


def test_rows_are_drawn_from_all_over():
    found = split([None] * 1000, {"test": 0.5}, 0)
    assert 200 < found[:500].count("test") < 300


def test_rarest_label_of_a_row():
    labels = [("a", "b"), ("a",), (), ("b", "a", "c"), ("b",), ("a",)]
    assert rarest(labels) == ["b", "a", None, "c", "b", "a"]
