"""Where the real tokens of a padded batch lie, and what the forward running in this thread is told.

The tokens of all rows are laid end to end as one row, (1, tokens): `cu_seqlens` keeps them apart.
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_state = threading.local()


def in_force(config: Any) -> "Call | None":
    """The forward of the base model with this configuration, if it runs innermost in this thread.

    What one model was told means nothing to another one that runs inside of it.
    """
    call = None if torch.compiler.is_compiling() else getattr(_state, "call", None)
    return call if call is not None and call.owner.config is config else None


@contextmanager
def during(**told: Any) -> Iterator[None]:
    before = dict(vars(_state))
    vars(_state).update(told)
    try:
        yield
    finally:
        vars(_state).clear()
        vars(_state).update(before)


def kept() -> AbstractContextManager[None]:
    """Inside, base models compute padded places as well."""
    return during(kept=True)


def keeps_padding() -> bool:
    return getattr(_state, "kept", False)


@dataclass
class Selection:
    """Asks a base model for the states of some places alone; keeps what it would have given.

    owner: the base model.
    places: (n,) into the flattened batch; None with an output: that is given again.
    """

    owner: nn.Module
    places: Tensor | None
    output: Any = None
    taken: bool = False

    def of(self, output: Any) -> Any:
        """The output of a base model with the states of the places, (1, n, hidden)."""
        assert self.places is not None  # who has none is given the output, and not asked
        self.output = copy.copy(output)
        states = output.last_hidden_state.flatten(0, 1)
        output.last_hidden_state = states[self.places.to(states.device)][None]
        return output


def take_selection(owner: nn.Module) -> Selection | None:
    """What is asked of this base model, given once: of the call that its head makes."""
    found = None if torch.compiler.is_compiling() else getattr(_state, "selection", None)
    if found is None or found.owner is not owner or found.taken:
        return None
    found.taken = True
    out: Selection | None = found
    return out


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a (batch, length) batch lie."""

    batch: int
    length: int
    places: Tensor  # (tokens,) into the flattened batch
    cu_seqlens: Tensor  # (batch + 1,) int32
    longest: int

    @staticmethod
    def of(attention_mask: Tensor) -> "Packing | None":
        """None if there is nothing to leave out, or nothing left."""
        real = attention_mask.bool()
        places = real.flatten().nonzero().flatten()
        if places.numel() in (0, real.numel()):
            return None
        lengths = real.sum(1, dtype=torch.int32)
        cu_seqlens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        batch, length = real.shape
        return Packing(batch, length, places, cu_seqlens, int(lengths.max()))

    def pack(self, x: Tensor) -> Tensor:
        """(batch, length, …) -> (1, tokens, …)"""
        return x.flatten(0, 1)[self.places.to(x.device)][None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, tokens, …) -> (batch, length, …), zero where there was padding."""
        out = x.new_zeros(self.batch * self.length, *x.shape[2:])
        return out.index_copy(0, self.places, x[0]).view(self.batch, self.length, *x.shape[2:])

    def has_gaps(self) -> bool:
        """Padding between the tokens of a row, which would shorten distances when left out."""
        row = self.places // self.length
        return bool(((row[1:] == row[:-1]) & (self.places.diff() != 1)).any())

    def starts_late(self) -> bool:
        """A row whose first place is padding, though it has tokens."""
        has_tokens = self.cu_seqlens.diff() > 0
        first = self.places[self.cu_seqlens[:-1][has_tokens].long()]
        return bool((first % self.length != 0).any())

    def attention_arguments(self) -> dict[str, Any]:
        """What transformers' modules hand on to their attention."""
        return {
            "cu_seq_lens_q": self.cu_seqlens, "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.longest, "max_length_k": self.longest,
        }  # fmt: skip

    def columns(self) -> Tensor:
        """(1, tokens): the position each token had in its row."""
        return (self.places % self.length)[None]


@dataclass
class Call:
    """One forward of a base model, and what its parts are told."""

    owner: nn.Module
    packing: Packing | None = None  # then no mask is wanted
    encoder_packs: bool = False  # a child of the owner does, and finds the packing where masks are
    weights: bool = False  # attention weights are asked for
    has_grad: bool = field(default_factory=torch.is_grad_enabled)
    recomputes: bool = False  # some of it will run again in backward

    def note_checkpoint(self) -> None:
        """Called from within: gradients are off there alone where reentrant checkpointing is."""
        self.recomputes |= self.has_grad and not torch.is_grad_enabled()
