"""The CUDA C++ kernels, proven without a GPU: run on the host, compiled for every architecture."""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p.stem for p in (ROOT / "kernels" / "cuda").glob("*.cu"))
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# Registers a thread may use; more would leave multiprocessors short of blocks.
REGISTERS = {"cross_entropy": 64, "decode_attention": 128, "quantized_linear": 128}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


@functools.cache
def nvcc() -> str | None:
    """The compiler on PATH, or that of NVIDIA's wheels."""
    wheels = (Path(p) / "nvidia" / "cu13" / "bin" / "nvcc" for p in sys.path)
    return shutil.which("nvcc") or next((str(p) for p in wheels if p.exists()), None)


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def sanitizer() -> str | None:
    """The address sanitizer's library; the compiler repeats the name of one it does not have."""
    if shutil.which(compiler()[0]) is None:
        return None
    path = run(*compiler(), "-print-file-name=libasan.so").stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.mark.parametrize("file", FILES)
def test_emulated(file, tmp_path):
    asan = sanitizer()
    if asan is None:
        pytest.skip(f"{compiler()[0]} with the address sanitizer is not installed")
    # Fibers change the stack under the compiler, and packs of 16 bytes alias every element type.
    flags = ["-O1", "-g", "-std=c++17", "-fno-strict-aliasing", "-fvisibility=hidden"]
    built = run(
        *compiler(), *flags, "-fsanitize=address", "-fPIC", "-shared", "-I", "tests/cuda",
        "-x", "c++", f"kernels/cuda/{file}.cu", "-o", str(tmp_path / f"{file}.so"),
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-4000:]
    libraries = run(*compiler(), "-print-file-name=libstdc++.so").stdout.strip()
    done = run(
        sys.executable, "-m", "pytest", "-q", f"tests/cuda/test_{file}.py",
        # The sanitizer's own words go past Python, to the real standard error.
        "-p", "no:cacheprovider", "--capture=sys",
        "-o", "pythonpath=tests/cuda tests/kernels tests .",
        FASTFT_EMULATED=str(tmp_path), LD_PRELOAD=f"{asan} {libraries}", OMP_NUM_THREADS="1",
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]


# Each takes ten seconds or more: the oldest, Hopper and the newest always, others when asked.
@pytest.mark.parametrize(
    "architecture",
    [n if n in (75, 90, 120) else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES],
)
@pytest.mark.parametrize("file", FILES)
def test_compiles_without_spills(file, architecture, tmp_path):
    if nvcc() is None:
        pytest.skip("nvcc is not installed: neither a CUDA toolkit nor the wheel nvidia-cuda-nvcc")
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    done = run(
        nvcc(), "-O3", "-std=c++17", code, "-Xptxas", "-v", "-cubin",
        f"kernels/cuda/{file}.cu", "-o", str(tmp_path / "kernel.cubin"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", done.stderr)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert registers and len(spilled) >= len(registers)
    assert all(found == ("0", "0") for found in spilled), done.stderr[-3000:]
    assert max(registers) <= REGISTERS[file], registers
