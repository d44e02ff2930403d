"""Sizes of the models that are measured, and toy ones that run through the same code."""

from dataclasses import dataclass, replace

from bench.gpu.case import Here


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    family: str = "llama"
    tied: bool = False
    tokens: int = 8192

    def here(self, here: Here) -> "Shape":
        if not here.toy:
            return self
        return replace(
            self, hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, head_dim=16,
            vocab=320, tokens=64,
        )  # fmt: skip


QWEN_05B = Shape("Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 64, 151_936, "qwen2", tied=True)
LLAMA_1B = Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, 128_256, tied=True)
LLAMA_8B = Shape("Llama-3-8B", 4096, 14_336, 32, 32, 8, 128, 128_256)
GEMMA_2B = Shape("Gemma-2-2B", 2304, 9216, 26, 8, 4, 256, 256_000)
RANK = 16

# Sequences that fill 8,192 tokens, as packing gives them.
PACKED = (2048, 1536, 1024, 1024, 768, 512, 512, 256, 256, 128, 64, 64)


def packed(here: Here) -> list[int]:
    return [8, 24, 1, 31] if here.toy else list(PACKED)
