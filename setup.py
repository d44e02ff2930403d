"""Builds fastft._C with torch.utils.cpp_extension against the torch that is already installed.

csrc/*.cpp speak PyTorch's stable ABI, so one binary serves every torch from 2.11 on; csrc/cpu/*.cpp
are torch-free and compiled once per instruction set. Without a compiler the package installs
pure-Python, and `fastft doctor` says so. CXX, CFLAGS, CXXFLAGS and LDFLAGS are honoured.

Where torch is a CUDA build, or TORCH_CUDA_ARCH_LIST names architectures ("8.0;9.0+PTX", or "usual"
for all of CUDA_ARCHITECTURES that nvcc knows), nvcc adds kernels/cuda/*.cu, torch-free too, and
csrc/cuda/*.cpp binds them. The extension still loads on a torch without CUDA: the runtime is linked
in, and PyTorch's CUDA library is found when it is there.
"""

import os
import platform
import re
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
    ISA_FLAGS["avx512vnni"] = [*ISA_FLAGS["avx512"], "-mavx512vnni"]
CXX_FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-g0"]
DEFINES = ["-DFASTFT_X86"] if X86 else []
# What nvcc compiles for where neither the environment nor a GPU tells.
CUDA_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
# The runtime goes into the extension: a torch without CUDA has none to share.
CUDA_LINK = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
# Asking for metadata or a source distribution needs neither torch nor a compiler.
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


def files(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def compile_kernels(compiler: list[str], folder: Path) -> list[str]:
    """Compiles every torch-free kernel file once per instruction set; returns the objects."""
    headers = files("csrc/*.h") + files("csrc/cpu/*.h")
    shared = max(os.path.getmtime(p) for p in (*headers, "setup.py"))
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


def note(text: str) -> None:
    print(f"fastft: {text}", file=sys.stderr)


def cuda_architectures(torch, nvcc: str | None) -> list[str]:
    """As TORCH_CUDA_ARCH_LIST says; else, for a CUDA torch, this machine's GPUs, else all usual."""
    asked = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,"))
    if asked == ["usual"]:
        return usual_architectures(nvcc)
    if asked != [""]:
        for name in asked:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                sys.exit(
                    f"TORCH_CUDA_ARCH_LIST: expected numbers as in '8.0;9.0+PTX', got {name!r}"
                )
        return asked
    if torch.version.cuda is None:
        return []
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(found)] or usual_architectures(nvcc)


def find_nvcc() -> str | None:
    """CUDA_HOME's, the one on PATH, or the one of NVIDIA's wheels."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    homes += ["/usr/local/cuda", *(f"{path}/nvidia/cu13" for path in sys.path)]
    paths = [f"{home}/bin" for home in homes]
    return shutil.which("nvcc", path=os.pathsep.join([*paths[:1], os.environ["PATH"], *paths[1:]]))


def why_no_cuda(torch, nvcc: str | None) -> str | None:
    """Why the kernels cannot be built for this torch; None where they can."""
    if nvcc is None:
        return "no nvcc"
    if torch.version.cuda is None:
        return None
    # The runtime that is linked in needs a driver of its own major version, as torch's does.
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    major = re.search(r"release (\d+)", told)[1]
    if major != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {major} and torch of CUDA {torch.version.cuda}"
    return None


def usual_architectures(nvcc: str | None) -> list[str]:
    """Of CUDA_ARCHITECTURES, those that this nvcc knows."""
    if nvcc is None:
        return CUDA_ARCHITECTURES
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return [a for a in CUDA_ARCHITECTURES if gencode(a)[0].rpartition("code=")[2] in known]


def toolkit(nvcc: str) -> str:
    """Where the toolkit lies: nvcc on PATH may be a script that calls the real one elsewhere."""
    told = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    ).stderr
    return re.search(r"^#\$ TOP=(.*)$", told, re.MULTILINE)[1]


def gencode(architecture: str) -> list[str]:
    number = architecture.removesuffix("+PTX").replace(".", "")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    if architecture.endswith("+PTX"):
        flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compile_cuda(nvcc: str, architectures: list[str], folder: Path) -> list[str]:
    """Compiles every CUDA file, once, for all architectures; returns the objects."""
    headers = files("kernels/cuda/*.*h") + files("csrc/*.h")
    shared = max(os.path.getmtime(p) for p in (*headers, "setup.py"))
    flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
    flags += [flag for architecture in architectures for flag in gencode(architecture)]
    folder = folder / "-".join(architectures)  # other architectures, other objects
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in files("kernels/cuda/*.cu"):
        out = folder / f"{Path(source).stem}.o"
        if not out.exists() or out.stat().st_mtime < max(shared, os.path.getmtime(source)):
            subprocess.check_call([nvcc, *flags, "-c", source, "-o", str(out)])
        objects.append(str(out))
    return objects


def extension_and_command(torch, cpp_extension) -> dict:
    compiler = shlex.split(cpp_extension.get_cxx_compiler())
    if shutil.which(compiler[0]) is None:
        note(
            f"no C++ compiler ({compiler[0]}): installing without compiled kernels. "
            "`fastft doctor` shows what is missing."
        )
        return {}
    nvcc = find_nvcc()
    architectures = cuda_architectures(torch, nvcc)
    missing = why_no_cuda(torch, nvcc) if architectures else None
    if missing:
        note(f"{missing}: installing without the CUDA C++ kernels; Triton's serve what they can.")
        architectures = []
    libraries = toolkit(nvcc) if architectures else ""
    extension = cpp_extension.CppExtension(
        "fastft._C",
        files("csrc/*.cpp") + (files("csrc/cuda/*.cpp") if architectures else []),
        extra_compile_args=[
            *CXX_FLAGS,
            *DEFINES,
            f"-DTORCH_TARGET_VERSION={TORCH_ABI}",
            f'-DFASTFT_TORCH_ABI="{TORCH_ABI}"',
            f'-DFASTFT_CUDA_ARCHITECTURES="{";".join(architectures)}"',
            "-fvisibility=hidden",
        ],
        extra_link_args=["-fopenmp", *(CUDA_LINK if architectures else [])],
        library_dirs=[f"{libraries}/lib64", f"{libraries}/lib"] if architectures else [],
        # setuptools sees only these when it asks whether a rebuild is due.
        depends=[*files("csrc/**/*.*"), *files("kernels/cuda/*.*"), "setup.py"],
    )

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self):
            folder = Path(self.build_temp).resolve() / "kernels"
            objects = compile_kernels(compiler, folder)
            if architectures:
                objects += compile_cuda(nvcc, architectures, folder)
            self.extensions[0].extra_objects = objects
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
    return extension_and_command(torch, cpp_extension)


# Without isolation nobody else checks this, and Python 3.11 makes environments with an older one.
if int(setuptools.__version__.split(".")[0]) < 71:
    sys.exit("fastft builds with setuptools 71 or later: run `pip install --upgrade setuptools`")
setup(**native_parts())
