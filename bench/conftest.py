"""`pytest bench`: every group pairs PyTorch eager, the peers and fastft on the same work.

The sides alternate in one process (A B A B …) with fixed threads, their results are compared first,
and what is told is the median of the per-round ratios. Peak memory is the growth of the resident
set. The closing table shows time, memory, the floor where one is counted, and what is aimed at.
"""

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

THREADS = 2


@dataclass
class Row:
    """One line of the table: a side's median seconds, its ratio to fastft, its extra memory."""

    work: str
    side: str
    seconds: float
    ratio: float | None
    memory: int | None
    note: str = ""


@dataclass
class Table:
    rows: list[Row] = field(default_factory=list)

    def print(self, write: Callable[[str], None]) -> None:
        widths = (44, 22, 11, 8, 10)
        heads = ("work", "side", "median", "ratio", "memory", "note")
        write("".join(h.ljust(w) for h, w in zip(heads, (*widths, 0), strict=True)))
        for row in self.rows:
            cells = (
                row.work,
                row.side,
                f"{row.seconds * 1e3:.2f} ms",
                "" if row.ratio is None else f"{row.ratio:.2f}",
                "" if row.memory is None else f"{row.memory / 2**20:.1f} MiB",
            )
            write("".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + row.note)


TABLE = Table()


@pytest.fixture(autouse=True)
def _quiet_machine():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    gc.collect()


def _resident(field_name: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field_name))
    return int(line.split()[1]) * 1024


def peak_memory(function: Callable) -> int:
    """Growth of the resident set while `function` runs, in bytes (Linux)."""
    import ctypes

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # sets the high-water mark back to what is resident now
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


@pytest.fixture
def versus(benchmark, request):
    """versus(work, sides, at_least=, floor=, memory=, rounds=): times the sides, fills the table.

    sides: name -> function, "fastft" among them; the others' median time over fastft's is their
    ratio. check(results) gates the timing. floor is in seconds, counted by the caller.
    """

    def run(
        work: str,
        sides: dict[str, Callable],
        *,
        at_least: float | None = None,
        floor: float | None = None,
        check: Callable[[dict], None] | None = None,
        memory: bool = False,
        rounds: int = 9,
    ) -> dict[str, float]:
        results = {name: function() for name, function in sides.items()}
        if check is not None:
            check(results)
        results = None
        peaks = {name: peak_memory(f) if memory else None for name, f in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in sides}

        def others():
            for name, function in sides.items():
                if name != "fastft":
                    start = time.perf_counter()
                    function()
                    times[name].append(time.perf_counter() - start)

        def ours():
            start = time.perf_counter()
            sides["fastft"]()
            times["fastft"].append(time.perf_counter() - start)

        benchmark.group = work
        benchmark.pedantic(ours, setup=others, rounds=rounds, iterations=1)
        ratios = {
            name: statistics.median(a / b for a, b in zip(taken, times["fastft"], strict=True))
            for name, taken in times.items()
            if name != "fastft"
        }
        benchmark.extra_info["ratios"] = ratios
        for name, taken in times.items():
            note = ""
            seconds = statistics.median(taken)
            if name == "fastft":
                note = f"{seconds / floor:.2f}x its floor of {floor * 1e3:.2f} ms" if floor else ""
            elif name == "eager" and at_least is not None:
                note = f"aim {at_least}"
            TABLE.rows.append(Row(work, name, seconds, ratios.get(name), peaks[name], note))
        return ratios

    return run


def pytest_terminal_summary(terminalreporter):
    if TABLE.rows:
        terminalreporter.write_sep("=", "ratio: median of side / fastft, alternating")
        TABLE.print(terminalreporter.write_line)
        terminalreporter.write_line(
            f"torch {torch.__version__}, {THREADS} threads, {platform.machine()}, "
            f"{torch.backends.cpu.get_cpu_capability()}, {_processor()}"
        )


def _processor() -> str:
    with open("/proc/cpuinfo") as info:
        names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return names[0] if names else "unknown processor"
