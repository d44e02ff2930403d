"""One row of a data set after another: converted and cleaned, and kept or dropped for a reason."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastft.finetune import formats
from fastft.finetune.cleaning import Filters, reason_against
from fastft.finetune.duplicates import Duplicates, Near
from fastft.finetune.readers import Row


@dataclass(frozen=True)
class Rules:
    """What becomes of a row."""

    source: str  # formats
    target: str
    repair: Callable[[str], str]
    strip: bool
    filters: Filters
    near: Near | None
    drop_duplicates: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row was read, and the split that it came in, if any."""

    file: str
    row: int
    split: str | None


@dataclass
class Kept:
    """What stays in memory of the rows that stay, in the order in which they were read."""

    lengths: "array[int]" = field(default_factory=lambda: array("q"))  # in characters
    labels: list[tuple[Any, ...]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    firsts: "array[int]" = field(default_factory=lambda: array("q"))  # a row it repeats, or itself
    # By what a label is, "one" or "list" and "name" or "number": the first of them, and where.
    kinds: dict[str, tuple[Any, Place]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    def first(self, row: int) -> int:
        """The first of the rows that repeat each other, row among them."""
        while (before := self.firsts[row]) != row:
            self.firsts[row] = self.firsts[before]  # the next way is shorter
            row = before
        return row

    def join(self, one: int, other: int) -> None:
        """Rows that repeat each other, and with them what repeats either."""
        one, other = sorted((self.first(one), self.first(other)))
        self.firsts[other] = one


class Drop(Exception):
    """A row that does not stay; `of` is the kept row that it repeats."""

    def __init__(self, reason: str, of: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.of = reason, of

    def record(self, place: Place, kept: Kept) -> dict[str, Any]:
        """Which row was dropped and why, for the report."""
        found = {"file": place.file, "row": place.row, "reason": self.reason}
        if self.of is not None:
            first = kept.places[self.of]
            found |= {"of_file": first.file, "of_row": first.row}
        return found


class Sieve:
    """Takes rows of the source format, one at a time."""

    def __init__(self, rules: Rules, kept: Kept) -> None:
        self._rules, self._kept = rules, kept
        self._seen = Duplicates(rules.near)
        # One object for all rows of the same labels.
        self._labels: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def take(self, row: Row, place: Place) -> Row:
        """The row as it is to be written, its numbers added to what is kept; raises Drop."""
        target, kept = self._rules.target, self._kept
        try:
            row = formats.convert_row(row, target, self._rules.source)
            row = formats.map_texts(row, target, self._clean)
            row = formats.map_labels(row, target, self._clean)
            formats.check(row, target)
        except formats.Unfit as why:
            raise Drop(str(why)) from None
        text = formats.text_of(row, target)
        if reason := reason_against(text, self._rules.filters):
            raise Drop(reason)
        labels = formats.labels_of(row, target)
        number, seen = len(kept), self._seen.print(text)
        matches = self._seen.find(seen)
        for match in matches:
            across = kept.places[match.of].split != place.split
            if self._rules.drop_duplicates or across:
                other = " with another label" if kept.labels[match.of] != labels else ""
                raise Drop(match.kind + other, match.of)
        if not any(match.kind == "duplicate" for match in matches):
            self._seen.remember(seen, number)
        kept.lengths.append(len(text))
        kept.labels.append(self._labels.setdefault(labels, labels))
        kept.places.append(place)
        kept.firsts.append(number)
        for match in matches:
            kept.join(number, match.of)
        for kind in _kinds(row["label"]) if target == "text-label" else ():
            kept.kinds.setdefault(kind, (row["label"], place))
        return row

    def _clean(self, text: str) -> str:
        repaired = self._rules.repair(text)
        if self._rules.target == "tokens":
            return repaired.strip() or text  # there must be as many words as tags
        if self._rules.target == "prompt-completion" or not self._rules.strip:
            return repaired  # the space before a completion is a part of its first token
        return repaired.strip()


def _kinds(label: Any) -> list[str]:
    several = isinstance(label, list)
    kinds = ["name" if isinstance(o, str) else "number" for o in (label if several else [label])]
    return ["list" if several else "one", *kinds]
