"""What `fastft.generate` returns: transformers' output, and what it cost."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass
class Stats:
    """How one call of `fastft.generate` went.

    path: "decoder_layer" (an operator call per layer), "modules" (the model's own, fast cache) or
    "model.generate", with the reason why not the first. exact: what holds of the tokens.
    """

    path: str = "decoder_layer"
    reason: str | None = None
    exact: str = ""
    # On CUDA: how many passes of the model were replays of a CUDA graph, and what ended them.
    cuda_graphs: str | None = None
    speculation: str | None = None
    rows: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0  # forward passes of the model after the prompts
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafted: list[int] = field(default_factory=list)  # per row
    accepted: list[int] = field(default_factory=list)  # per row
    # Of the drafts that reached a position (1st, 2nd… token), how many were tried and accepted.
    tried_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    peak_memory: int = 0  # bytes: of the process on the CPU, PyTorch's on CUDA

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the tokens after the first of each row."""
        tokens = max(self.new_tokens - self.rows, 0)
        return tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that was accepted."""
        return sum(self.accepted) / max(sum(self.drafted), 1)

    def count(self, row: int, drafted: int, accepted: int) -> None:
        self.drafted[row] += drafted
        self.accepted[row] += accepted
        for counts, most in ((self.tried_at, min(drafted, accepted + 1)),
                             (self.accepted_at, accepted)):  # fmt: skip
            counts.extend([0] * (most - len(counts)))
            for i in range(most):
                counts[i] += 1


class Kept:
    """Scores or logits of one call, collected by row and given by step as transformers does."""

    def __init__(self, rows: int) -> None:
        self.rows: list[list[Tensor]] = [[] for _ in range(rows)]  # of (vocabulary,)
        self.steps: list[Tensor] = []  # of (rows, vocabulary)

    def add(self, rows: list[int], values: Tensor) -> None:
        """values (n, vocabulary), one for each of rows, which may repeat a row."""
        for row, own in zip(rows, values.clone(), strict=True):
            self.rows[row].append(own)

    def cut(self, row: int, length: int) -> None:
        """Forgets what came behind a row's end."""
        del self.rows[row][length:]

    def of(self, row: int, length: int) -> tuple[Tensor, ...]:
        """The first ones of one row, (1, vocabulary) each."""
        return tuple(own[None] for own in self.rows[row][:length])

    def columns(self) -> tuple[Tensor, ...]:
        """Zeros behind a row's end. Between two calls no row may have fallen behind another."""
        for i in range(len(self.steps), max(map(len, self.rows))):
            held = [row[i] if i < len(row) else None for row in self.rows]
            blank = torch.zeros_like(next(own for own in held if own is not None))
            self.steps.append(torch.stack([blank if own is None else own for own in held]))
        return tuple(self.steps)


@dataclass
class GenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' `sequences`, `scores`, `logits` and cache, by its own name, and `stats`."""

    sequences: torch.LongTensor = None  # type: ignore[assignment]  # always given
    stats: Stats | None = None
