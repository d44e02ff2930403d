"""Builds fastft._C with torch.utils.cpp_extension against the torch that is already installed.

csrc/*.cpp speak PyTorch's stable ABI, so one binary serves every torch from 2.11 on; csrc/cpu/*.cpp
are torch-free and compiled once per instruction set. Without a compiler the package installs
pure-Python, and `fastft doctor` says so.
"""

import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# 2.11.0, in the form the stable headers want it.
TORCH_ABI = "0x020b000000000000"
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {"baseline": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq"))]
CXX_FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-g0"]
DEFINES = ["-DFASTFT_X86"] if X86 else []

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    if "bdist_wheel" in sys.argv or "build_ext" in sys.argv or "editable_wheel" in sys.argv:
        sys.exit(
            "fastft builds against the torch you use: install torch >= 2.11 first, then run "
            "`pip install --no-build-isolation .`"
        )
    torch = cpp_extension = None


def compile_kernels(compiler: str, folder: Path) -> list[str]:
    """Compiles every torch-free kernel file once per instruction set; returns the objects."""
    headers = max(p.stat().st_mtime for p in ROOT.glob("csrc/cpu/*.h"))
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(job: tuple[Path, str]) -> str:
        source, isa = job
        out = folder / f"{source.stem}.{isa}.o"
        if not out.exists() or out.stat().st_mtime < max(headers, source.stat().st_mtime):
            flags = [*CXX_FLAGS, *ISA_FLAGS[isa], *DEFINES, f"-DFASTFT_ISA={isa}", "-fPIC"]
            subprocess.check_call([compiler, *flags, "-c", str(source), "-o", str(out)])
        return str(out)

    jobs = [(source, isa) for source in sorted(ROOT.glob("csrc/cpu/*.cpp")) for isa in ISA_FLAGS]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(compile_one, jobs))


def extension_and_command():
    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*.cpp"))
    extension = cpp_extension.CppExtension(
        "fastft._C",
        sources,
        # pybind11 is a build requirement where torch does not ship its headers.
        extra_compile_args=[
            *CXX_FLAGS,
            *DEFINES,
            f"-DTORCH_TARGET_VERSION={TORCH_ABI}",
            f'-DFASTFT_TORCH_ABI="{TORCH_ABI}"',
            "-fvisibility=hidden",
        ],  # fmt: skip
        extra_link_args=["-fopenmp"],
        # setuptools sees only these when it asks whether a rebuild is due.
        depends=[str(p) for p in (*ROOT.glob("csrc/**/*.*"), ROOT / "setup.py")],
    )

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self):
            compiler = cpp_extension.get_cxx_compiler()
            self.extensions[0].extra_objects = compile_kernels(
                compiler, Path(self.build_temp).resolve() / "kernels"
            )
            super().build_extensions()

    return [extension], {"build_ext": BuildExtension.with_options(use_ninja=True)}


def has_compiler() -> bool:
    compiler = cpp_extension.get_cxx_compiler()
    try:
        subprocess.check_output([compiler, "--version"], stderr=subprocess.STDOUT)
    except (OSError, subprocess.CalledProcessError):
        print(
            f"fastft: no C++ compiler ({compiler}): installing without CPU kernels. "
            "`fastft doctor` shows what is missing.",
            file=sys.stderr,
        )
        return False
    return True


extensions, commands = [], {}
if torch is not None and has_compiler():
    extensions, commands = extension_and_command()
setup(ext_modules=extensions, cmdclass=commands)
