"""The least time a LoRA step could take here: its matrix products at the rate this machine has.

Counted per step over real tokens n and labelled tokens m, with multiply and add as two operations:

    base linear, frozen    forward 2 n in out, gradient of the input 2 n in out
    LoRA of rank r on it   forward 2 n r (in + out), both gradients twice that
    head, frozen           forward 2 m h V, gradient of the input 2 m h V
    causal attention       forward 2 len^2 H d per sequence, backward twice that

Gradients of the first layer's inputs are left out, and so are padding and ignored labels. The bytes
are the frozen weights, read in forward and in backward. The larger of the two times is the floor.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.foreign import ForeignModule
from fastft.ops.gemm import matmul


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second, measured: float32 operations, bytes read."""

    operations: float
    bytes: float


def measure(seconds: float = 0.4) -> Rates:
    """The best of several runs: a floor must not be too high because the machine was busy."""
    x, w = torch.randn(1024, 1536) * 0.03, torch.randn(1536, 1536) * 0.03
    many = torch.ones(1 << 26)
    rate = 2 * x.shape[0] * w.numel() / min(_best(f, seconds, x, w) for f in (matmul, torch.mm))
    return Rates(rate, many.numel() * 4 / _best(torch.sum, seconds, many))


def _best(function: Callable[..., Any], seconds: float, *args: Any) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        function(*args)
        best = min(best, time.perf_counter() - start)
    return best


def operations(model: ForeignModule, batch: dict[str, Tensor]) -> int:
    """Operations of one step's matrix products, for a PEFT LoRA model."""
    lengths = batch["attention_mask"].sum(1)
    tokens = int(lengths.sum())
    # The label of a position is the next token, so the first column is never asked for.
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    head = model.get_output_embeddings()
    total = 4 * labelled * head.weight.numel()
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if base is not None:
            # Nothing below the first layer learns: not all of it needs the gradient of its input.
            inputs = 0 if ".0." in name else 1
            rank = sum(module.r[adapter] for adapter in module.active_adapters)
            total += 2 * (1 + inputs) * tokens * base.weight.numel()
            total += 2 * (2 + inputs) * tokens * rank * sum(base.weight.shape)
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    squares = int(lengths.square().sum())
    width = config.num_attention_heads * head_dim
    out: int = total + 6 * squares * width * config.num_hidden_layers
    return out


def weight_bytes(model: ForeignModule) -> int:
    """Bytes of the weights a step reads, once forward and once backward."""
    weights = {
        module.base_layer.weight for module in model.modules() if hasattr(module, "base_layer")
    }
    weights.add(model.get_output_embeddings().weight)
    out: int = 2 * sum(weight.numel() * weight.element_size() for weight in weights)
    return out


def seconds(model: nn.Module, batch: dict[str, Tensor], rates: Rates) -> float:
    """The floor of one step on this batch."""
    return max(operations(model, batch) / rates.operations, weight_bytes(model) / rates.bytes)
