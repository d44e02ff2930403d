"""Times sides against each other: results compared first, then A B A B, the median of the ratios.

On a GPU time is told by events. The work is queued behind a pause long enough for Python to get
ahead, so what is told is the device's time; the host's is told beside it. Whole steps are timed
without the pause. Between any two runs the second-level cache is overwritten.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu.case import Floor, Here, Report, Row, Skip

ROUNDS = 7
MOST_ROUNDS = 41
LONGEST_PAUSE = 0.02  # seconds
OURS = "fastft"


@dataclass(frozen=True)
class Side:
    """run(*prepare()) is the work and gives tensors; prepare is not timed."""

    run: Callable
    prepare: Callable[[], tuple] = tuple
    compare: bool = True


class CpuTimer:
    """Wall time; there is no queue to get ahead of, and no peak to be read."""

    def time(self, side: Side, pause: float = 0.0) -> tuple[float, float]:
        """Seconds of the device, and of the host until the call came back."""
        args = side.prepare()
        start = time.perf_counter()
        side.run(*args)
        seconds = time.perf_counter() - start
        return seconds, seconds

    def peak(self, side: Side) -> int | None:
        """Bytes allocated at the most, beyond those before."""
        return None


class CudaTimer:
    def __init__(self):
        size = max(2 * torch.cuda.get_device_properties(0).L2_cache_size, 1 << 28)
        self._flush = torch.empty(size, dtype=torch.int8, device="cuda")
        self._cycles = 1e9
        for _ in range(2):  # the first wakes the clock
            self._cycles = 1e7 / self._events(lambda: torch.cuda._sleep(10_000_000))[0]

    def _events(self, run: Callable, pause: float = 0.0) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if pause:
            torch.cuda._sleep(int(pause * self._cycles))
        start.record()
        begin = time.perf_counter()
        run()
        host = time.perf_counter() - begin
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, host

    def time(self, side: Side, pause: float = 0.0) -> tuple[float, float]:
        args = side.prepare()
        self._flush.zero_()
        return self._events(lambda: side.run(*args), pause)

    def peak(self, side: Side) -> int | None:
        args = side.prepare()
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side.run(*args)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def timer_for(here: Here):
    return CudaTimer() if here.device == "cuda" else CpuTimer()


def passes(forward: Callable, tensors: Iterable, upstream=None, fresh: bool = False) -> Side:
    """Forward and the gradients of the tensors that need one.

    fresh: on copies, made anew and untimed for each run, for sides that write over what they get.
    """
    tensors = tuple(tensors)
    count = len(tensors)
    upstream = () if upstream is None else upstream if isinstance(upstream, tuple) else (upstream,)

    def run(*args):
        given, dys = args[:count], args[count:]
        outs = forward(*given)
        outs = outs if isinstance(outs, tuple) else (outs,)
        needing = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
        grads = torch.autograd.grad(outs, needing, dys or None)
        return *(out.detach() for out in outs), *grads

    def copies():
        return tuple(
            t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
            for t in (*tensors, *upstream)
        )

    return Side(run, copies if fresh else lambda: (*tensors, *upstream))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, in pieces so that large gradients need no second copy."""
    if ours.shape != theirs.shape:
        raise ValueError(f"expected shape {tuple(theirs.shape)}, got {tuple(ours.shape)}")
    apart, size = 0.0, 0.0
    pieces = (t.reshape(-1).split(1 << 26) for t in (ours, theirs))
    for a, b in zip(*pieces, strict=True):
        apart += float((a.float() - b.float()).double().square().sum())
        size += float(b.double().square().sum())
    return (apart / size) ** 0.5 if size else float(apart > 0)


def _difference(results: tuple, wanted: tuple) -> float:
    if len(results) != len(wanted):
        raise ValueError(f"expected {len(wanted)} results, got {len(results)}")
    found = [distance(a, b) for a, b in zip(results, wanted, strict=True)]
    # max() would lose a NaN that does not come first.
    return max(found) if all(d == d for d in found) else float("nan")


def _made(sides: dict[str, Callable[[], Side]], report: Report) -> dict[str, Side]:
    """The sides that can be had here."""
    made = {}
    for name, make in sides.items():
        try:
            made[name] = make() if not isinstance(make, Side) else make
        except (Skip, ImportError, AttributeError) as reason:
            if name in (OURS, "eager"):
                raise
            report.skipped[name] = str(reason)
    return made


def _checked(made: dict[str, Side], report: Report, tolerance: float) -> dict[str, float | None]:
    """Runs every side once; how far each is from the first.

    Eager and "fastft" must work. Of a peer that does not, why is told; a further side of ours that
    does not, fails the case too, but the others are measured.
    """
    wanted, found = None, {}
    for name, side in made.items():
        difference = None
        try:
            results = side.run(*side.prepare())
            if side.compare and wanted is None:
                wanted = results
            elif side.compare:
                difference = _difference(results, wanted)
            del results
            if name.startswith(OURS) and difference is not None and not difference <= tolerance:
                first = next(iter(made))
                raise AssertionError(f"{difference:.3g} from {first}, allowed is {tolerance}")
        except torch.OutOfMemoryError:
            report.skipped[name] = "does not fit in free memory"
            continue
        except Exception as error:
            if name in (OURS, "eager"):
                raise
            report.skipped[name] = f"raised {type(error).__name__}: {str(error)[:300]}"
            if name.startswith(OURS):
                report.failed += f"{name} {report.skipped[name]} "
            continue
        found[name] = difference
    return found


def _rounds(timer, sides: dict[str, Side], queued: bool, budget: float) -> dict[str, list]:
    """(device, host) seconds of every side, alternating; as many rounds as the budget allows."""
    warm = {name: [timer.time(side) for _ in range(2)][1] for name, side in sides.items()}
    pause = min(LONGEST_PAUSE, 2 * max(host for _, host in warm.values()) + 2e-4) if queued else 0.0
    one = sum(max(both) for both in warm.values()) + len(warm) * pause
    rounds = max(ROUNDS, min(MOST_ROUNDS, int(budget / max(one, 1e-9))))
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(timer.time(side, pause))
    return times


def measure(
    timer,
    sides: dict[str, Side | Callable[[], Side]],
    *,
    rates: dict[str, float],
    floor: Floor | dict[str, Floor] | None = None,
    tolerance: float = 0.05,
    tokens: int | None = None,
    queued: bool = True,
    budget: float = 3.0,
) -> Report:
    """Rows of all sides that run here; a side may be a function that makes it, or raises Skip.

    A floor for all, or by side. tokens: of one run, for tokens per second.
    """
    report = Report()
    made = _made(sides, report)
    differences = _checked(made, report, tolerance)
    made = {name: side for name, side in made.items() if name in differences}
    if not made:
        raise torch.OutOfMemoryError("no side fits in free memory")
    peaks = {name: timer.peak(side) for name, side in made.items()}
    times = _rounds(timer, made, queued, budget)
    for name, taken in times.items():
        device = [seconds for seconds, _ in taken]
        row = Row(name, statistics.median(device) * 1e3)
        low, _, high = statistics.quantiles(device, n=4)
        row.quartiles = low * 1e3, high * 1e3
        row.host_ms = statistics.median(host for _, host in taken) * 1e3
        row.memory, row.difference = peaks[name], differences[name]
        if name != OURS and OURS in times:
            pairs = zip(taken, times[OURS], strict=True)
            row.ratio = statistics.median(a / b for (a, _), (b, _) in pairs)
        own = floor.get(name) if isinstance(floor, dict) else floor
        row.floor_ms = None if own is None else own.seconds(rates) * 1e3
        row.tokens_per_second = None if tokens is None else tokens / row.ms * 1e3
        report.rows.append(row)
    return report


@dataclass(frozen=True)
class Session:
    """What a case runs with."""

    here: Here
    timer: object
    rates: dict[str, float]

    def measure(self, sides: dict, **settings) -> Report:
        budget = 0.05 if self.here.toy else 3.0
        return measure(self.timer, sides, rates=self.rates, **{"budget": budget, **settings})


def rates(here: Here, timer) -> dict[str, float]:
    """Bytes copied per second, read and written, and operations per second of square products.

    The best of several runs: a floor must not be too high because the machine was busy.
    """
    best = {}
    source = torch.randn(1 << (16 if here.toy else 28), device=here.device)
    target = torch.empty_like(source)
    best["copy"] = 2 * source.numel() * 4 / _best(timer, Side(partial(target.copy_, source)))
    del source, target
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        n = 64 if here.toy else 8192 if dtype is not torch.float32 else 4096
        a, b = (torch.randn(n, n, device=here.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        best[str(dtype)[6:]] = 2 * n**3 / _best(timer, Side(partial(torch.mm, a, b, out=out)))
    return best


def _best(timer, side: Side) -> float:
    for _ in range(3):
        timer.time(side)
    return min(timer.time(side, 1e-3)[0] for _ in range(12))
