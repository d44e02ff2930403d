"""`pytest bench`: every group pairs PyTorch eager, the peers and fastft on the same work.

The sides alternate in one process (A B A B …) with fixed threads, their results are compared first,
and what is told is the median of the per-round ratios. Peak memory is the growth of the resident
set. The closing table shows time, memory, the floor where one is counted, and what is aimed at.
`--record` keeps the ratios (bench/ratios.py), `--smoke` runs each side once or twice, to see that
everything works.
"""

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from bench import ratios
from bench.gpu.case import Skip

THREADS = 2
OURS = "fastft"


@dataclass
class Row:
    """One line of the table: a side's median seconds, its ratio to fastft, its extra memory.

    at: title, axis and place, of a work that is one point of a plot.
    """

    work: str
    side: str
    seconds: float | None = None
    ratio: float | None = None
    memory: int | None = None
    aim: float | None = None
    note: str = ""
    at: tuple[str, str, int] | None = None


@dataclass
class Table:
    rows: list[Row] = field(default_factory=list)

    def print(self, write: Callable[[str], None]) -> None:
        lines = [("work", "side", "median", "ratio", "memory", "note")]
        for row in self.rows:
            aim = [] if row.aim is None else [f"aim {row.aim}"]
            lines.append(
                (
                    row.work,
                    row.side,
                    "" if row.seconds is None else f"{row.seconds * 1e3:.2f} ms",
                    "" if row.ratio is None else f"{row.ratio:.2f}",
                    "" if row.memory is None else f"{row.memory / 2**20:.1f} MiB",
                    ", ".join([*aim, *filter(None, [row.note])]),
                )
            )
        widths = [max(len(line[i]) for line in lines) + 2 for i in range(6)]
        for line in lines:
            write("".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())

    def ratios(self) -> list[ratios.Row]:
        """Of every side but fastft, without times."""
        ours = {row.work: row.memory for row in self.rows if row.side == OURS}
        return [
            ratios.Row(
                row.work,
                row.side,
                round(row.ratio, 2),
                row.aim,
                None
                if row.memory is None
                else (round(row.memory / 2**20, 1), round(ours[row.work] / 2**20, 1)),
                row.at,
            )
            for row in self.rows
            if row.ratio is not None
        ]


TABLE = Table()
RECORDED = pytest.StashKey[Path]()


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="keep the ratios in bench/results")
    parser.addoption(
        "--machine", help="name of their file, for a kind of processor not seen before"
    )
    parser.addoption("--smoke", action="store_true", help="one round of everything, no measuring")


def pytest_configure(config):
    if config.getoption("record") and config.getoption("smoke"):
        raise pytest.UsageError("--smoke measures nothing, so --record would keep nothing true")
    if config.getoption("record"):
        try:
            machine = config.getoption("machine") or ratios.machine()
        except ValueError as error:
            raise pytest.UsageError(f"{error} by --machine") from None
        config.stash[RECORDED] = ratios.path_of(machine)


@pytest.fixture(autouse=True)
def _same_start():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    _settle_heap()


def _settle_heap() -> None:
    """Puts glibc's heap into the state that it has in a process that trains.

    At first a block of 128 KiB is mapped anew by each call and pays a fault per page; once a larger
    block was freed, blocks up to its size are kept, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD).
    Without this, what ran before would decide the ratios of small operators.
    """
    gc.collect()
    torch.empty(2**25 - 2**20, dtype=torch.uint8)
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(field_name: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field_name))
    return int(line.split()[1]) * 1024


def peak_memory(function: Callable) -> int:
    """Growth of the resident set while `function` runs, in bytes (Linux)."""
    _settle_heap()
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # sets the high-water mark back to what is resident now
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


@pytest.fixture
def told():
    """told(work, side, ratio, aim): a ratio that the bench has counted from times of its own."""

    def tell(work: str, side: str, ratio: float, aim: float | None = None) -> None:
        TABLE.rows.append(Row(work, side, ratio=ratio, aim=aim))

    return tell


@pytest.fixture
def versus(benchmark, request):
    """versus(work, sides, peers=, at_least=, …): times the sides, fills the table.

    sides: name -> function, "fastft" among them; the others' median time over fastft's is their
    ratio. peers: name -> function that makes another side, or raises Skip where it is missing.
    check(results) gates the timing. floor is in seconds, counted by the caller. at: where in a plot
    of memory this work belongs (title, axis, place).
    """

    def run(
        work: str,
        sides: dict[str, Callable],
        *,
        peers: dict[str, Callable[[], Callable]] | None = None,
        at_least: float | None = None,
        floor: float | None = None,
        check: Callable[[dict], None] | None = None,
        memory: bool = False,
        rounds: int = 9,
        at: tuple[str, str, int] | None = None,
    ) -> dict[str, float]:
        sides, skipped = dict(sides), {}
        for name, make in (peers or {}).items():
            try:
                sides[name] = make()
            except Skip as reason:
                skipped[name] = str(reason)
        results = {name: function() for name, function in sides.items()}
        if check is not None:
            check(results)
        results = None
        peaks = {name: peak_memory(f) if memory else None for name, f in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in sides}

        def others():
            for name, function in sides.items():
                if name != OURS:
                    start = time.perf_counter()
                    function()
                    times[name].append(time.perf_counter() - start)

        def ours():
            start = time.perf_counter()
            sides[OURS]()
            times[OURS].append(time.perf_counter() - start)

        benchmark.group = work
        rounds = 1 if request.config.getoption("smoke") else rounds
        benchmark.pedantic(ours, setup=others, rounds=rounds, iterations=1)
        found = {
            name: statistics.median(a / b for a, b in zip(taken, times[OURS], strict=True))
            for name, taken in times.items()
            if name != OURS
        }
        benchmark.extra_info["ratios"] = found
        for name, taken in times.items():
            row = Row(work, name, statistics.median(taken), found.get(name), peaks[name], at=at)
            if name == OURS and floor:
                row.note = f"{row.seconds / floor:.2f}x its floor of {floor * 1e3:.2f} ms"
            elif name == "eager":
                row.aim = at_least
            TABLE.rows.append(row)
        TABLE.rows += [Row(work, name, note=f"not run: {why}") for name, why in skipped.items()]
        return found

    return run


def pytest_terminal_summary(terminalreporter, config):
    if not TABLE.rows:
        return
    terminalreporter.write_sep("=", "ratio: median of side / fastft, alternating")
    TABLE.print(terminalreporter.write_line)
    terminalreporter.write_line(
        f"torch {torch.__version__}, {THREADS} threads, {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}, {ratios.processor()}"
    )
    if path := config.stash.get(RECORDED, None):
        ratios.record(TABLE.ratios(), THREADS, path)
        terminalreporter.write_line(f"recorded in {path}")
