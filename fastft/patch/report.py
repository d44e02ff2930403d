"""The report of a patch: what was swapped for what, what was left alone and why."""

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from fastft import library


@dataclass(frozen=True)
class Entry:
    """One kind of module: swapped for an operator, or left alone for a reason."""

    module: str  # class name
    operator: str  # noun of fastft.ops; "" if left alone
    implementation: str  # on the model's device; "" if left alone
    count: int
    reason: str = ""  # why left alone, or a remark on the swap


@dataclass
class Report:
    """`report.swapped` and `report.left` hold entries; `print(report)` shows them as a table."""

    device: str = "cpu"
    _swapped: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    _left: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, module: nn.Module | str, operator: str, raw: str, remark: str = "") -> None:
        """raw: the dispatcher's name of the operator that does the work, to name who serves it."""
        served = library.operators().get(raw, {}).get(self.device, raw)
        self._swapped[_name(module), operator, served, remark] += 1

    def leave(self, module: nn.Module, reason: str) -> None:
        self._left[_name(module), reason] += 1

    @property
    def swapped(self) -> list[Entry]:
        return [Entry(m, o, i, n, r) for (m, o, i, r), n in self._swapped.items()]

    @property
    def left(self) -> list[Entry]:
        return [Entry(m, "", "", n, r) for (m, r), n in self._left.items()]

    def count(self, operator: str) -> int:
        """How many modules now run this operator."""
        return sum(entry.count for entry in self.swapped if entry.operator == operator)

    def __str__(self) -> str:
        rows = [("module", "operator", f"on {self.device}", "count", "remark")]
        rows += [
            (e.module, e.operator, e.implementation, str(e.count), e.reason) for e in self.swapped
        ]
        rows += [(e.module, "-", "left alone", str(e.count), e.reason) for e in self.left]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(
                [*(c.ljust(w) for c, w in zip(row[:4], widths, strict=True)), row[4]]
            ).rstrip()
            for row in rows
        ]
        if self.device == "cpu" and library.extension is None:
            lines.append("warning: fastft._C is missing; `python -m fastft doctor` here tells why")
        return "\n".join(lines) if len(rows) > 1 else "nothing here that fastft knows"

    __repr__ = __str__


def _name(module: nn.Module | str) -> str:
    return module if isinstance(module, str) else type(module).__name__
