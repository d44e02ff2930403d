"""Runs cases one after another in this process, and records every one before the next begins."""

import contextlib
import dataclasses
import gc
import signal
import time
import traceback

import torch

from bench.gpu import measure, peers
from bench.gpu.case import Case, Here, Report, Skip
from bench.gpu.results import Results
from bench.gpu.sections import cases_of


class TooLong(BaseException):
    """A case ran past its own limit. Not an Exception: no side may take it for its own."""


class NoTimeLeft(BaseException):
    """The section's time ended while a case ran; it is not recorded, so it runs the next time."""


@contextlib.contextmanager
def at_most(seconds: float, error: Exception):
    """Raises the error in the middle of what runs; a stuck kernel is left to the parent process."""

    def stop(number, frame):
        raise error

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def session_for(here: Here, results: Results, section: str) -> measure.Session:
    """With the section's rates, once they were measured; build and test measure none."""
    timer = measure.timer_for(here) if section.startswith("bench-") else measure.CpuTimer()
    return measure.Session(here, timer, results.rates(section))


def free_memory(here: Here) -> str:
    if here.device != "cuda":
        return "does not fit in memory"
    free, total = torch.cuda.mem_get_info()
    return f"does not fit: {free / 2**30:.0f} of {total / 2**30:.0f} GiB were free"


def is_broken(here: Here) -> bool:
    """Whether an error has left the device unusable for this process."""
    if here.device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def run_case(case: Case, session: measure.Session, results: Results, deadline: float) -> None:
    """One case, whatever comes of it: done, skipped or failed with why."""
    here, start = session.here, time.perf_counter()
    gc.collect()
    if here.device == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    # Else the eighth size of an operator would silently not be compiled.
    torch._dynamo.reset()
    results.begin(case.name)
    left = deadline - time.time()
    error = TooLong(f"took longer than {case.limit:.0f} s") if case.limit < left else NoTimeLeft()
    report, status, why = Report(), "done", ""
    try:
        with at_most(min(case.limit, left), error):
            report = case.run(session)
        if report.failed:
            status, why = "failed", report.failed.strip()
    except NoTimeLeft:
        results.begin(None)
        return
    except Skip as reason:
        status, why = "skipped", str(reason)
    except torch.OutOfMemoryError:
        status, why = "skipped", free_memory(here)
    except (Exception, TooLong) as error:
        traceback.print_exc()
        status, why = "failed", f"{type(error).__name__}: {str(error)[:2000]}"
    results.record(case.name, status, report, time.perf_counter() - start, why)


def run_section(
    section: str, here: Here, results: Results, deadline: float, fresh: bool, only: str = ""
) -> None:
    """Cases that are still to run, until the time is over or another process is called for."""
    cases = {case.name: case for case in cases_of(section, here, only)}
    pending = results.pending(list(cases), fresh)
    if not pending:
        return
    session = session_for(here, results, section)
    for index, name in enumerate(pending):
        case = cases[name]
        alone = bool(case.alone) and peers.installed(case.alone)
        if time.time() >= deadline or (alone and index):
            return
        run_case(case, session, results, deadline)
        if not session.rates:
            session = dataclasses.replace(session, rates=results.rates(section))
        if alone or is_broken(here):
            return
