"""The folder of a run: what was asked, on what, and what came of it; nothing in it is replaced.

settings.yaml, run.json (versions, seed, sha256 of the data), metrics.json, curves.png, patch.txt,
model/ (what from_pretrained reads) and, while it runs, checkpoints/. run.json comes first,
metrics.json last.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from fastft.finetune import UserError

# What may differ from the run that is resumed: it changes no number.
_FREE = {"resume", "dry_run", "report_to", "logging_steps", "output", "trials"}
# What a process that was killed left half written.
PARTIAL = ".partial-"
WHOLE = "whole"  # the file that a checkpoint has once all of it is on the disk
_LIBRARIES = ("fastft", "torch", "transformers", "datasets", "accelerate", "peft", "trl")


class RunFolder:
    """Paths in a run's folder, and writing there: a file is complete or not there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.settings = self.path / "settings.yaml"
        self.record = self.path / "run.json"
        self.metrics = self.path / "metrics.json"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"

    @property
    def finished(self) -> bool:
        return self.metrics.is_file()

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        held = [mark.parent for mark in self.checkpoints.glob(f"checkpoint-*/{WHOLE}")]
        return max(held, key=lambda c: int(c.name.rpartition("-")[2]), default=None)

    def write(self, name: str, text: str) -> Path:
        """A text file, renamed into place when it is complete."""
        target = self.path / name
        with readable(str(target)):
            handle, part = tempfile.mkstemp(prefix=PARTIAL, dir=self.path)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(part, 0o666 & ~_umask())
                os.replace(part, target)
            except BaseException:
                os.unlink(part)
                raise
        return target

    def write_json(self, name: str, held: Any) -> Path:
        return self.write(name, json.dumps(held, indent=1) + "\n")

    def read_metrics(self) -> dict[str, Any]:
        out: dict[str, Any] = json.loads(self.metrics.read_text(encoding="utf-8"))
        return out


def check(config: Any) -> None:
    """UserError where `start` would raise one for the folder, before anything is computed."""
    folder = RunFolder(config.output)
    if config.resume:
        if not folder.record.is_file():
            raise UserError(f"{config.output}: no run to resume there")
        if folder.finished:
            raise UserError(f"{config.output}: this run is finished; there is nothing to resume")
        return
    with readable(config.output):
        if folder.path.exists() and not (folder.path.is_dir() and _is_unused(folder.path)):
            raise UserError(
                f"{config.output}: exists already; --resume goes on with a run, "
                "--output names another folder"
            )


def start(config: Any, data: Iterable[Path] = ()) -> RunFolder:
    """The folder config.output: a new one, or with config.resume the one that is there.

    config: a settings dataclass with output, seed and resume.
    data: the files that are read; their sha256 is recorded, and must be the same on resuming.
    Under torchrun every process calls it, and the first one makes the folder.
    Raises: UserError for a folder that exists, or on resuming for one that is not a run's, is
        finished, or was started with other settings or data.
    """
    check(config)
    folder, group = RunFolder(config.output), processes()
    hashes = {str(path): sha256(path) for path in data}
    if config.resume:
        _same(folder, config, hashes)
        if group.is_main_process:
            for left in folder.path.glob(f"{PARTIAL}*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            if not folder.settings.is_file():
                folder.write("settings.yaml", yaml_of(config))
        return folder
    group.wait_for_everyone()  # all have found that it can be made
    if group.is_main_process:
        _make(folder, config, hashes)
    group.wait_for_everyone()
    return folder


def processes() -> Any:
    """accelerate's view of the processes that run this together, one where nobody started more."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def _make(folder: RunFolder, config: Any, hashes: dict[str, str]) -> None:
    with readable(config.output):
        folder.path.mkdir(parents=True, exist_ok=True)
    record = {
        "seed": config.seed,
        "settings": asdict(config),
        "data": hashes,
        "versions": versions(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "command": sys.argv,
    }
    # In this order: whoever finds the record can resume, whoever finds none can begin.
    folder.write_json("run.json", record)
    folder.write("settings.yaml", yaml_of(config))


def _same(folder: RunFolder, config: Any, hashes: dict[str, str]) -> None:
    try:
        record = json.loads(folder.record.read_text(encoding="utf-8"))
        before, seen = dict(record["settings"]), dict(record["data"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.record}: cannot be read: {error!r}") from None
    for name, value in json.loads(json.dumps(asdict(config))).items():
        if name not in _FREE and before.get(name) != value:
            raise UserError(
                f"{config.output}: was started with {name} = {before.get(name)}, not {value}; "
                "a run goes on with its own settings"
            )
    for path, digest in hashes.items():
        if seen.get(path) != digest:
            raise UserError(f"{config.output}: {path} has changed since the run was started")


def _is_unused(folder: Path) -> bool:
    return all(path.name.startswith(PARTIAL) for path in folder.iterdir())


def yaml_of(config: Any) -> str:
    """Settings as the flat YAML that the command reads."""
    import yaml

    held = {name: value for name, value in asdict(config).items() if value is not None}
    return yaml.safe_dump(held, sort_keys=False, allow_unicode=True)


def versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def sha256(path: str | Path) -> str:
    with readable(str(path)), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(folder: Path) -> None:
    """Sends all of folder to the disk, so that no loss of power takes it back."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder beside output that becomes output when the block ends well, or is gone.

    What a process that was killed has left of it is cleared away.
    Raises: UserError where another process is making output.
    """
    target = Path(output).expanduser()
    with readable(str(output), "; nothing was written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f"{PARTIAL}{target.name}") as aside:
            part = aside / target.name
            if part.exists():
                shutil.rmtree(part)
            part.mkdir()
            try:
                yield part
                sync(part)
                os.rename(part, target)
            finally:
                shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """A folder for this process alone, gone after the block.

    The lock is on a file in it: the system takes it from a process that ends, however it does.
    """
    import fcntl  # which not every system has

    folder.mkdir(exist_ok=True)
    mark = folder / f"{folder.name}.lock"
    with open(mark, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EBUSY, "another process is making it") from None
        except OSError:  # a file system without locks
            if any(path != mark for path in folder.iterdir()):
                told = f"{folder} is in use, or was left by a process that was killed: remove it"
                raise OSError(errno.EBUSY, told) from None
        # The process before may have ended, and removed the file, since it was opened here.
        if not os.path.samestat(os.stat(mark), os.fstat(lock.fileno())):
            raise OSError(errno.EBUSY, "another process is making it")
        try:
            yield folder
        finally:
            mark.unlink(missing_ok=True)
            with suppress(OSError):  # another process is in it already
                folder.rmdir()


@contextmanager
def readable(what: str, end: str = "") -> Iterator[None]:
    """Errors of the file system as one sentence that begins with what."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}{end}") from None
    except Exception as error:
        # safetensors' and torch's writers have exceptions of their own for a full disk; torch's
        # tells in the one before it that a write failed, and not why.
        said = f"{error} {error.__context__}"
        for full in map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
            if full in said:
                raise UserError(f"{what}: {full}{end}") from None
        if any(mark in said for mark in ("PytorchStreamWriter", "inline_container", "iostream")):
            raise UserError(
                f"{what}: a checkpoint could not be written; is the disk full?"
            ) from None
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
