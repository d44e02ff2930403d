"""Builds fastft._C with torch.utils.cpp_extension against the torch that is already installed.

csrc/*.cpp speak PyTorch's stable ABI, so one binary serves every torch from 2.11 on; csrc/cpu/*.cpp
are torch-free and compiled once per instruction set. Without a compiler the package installs
pure-Python, and `fastft doctor` says so. CXX, CFLAGS, CXXFLAGS and LDFLAGS are honoured.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import setup

ROOT = Path(__file__).resolve().parent
# 2.11.0, in the form the stable headers want it.
TORCH_ABI = "0x020b000000000000"
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {"baseline": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq"))]
CXX_FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-g0"]
DEFINES = ["-DFASTFT_X86"] if X86 else []
# Asking for metadata or a source distribution needs neither torch nor a compiler.
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


def files(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def compile_kernels(compiler: list[str], folder: Path) -> list[str]:
    """Compiles every torch-free kernel file once per instruction set; returns the objects."""
    shared = max(os.path.getmtime(p) for p in (*files("csrc/cpu/*.h"), "setup.py"))
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(job: tuple[str, str]) -> str:
        source, isa = job
        out = folder / f"{Path(source).stem}.{isa}.o"
        if not out.exists() or out.stat().st_mtime < max(shared, os.path.getmtime(source)):
            flags = [*CXX_FLAGS, *ISA_FLAGS[isa], *DEFINES, f"-DFASTFT_ISA={isa}", "-fPIC"]
            asked = shlex.split(os.environ.get("CXXFLAGS", ""))
            subprocess.check_call([*compiler, *flags, *asked, "-c", source, "-o", str(out)])
        return str(out)

    # The baseline first: should two objects hold one inline function of the standard library, which
    # optimisation usually leaves in none, the linker keeps the first, that every processor can run.
    jobs = [(source, isa) for isa in ISA_FLAGS for source in files("csrc/cpu/*.cpp")]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(compile_one, jobs))


def extension_and_command(cpp_extension) -> dict:
    compiler = shlex.split(cpp_extension.get_cxx_compiler())
    if shutil.which(compiler[0]) is None:
        print(
            f"fastft: no C++ compiler ({compiler[0]}): installing without CPU kernels. "
            "`fastft doctor` shows what is missing.",
            file=sys.stderr,
        )
        return {}
    extension = cpp_extension.CppExtension(
        "fastft._C",
        files("csrc/*.cpp"),
        extra_compile_args=[
            *CXX_FLAGS,
            *DEFINES,
            f"-DTORCH_TARGET_VERSION={TORCH_ABI}",
            f'-DFASTFT_TORCH_ABI="{TORCH_ABI}"',
            "-fvisibility=hidden",
        ],
        extra_link_args=["-fopenmp"],
        # setuptools sees only these when it asks whether a rebuild is due.
        depends=[*files("csrc/**/*.*"), "setup.py"],
    )

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self):
            folder = Path(self.build_temp).resolve() / "kernels"
            self.extensions[0].extra_objects = compile_kernels(compiler, folder)
            super().build_extensions()

    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


def native_parts() -> dict:
    if not BUILDS.intersection(sys.argv):
        return {}
    needed = "install torch 2.11 or later first, then run `pip install --no-build-isolation .`"
    try:
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        sys.exit(f"fastft builds against the torch you use, and this build sees none: {needed}")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        sys.exit(f"fastft does not work with torch {torch.__version__}: {needed}")
    return extension_and_command(cpp_extension)


# Without isolation nobody else checks this, and Python 3.11 makes environments with an older one.
if int(setuptools.__version__.split(".")[0]) < 71:
    sys.exit("fastft builds with setuptools 71 or later: run `pip install --upgrade setuptools`")
setup(**native_parts())
