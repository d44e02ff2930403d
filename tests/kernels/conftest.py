"""Triton kernels run interpreted on the CPU, from this tree; tests/test_kernels.py starts them.

The interpreter takes the place of the compiler when a kernel is defined, so these tests have a
process of their own, with TRITON_INTERPRET set. It rounds and multiplies bfloat16 wrongly, so
kernels are tried here in float32 and float16; bfloat16 is compiled, and run on GPUs.
"""

import os

from bench.gpu.tree import load_kernels

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]

load_kernels()
