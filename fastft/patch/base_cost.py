"""What a base of eight bits costs on a batch, against the original weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastft.foreign import ForeignModule
from fastft.ops.quantized_layer import computing, kind_of, quantized_layers


@dataclass(frozen=True)
class BaseCost:
    """Pairs are of the original weights and of those of eight bits, on the batch's own tokens."""

    kind: str  # of base_weights
    loss: tuple[float, float]
    perplexity: tuple[float, float] | None  # of causal language models
    cosines: dict[str, float]  # of each trainable tensor's two gradients

    def __str__(self) -> str:
        name, (before, now) = "loss", self.loss
        if self.perplexity is not None:
            name, (before, now) = "perplexity", self.perplexity
        change = f" ({100 * (now / before - 1):+.2f} %)" if before else ""
        line = (
            f"{f'{self.kind} base':<12}{name} {now:.4g}{change} where the original weights give "
            f"{before:.4g}"
        )
        if not self.cosines:
            return line
        worst = min(self.cosines, key=self.cosines.__getitem__)
        mean = sum(self.cosines.values()) / len(self.cosines)
        return (
            f"{line}\n            cosine of gradients {mean:.4f}, smallest "
            f"{self.cosines[worst]:.4f}, {worst}"
        )


def base_cost(
    model: nn.Module, batch: Mapping[str, Any], run: Callable[..., Any]
) -> BaseCost | None:
    """None where the original weights of a layer are not kept.

    run(model, batch) gives loss, scores and the gradients by name. While the original weights are
    computed with they are held, as much memory as the base took in floating point.
    """
    kind = kind_of(model)
    if kind is None or any(layer.origin is None for layer in quantized_layers(model)):
        return None
    with computing(model, "original"):
        wanted = run(model, batch)
    got = run(model, batch)
    before, after = (_perplexity(model, batch, scores) for _, scores, _ in (wanted, got))
    return BaseCost(
        kind,
        (float(wanted[0]), float(got[0])),
        None if before is None or after is None else (before, after),
        {
            name: float(F.cosine_similarity(got[2][name].flatten(), grad.flatten(), 0))
            for name, grad in wanted[2].items()
            if name in got[2] and grad.any()
        },
    )


def _perplexity(model: ForeignModule, batch: Mapping[str, Any], scores: Tensor) -> float | None:
    """e^(mean loss of the next token) over the tokens of a causal language model's batch."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # A model that can generate and is no encoder-decoder predicts the next token.
    if not getattr(inner, "can_generate", bool)() or not isinstance(ids, Tensor):
        return None
    if inner.config.is_encoder_decoder or scores.shape[:-1] != ids.shape:
        return None
    with torch.no_grad():
        targets = ids if mask is None else ids.masked_fill(mask == 0, -100)
        loss = F.cross_entropy(scores[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())
    return math.exp(float(loss))
