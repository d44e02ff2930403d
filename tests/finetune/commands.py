"""`fastft …` in processes that may be ended at any moment, forked from one that has imported it.

Moments are counted in what Python does with files under a folder: the same ones on any machine.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["finetune.commands", "fastft.finetune.running", "fastft.finetune.studying"]
)
_TOUCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir")


@dataclass(frozen=True)
class Limits:
    """What befalls a command. number: a signal it gets at the moment `at` under the folder `under`.

    largest: bytes that a file may have. obeys_modes: folders' modes hold, for root as well.
    """

    under: Path | None = None
    at: int = 0
    number: int = signal.SIGKILL
    largest: int | None = None
    obeys_modes: bool = False


@dataclass
class Command:
    """One that was started; said: what it printed, to be read once it has ended."""

    process: object
    log: Path
    said: str = field(default="", init=False)

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit code, -9 after SIGKILL, or None where it still runs."""
        self.process.join(seconds)
        self.said = self.log.read_text(errors="replace")
        return self.process.exitcode

    def kill(self) -> int:
        self.process.kill()
        return self.wait()

    @property
    def moments(self) -> int:
        return int(self.said.rsplit("moments: ", 1)[1].split()[0])


def start(arguments: list, log: Path, limits: Limits = Limits()) -> Command:
    process = _processes.Process(target=_run, args=([*map(str, arguments)], str(log), limits))
    process.start()
    return Command(process, log)


def run(arguments: list, log: Path, limits: Limits = Limits()) -> Command:
    command = start(arguments, log, limits)
    command.wait()
    return command


def _drop_the_right_to_pass_modes() -> None:
    """Root reads and writes what modes forbid by CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110  # of those in force, by their numbers 1 and 2
    assert libc.capset(header, sets) == 0


def _run(arguments: list[str], log: str, limits: Limits) -> None:
    import torch

    from fastft import cli

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    # A shell starts what runs in its background with SIGINT ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if limits.largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.largest, limits.largest))
    if limits.obeys_modes:
        _drop_the_right_to_pass_modes()
    moments = 0

    def count(event: str, details: tuple) -> None:
        nonlocal moments
        if event in _TOUCHED and str(limits.under) in str(details[0]):
            moments += 1
            if moments == limits.at:
                os.kill(os.getpid(), limits.number)

    if limits.under is not None:
        sys.addaudithook(count)
    code = cli.main(arguments)
    print("moments:", moments, flush=True)
    sys.exit(code)
