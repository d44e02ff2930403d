"""The most memory that was held so far: by the process, or on a GPU by PyTorch."""

import resource
import sys
from pathlib import Path

import torch


def peak(device: torch.device) -> int:
    """Bytes: what PyTorch held on a CUDA device, else what this process held in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_of_process()


def peak_of_process() -> int:
    """The most bytes this process ever held in memory."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux that starts at what the parent held when it started this process.
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
