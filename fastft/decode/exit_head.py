"""ExitHead: drafts from a model's own first layers, through a small trained head.

    h = the hidden state behind the first `exit_layer` layers
    logits = head(norm(h + scale * (h A^T) B^T))      A (rank, hidden), B (hidden, rank)

norm and head are the model's own, so what is trained is as small as a LoRA adapter. The first
layers' keys and values are those of the verification itself: a drafted token costs the first layers
and the head, and nothing is computed twice. Self-speculation by early exit: Elhoushi et al. 2024
(LayerSkip, arXiv 2404.16710), which trains the whole model for it; here it stays as it is.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from fastft.decode.step import FusedStep


class ExitHead(nn.Module):
    """A residual low-rank correction of the hidden state at the exit; `train_draft` trains it."""

    def __init__(self, hidden: int, exit_layer: int, rank: int = 64):
        super().__init__()
        if exit_layer < 1 or rank < 1:
            raise ValueError(
                f"exit_layer, rank: expected at least 1 each, got {exit_layer} and {rank}"
            )
        self.exit_layer, self.rank = exit_layer, rank
        self.a = nn.Parameter(torch.randn(rank, hidden) * hidden**-0.5)
        self.b = nn.Parameter(torch.zeros(hidden, rank))  # at first the plain early exit

    def forward(self, hidden: Tensor) -> Tensor:  # (..., hidden)
        x = hidden.to(self.a.dtype)
        return (x + (x @ self.a.t()) @ self.b.t()).to(hidden.dtype)

    def step(self, target: FusedStep) -> "ExitStep":
        return ExitStep(self, target)

    def save(self, path) -> None:
        """Writes the head as safetensors."""
        from safetensors.torch import save_file

        save_file(
            {"a": self.a.detach().contiguous(), "b": self.b.detach().contiguous()},
            path, {"exit_layer": str(self.exit_layer)},
        )  # fmt: skip

    @staticmethod
    def load(path) -> "ExitHead":
        """Reads what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            a, b = file.get_tensor("a"), file.get_tensor("b")
            head = ExitHead(a.shape[1], int(file.metadata()["exit_layer"]), a.shape[0])
        head.a.data, head.b.data = a, b
        return head


class ExitStep(FusedStep):
    """The first layers of a fused step, over the same cache."""

    def __init__(self, head: ExitHead, target: FusedStep):
        if not isinstance(target, FusedStep):
            raise ValueError("speculation: an ExitHead needs a model that decoder_layer covers")
        if head.exit_layer >= len(target.fused.layers):
            raise ValueError(
                f"speculation: an exit behind layer {head.exit_layer} of a model of "
                f"{len(target.fused.layers)}"
            )
        if head.a.shape[1] != target.fused.embedding.shape[1]:
            raise ValueError(
                f"speculation: an ExitHead for a hidden size of {head.a.shape[1]}, the model has "
                f"{target.fused.embedding.shape[1]}"
            )
        first = replace(target.fused, layers=target.fused.layers[: head.exit_layer])
        self._set(first)
        self.adapter_of, self.head = target.adapter_of, head.to(target.device)

    def _head(self, hidden: Tensor) -> Tensor:
        return super()._head(self.head(hidden))
