"""`python -m bench.gpu`, which `make gpu` runs."""

import sys

try:
    import torch  # noqa: F401
except ModuleNotFoundError:
    sys.exit(f"{sys.executable} has no torch: make gpu PYTHON=a Python with a CUDA build of it")

from bench.gpu.command import main

if __name__ == "__main__":
    sys.exit(main())
