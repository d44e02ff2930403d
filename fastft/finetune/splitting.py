"""Rows parted into train, validation and test, every label in each by its share."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

TRAIN = "train"


def rarest(labels: Sequence[Sequence[Hashable]]) -> list[Hashable]:
    """One label per row to stratify by: of its labels the rarest, which is hardest to spread."""
    counts = Counter(label for row in labels for label in row)
    return [min(row, key=counts.__getitem__, default=None) for row in labels]


def split(strata: Sequence[Hashable], shares: Mapping[str, float], seed: int) -> list[str]:
    """The split of each row: a name of shares, or "train" for what these leave.

    strata: a label per row. Every split gets its share of each label, rounded so that its size is
    its share of all rows: at least one row. Of every label one row at least stays in train, so that
    none is unseen there. (scikit-learn's stratified split refuses labels with so few rows.)
    """
    random = np.random.default_rng(seed)
    members: dict[Hashable, list[int]] = {}
    for row, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(row)
    sizes = {stratum: len(rows) for stratum, rows in members.items()}
    left = {stratum: random.permutation(rows).tolist() for stratum, rows in members.items()}
    found = [TRAIN] * len(strata)
    for name, share in shares.items():
        if not share:
            continue
        wanted = max(1, round(share * len(strata)))
        ideal = {stratum: share * size for stratum, size in sizes.items()}
        taken = {s: min(int(ideal[s]), len(left[s]) - 1) for s in left}
        by_remainder = sorted(left, key=lambda s: int(ideal[s]) - ideal[s])
        while (missing := wanted - sum(taken.values())) > 0:
            able = [s for s in by_remainder if taken[s] < len(left[s]) - 1]
            if not able:
                break
            for stratum in able[:missing]:
                taken[stratum] += 1
        for stratum, count in taken.items():
            for _ in range(count):
                found[left[stratum].pop()] = name
    return found
