"""Compiles every configuration of one file of kernels/triton for every architecture, without a GPU.

    python tests/kernels/ahead_of_time.py norm

prints one JSON line per kernel, configuration and architecture: registers, spilled bytes (the local
memory a thread asks for), shared memory; or the compiler's error. Everything is compiled as it is
for aligned rows, which usual models have, and every second form for rows of which nothing is known.
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from bench.gpu.tree import load_kernels  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and local memory of the kernel in a compiled object."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]) + int(found.get("LOCAL", 0)),
    }


def compile_one(job) -> dict:
    configuration, architecture, aligned = job
    stack = configuration.aligned_stack if aligned else configuration.stack
    row = {
        "kernel": configuration.kernel.__name__,
        "configuration": configuration.label + (" aligned" if aligned else ""),
        "architecture": architecture,
        "limits": (configuration.registers, stack),
    }
    constants = dict(configuration.constants)
    signature = {**configuration.signature, **dict.fromkeys(constants, "constexpr")}
    # Triton wants the arguments in the order of the function's parameters.
    signature = {name: signature[name] for name in configuration.kernel.arg_names}
    multiples = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if aligned and (kind.startswith("*") or name in configuration.multiples)
    }
    try:
        compiled = triton.compile(
            ASTSource(configuration.kernel, signature, constants, multiples),
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": configuration.warps, "num_stages": configuration.stages},
        )
    except Exception as error:  # whatever the compiler says is the result
        return {**row, "error": f"{type(error).__name__}: {error}"[:500]}
    return {**row, **resources(compiled.asm["cubin"]), "shared": compiled.metadata.shared}


def main(file: str) -> None:
    load_kernels()
    module = __import__(f"fastft.kernels.{file}", fromlist=["configurations"])
    forms = [(c, a) for c in module.configurations() for a in c.architectures]
    jobs = [(*form, True) for form in forms]
    jobs += [(*form, False) for form in forms[::2] if form[0].stack is not None]
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(compile_one, jobs):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
