"""What csrc/module.cpp defines."""

from typing import TypedDict

class BuildInfo(TypedDict):
    instruction_sets: list[str]
    instruction_set: str
    intel: bool
    compiler: str
    torch_abi: str
    cuda_architectures: list[str]

def build_info() -> BuildInfo: ...
def limit_isa(name: str) -> str: ...
