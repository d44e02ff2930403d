"""What serves each operator on each device here, and why nothing better does."""

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import shlex
import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

import fastft
import fastft.ops
from fastft import library
from fastft.ops import gemm

REFERENCE = "PyTorch reference"
# Below these the package does not work; None: needed by some commands only, any version.
OLDEST = {"torch": "2.11", "transformers": "5.17", "peft": "0.19", "trl": None, "triton": None}
# The newest that the tests are run with; tests/test_doctor.py holds them to the pinned ones.
TESTED = {"torch": "2.13", "transformers": "5.24", "peft": "0.21", "trl": "1.16", "triton": "3.6"}
_HERE = Path(fastft.__file__).resolve().parent
INSTALL = "`pip install --no-build-isolation --no-deps --force-reinstall .` in its source folder"


def examine() -> dict[str, Any]:
    """Everything `fastft doctor` tells, as plain values."""
    for module in pkgutil.iter_modules(fastft.ops.__path__):
        importlib.import_module(f"fastft.ops.{module.name}")
    build = library.extension.build_info() if library.extension is not None else None
    versions: dict[str, str | None] = {
        "fastft": fastft.__version__,
        "python": platform.python_version(),
    }
    versions |= {name: _version(name) for name in OLDEST}
    return {
        "versions": versions,
        "warnings": [*_version_warnings(versions), *_build_warnings(build)],
        "build": build,
        "threads": torch.get_num_threads(),
        "float32_products": gemm.float32_library(),
        "devices": {device: _missing(device) for device in ("cpu", "cuda")},
        "operators": library.operators(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_warnings(versions: dict[str, str | None]) -> list[str]:
    warnings = []
    for name, oldest in OLDEST.items():
        found, tested = versions[name], TESTED[name]
        if found is None:
            if oldest is not None and name != "peft":
                warnings.append(f"{name} is not installed: fastft needs {oldest} or later")
        elif oldest is not None and Version(found) < Version(oldest):
            warnings.append(f"{name} {found} is too old: fastft needs {oldest} or later")
        elif Version(found).release[:2] > Version(tested).release[:2]:
            warnings.append(
                f"{name} {found} is newer than {tested}, the newest that fastft is tested with"
            )
    return warnings


def _build_warnings(build: dict[str, Any] | None) -> list[str]:
    if build is not None:
        return []
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if (built := _built_elsewhere()) is not None:
        why = f"fastft is read from {_HERE}, and {built} has them; run Python in another folder"
    elif shutil.which(compiler) is None:
        why = f"there is no C++ compiler ({compiler}); install one, then run {INSTALL}"
    else:
        why = f"it was not compiled when fastft was installed; run {INSTALL}"
    return [f"fastft._C is missing, so the CPU runs plain PyTorch: {why}"]


def _built_elsewhere() -> Path | None:
    """An installed fastft with kernels that another without them hides, as its clone does."""
    for entry in sys.path:
        folder = Path(entry).resolve() / "fastft"
        if folder != _HERE and any((folder / f"_C{end}").exists() for end in EXTENSION_SUFFIXES):
            return folder
    return None


def _missing(device: str) -> str | None:
    """Why this device has nothing better than the reference; None where its kernels can run."""
    if device == "cpu":
        return None if library.extension is not None else "fastft._C is missing"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def text(found: dict[str, Any]) -> str:
    """`examine`'s findings for a person to read."""
    lines = ["versions"]
    lines += [
        f"  {name:<14}{version or 'not installed'}" for name, version in found["versions"].items()
    ]
    lines += ["", "cpu"]
    if found["build"] is not None:
        sets = ", ".join(found["build"]["instruction_sets"])
        lines.append(f"  kernels       {sets}; in use: {found['build']['instruction_set']}")
        lines.append(f"  compiler      {found['build']['compiler']}")
    else:
        lines.append("  kernels       none")
    lines.append(f"  threads       {found['threads']}")
    lines.append(f"  products      float32 on {found['float32_products']}")
    built = (found["build"] or {}).get("cuda_architectures") or ["no CUDA C++ built"]
    lines += ["", "cuda", f"  kernels       {', '.join(built)}"]
    lines += ["", _operators(found)]
    lines += [f"\nwarning: {warning}" for warning in found["warnings"]]
    return "\n".join(lines)


def _operators(found: dict[str, Any]) -> str:
    rows = [("operator", *found["devices"])]
    for name, row in found["operators"].items():
        forward = found["operators"].get(name.removesuffix("_backward"))
        if not (name.endswith("_backward") and row == forward):
            rows.append((name, *(row[device] for device in found["devices"])))
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]))]
    lines = ["".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    for device, missing in found["devices"].items():
        if any(row[device] == REFERENCE for row in found["operators"].values()):
            why = missing or "fastft has no faster kernel for these yet"
            lines.append(f"{REFERENCE} on {device}: {why}")
        elif missing:
            lines.append(f"{device}: {missing}")
    return "\n".join(lines)
