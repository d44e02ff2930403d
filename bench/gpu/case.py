"""What a case is: a name, a function of the session, and what it hands back."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


class Skip(Exception):
    """A case or one of its sides cannot run here; the message says why."""


@dataclass(frozen=True)
class Here:
    """Where the cases run; toy sizes and no compiler, to see on a CPU that everything works."""

    device: str = "cuda"
    toy: bool = False
    dtype: torch.dtype = torch.bfloat16

    def compile(self, function: Callable) -> Callable:
        """torch.compile for exactly these sizes; a toy stops before the compiler proper."""
        backend = "aot_eager" if self.toy else "inductor"
        return torch.compile(function, dynamic=False, backend=backend)

    def need_gpu(self, what: str) -> None:
        if self.device != "cuda":
            raise Skip(f"{what} needs a GPU")


@dataclass(frozen=True)
class Case:
    """run(session) gives a Report.

    alone: a distribution that changes the whole process; where it is installed, the case runs in a
    process of its own.
    """

    name: str
    run: Callable
    alone: str = ""
    limit: float = 120.0  # seconds

    @staticmethod
    def of(name: str, function: Callable, *args, **settings) -> "Case":
        return Case(name, lambda session: function(session, *args), **settings)


@dataclass(frozen=True)
class Floor:
    """What a work cannot do without: bytes moved, operations of matrix products in one dtype."""

    bytes: float = 0.0
    operations: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    both: bool = False  # one after the other, rather than at the same time

    def seconds(self, rates: dict[str, float]) -> float:
        """rates: bytes per second as "copy", operations per second by the dtype's name."""
        moving = self.bytes / rates["copy"]
        products = self.operations / rates[str(self.dtype)[6:]]
        return moving + products if self.both else max(moving, products)


@dataclass
class Row:
    """One side: medians over the rounds; ratio is the median of side / fastft, round by round."""

    side: str
    ms: float
    quartiles: tuple[float, float] | None = None
    ratio: float | None = None
    host_ms: float | None = None  # until the call came back, the device still busy
    memory: int | None = None  # bytes beyond what was allocated before
    difference: float | None = None  # relative, from the first side
    floor_ms: float | None = None
    tokens_per_second: float | None = None

    @property
    def share(self) -> float | None:
        return None if self.floor_ms is None else self.floor_ms / self.ms


@dataclass(frozen=True)
class Goal:
    """What the rows should show; None where a side that it speaks of is missing."""

    text: str
    reached: Callable[[dict[str, Row]], bool]

    def verdict(self, rows: dict[str, Row]) -> bool | None:
        try:
            return bool(self.reached(rows))
        except KeyError:
            return None


@dataclass
class Report:
    """What a case printed; skipped: side -> why; failed: what of ours did, the rest being told."""

    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    goals: list[tuple[str, bool | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    failed: str = ""

    def judge(self, *goals: Goal) -> "Report":
        rows = {row.side: row for row in self.rows}
        self.goals += [(goal.text, goal.verdict(rows)) for goal in goals]
        return self


BANDWIDTH = Goal("85% of copy bandwidth", lambda rows: rows["fastft"].share >= 0.85)


def at_most(side: str, factor: float, what: str) -> Goal:
    """fastft takes at most `factor` times as long as another side."""
    return Goal(what, lambda rows: rows["fastft"].ms <= factor * rows[side].ms)


def ahead_of_all(*products: str) -> Goal:
    """fastft is faster than every other side but those that do only part of the work."""

    def reached(rows: dict[str, Row]) -> bool:
        mine = rows["fastft"].ms
        return all(
            mine <= row.ms
            for name, row in rows.items()
            if not name.startswith("fastft") and name not in products
        )

    return Goal("ahead of every peer here", reached)


def randn(here: Here, *shape: int, std: float = 1.0, grad: bool = False) -> torch.Tensor:
    """Random numbers of the machine's dtype; never zeros, on which hardware is faster."""
    x = torch.randn(*shape, device=here.device, dtype=here.dtype)
    return x.mul_(std).requires_grad_(grad)
