"""ExitHead: drafts from a model's own first layers, through a small trained head.

    h = the hidden state behind the first `exit_layer` layers                        (hidden,)
    logits = head(norm(h + (h A^T) B^T) * gain)[vocabulary]     A (rank, hidden), B (hidden, rank)

norm and head are the model's own, so what is trained is as small as a LoRA adapter. The first
layers' keys and values are those of the verification itself: a drafted token costs the first layers
and the rows of the head that `vocabulary` keeps, and nothing is computed twice. Those rows matter:
of SmolLM2-135M's 538 MB in float32 a layer is 14 and the whole head 113, 8192 rows of it 19.
A token outside is never drafted, which costs acceptance and nothing else.

Self-speculation by early exit: Elhoushi et al. 2024 (LayerSkip, arXiv 2404.16710), which trains the
whole model for it; here it stays as it is. Reduced draft vocabulary: Zhao et al. 2025 (FR-Spec,
arXiv 2502.14856).
"""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastft.decode.step import FusedStep
from fastft.ops.decoder_layer import Linear, NormWeight
from fastft.ops.quantized_linear import Adapter, QuantizedWeight

# Logit of a token outside the vocabulary: its chance is 0, yet it stays finite, because processors
# may rule out every token inside, and a softmax of -inf alone is NaN.
OUTSIDE = -1e30


class ExitHead(nn.Module):
    """A low-rank correction of the hidden state at the exit; `train_draft` trains it.

    Args:
        hidden: the model's hidden size.
        exit_layer: how many of the model's layers a draft runs through.
        rank: of the correction.
        vocabulary: (n,) int64, ascending, the token ids it may draft; None: all.
        generator: for the first values of A; None: PyTorch's.
    Raises: ValueError that names the argument.
    """

    vocabulary: Tensor | None

    def __init__(
        self,
        hidden: int,
        exit_layer: int,
        rank: int = 64,
        vocabulary: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if exit_layer < 1 or rank < 1:
            raise ValueError(
                f"exit_layer, rank: expected at least 1 each, got {exit_layer} and {rank}"
            )
        if vocabulary is not None:
            _check_vocabulary(vocabulary)
        self.exit_layer, self.rank = exit_layer, rank
        self.a = nn.Parameter(torch.randn(rank, hidden, generator=generator) * hidden**-0.5)
        self.b = nn.Parameter(torch.zeros(hidden, rank))  # at first the plain early exit
        self.gain = nn.Parameter(torch.ones(hidden))
        self.register_buffer("vocabulary", vocabulary)

    def forward(self, hidden: Tensor) -> Tensor:  # (..., hidden)
        """What the model's final norm is given."""
        x = hidden.to(self.a.dtype)
        return (x + (x @ self.a.t()) @ self.b.t()).to(hidden.dtype)

    def norm(self, norm: NormWeight, offset: float = 0.0) -> NormWeight:
        """The model's final norm times the gain; offset is what the norm adds to its weight."""
        weight = self.gain if norm.weight is None else (offset + norm.weight) * self.gain
        bias = None if norm.bias is None else norm.bias * self.gain
        return NormWeight(weight - offset, bias)

    def rows(self, head: Linear) -> Linear:
        """The model's head for the vocabulary: a copy of its rows, made anew at each call."""
        ids = self.vocabulary
        if ids is None:
            return head
        if int(ids[-1]) >= head.weight.shape[0]:
            raise ValueError(
                f"speculation: an ExitHead drafts token {int(ids[-1])} of a model of "
                f"{head.weight.shape[0]}"
            )
        ids = ids.to(head.weight.values.device)
        held, scale = head.weight, head.weight.scale
        weight = QuantizedWeight(held.values[ids], None if scale is None else scale[ids])
        adapters = tuple(
            adapter and Adapter(adapter.a, adapter.b[ids], adapter.scale)
            for adapter in head.adapters
        )
        return Linear(weight, None if head.bias is None else head.bias[ids], adapters)

    def step(self, target: FusedStep) -> "ExitStep":
        return ExitStep(self, target)

    def save(self, path: str | Path) -> None:
        """Writes the head as safetensors."""
        from safetensors.torch import save_file

        tensors = {name: t.detach().contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, path, {"exit_layer": str(self.exit_layer)})

    @staticmethod
    def load(path: str | Path) -> "ExitHead":
        """Reads what `save` wrote.

        Raises: ValueError for another file.
        """
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            exit_layer = (file.metadata() or {}).get("exit_layer")
        if exit_layer is None or held.keys() - {"vocabulary"} != {"a", "b", "gain"}:
            raise ValueError(f"{path}: expected a saved ExitHead, got tensors {sorted(held)}")
        rank, hidden = held["a"].shape
        head = ExitHead(hidden, int(exit_layer), rank, held.get("vocabulary"), torch.Generator())
        head.to(held["a"].dtype).load_state_dict(held)
        return head


def _check_vocabulary(vocabulary: Tensor) -> None:
    if vocabulary.dim() != 1 or vocabulary.dtype != torch.long or not len(vocabulary):
        raise ValueError(
            f"vocabulary: expected ids (n,) of torch.int64, got {vocabulary.dtype} of shape "
            f"{tuple(vocabulary.shape)}"
        )
    if int(vocabulary[0]) < 0 or not bool((vocabulary[1:] > vocabulary[:-1]).all()):
        raise ValueError("vocabulary: expected ids that ascend from 0 on, each once")


def check_fits(head: ExitHead, target: FusedStep) -> None:
    """Raises: ValueError unless the head is one for this model."""
    layers, hidden = len(target.fused.layers), target.fused.embedding.shape[1]
    if head.exit_layer >= layers:
        raise ValueError(
            f"speculation: an exit behind layer {head.exit_layer} of a model of {layers}"
        )
    if head.a.shape[1] != hidden:
        raise ValueError(
            f"speculation: an ExitHead for a hidden size of {head.a.shape[1]}, the model has "
            f"{hidden}"
        )


class ExitStep(FusedStep):
    """The first layers of a fused step, over the same cache."""

    def __init__(self, head: ExitHead, target: FusedStep) -> None:
        if not isinstance(target, FusedStep):
            raise ValueError("speculation: an ExitHead needs a model that decoder_layer covers")
        check_fits(head, target)
        # The caller's head stays on its device.
        self.head = deepcopy(head).to(target.device).requires_grad_(False)
        whole = target.fused
        self._set(
            replace(
                whole,
                layers=whole.layers[: head.exit_layer],
                final_norm=self.head.norm(whole.final_norm, whole.layers[0].offset),
                head=self.head.rows(whole.head),
            )
        )
        self.adapter_of, self.vocabulary = target.adapter_of, target.vocabulary

    def _head(self, hidden: Tensor) -> Tensor:
        scores = super()._head(self.head(hidden))
        if self.head.vocabulary is None:
            return scores
        every = scores.new_full((len(scores), self.vocabulary), OUTSIDE)
        every[:, self.head.vocabulary] = scores
        return every
