"""Compiles the sources for processors other than this one: arm64, and x86 with AVX2 alone.

    make cross          # needs g++-aarch64-linux-gnu; runs the kernels where qemu-user is installed

Every C++ file is compiled with the flags of setup.py and warnings as errors, the bindings against
the headers of the installed torch. Then the kernels are linked and held to plain loops
(tests/cross.cpp), under emulation where the processor is another one.
"""

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Target:
    """What to compile for. One set of instructions, the baseline: nothing is chosen at run time."""

    compilers: tuple[str, ...]  # the first that is here
    flags: tuple[str, ...] = ()
    emulators: tuple[str, ...] = ()  # none: this processor runs it


TARGETS = {
    "arm64": Target(("aarch64-linux-gnu-g++",), emulators=("qemu-aarch64-static", "qemu-aarch64")),
    "avx2": Target(("g++", "c++"), ("-mavx2", "-mfma", "-mf16c")),
}


def setup_names() -> dict:
    """What setup.py defines, without what it runs."""
    path = ROOT / "setup.py"
    names = {"__file__": str(path)}
    source = path.read_text().replace("setup(**native_parts())", "")
    exec(compile(source, str(path), "exec"), names)
    return names


def includes() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    paths = [*include_paths(), sysconfig.get_paths()["include"]]
    return [part for path in paths for part in ("-isystem", path)]


def found(names: tuple[str, ...]) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


def build(target: Target, compiler: str, folder: Path, jobs: int) -> str:
    """Compiles everything and links the check; what it says when it runs."""
    names = setup_names()
    abi = names["TORCH_ABI"]
    common = [compiler, *names["CXX_FLAGS"], *target.flags, "-Werror", "-fPIC"]
    kernels = ["-DFASTFT_ISA=baseline"]
    bindings = [f"-DTORCH_TARGET_VERSION={abi}", f'-DFASTFT_TORCH_ABI="{abi}"', *includes()]
    bindings += ['-DFASTFT_CUDA_ARCHITECTURES=""', "-DTORCH_EXTENSION_NAME=_C"]
    work = [(path, kernels) for path in sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    work += [(path, bindings) for path in sorted(ROOT.glob("csrc/*.cpp"))]
    # Not vectorised: g++ 12 for arm64 fails to, by an error of its own.
    work.insert(0, (ROOT / "tests/cross.cpp", ["-O1"]))

    def compile_one(job: tuple[Path, list[str]]) -> Path:
        source, flags = job
        out = folder / f"{source.parent.name}-{source.stem}.o"
        subprocess.run([*common, *flags, "-c", source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, work))
    program = folder / "check"
    linked = [o for o in objects if o.name.startswith(("cpu-", "tests-")) or o.stem == "csrc-isa"]
    static = ["-static"] if target.emulators else []
    subprocess.run([compiler, "-fopenmp", *static, *linked, "-o", program], check=True)
    said = f"{len(objects)} files compiled"
    emulator = found(target.emulators)
    if target.emulators and emulator is None:
        return f"{said}; not run, as none of {', '.join(target.emulators)} is here"
    command = [emulator, program] if emulator else [program]
    return f"{said}; {subprocess.check_output(command, text=True).strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", choices=TARGETS, help="one target")
    parser.add_argument("--jobs", type=int, default=2, help="files at a time")
    options = parser.parse_args()
    failed = False
    for name, target in TARGETS.items():
        if options.only not in (None, name):
            continue
        compiler = found(target.compilers)
        if compiler is None:
            print(f"{name}: skipped, no {target.compilers[0]} here")
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"{name}: {build(target, compiler, Path(folder), options.jobs)}")
            except subprocess.CalledProcessError as error:
                failed = True
                print(f"{name}: FAILED: {' '.join(map(str, error.cmd))[-300:]}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
