"""From logits to tokens: processors, and greedy or random choice, as transformers makes them."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from fastft.decode.prepare import Prepared

# Processors that read scores alone: all rows and draft positions may be given to them at once.
_MEMORYLESS = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper",
        "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper",
        "InfNanRemoveLogitsProcessor", "LogitNormalization", "SuppressTokensLogitsProcessor",
    )
    if hasattr(logits_process, name)
)  # fmt: skip
# Those that read a row's tokens too, but know nothing of its place in the batch.
_ROWWISE = tuple(
    getattr(logits_process, name)
    for name in (
        "RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor",
        "SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor", "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor",
        "ExponentialDecayLengthPenalty", "WatermarkLogitsProcessor",
    )
    if hasattr(logits_process, name)
)  # fmt: skip


def _of_row(processor: Any, row: int) -> Any:
    """The processor for one row of the batch it was made for."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor) or len(ignored) == 1:
        return processor
    own = copy.copy(processor)
    own.prompt_ignore_length = ignored[row : row + 1]
    return own


def best(scores: Tensor) -> list[int]:
    """Of every row the token of the largest score: the first of equal ones, NaN the largest."""
    # NumPy's search uses vectors; PyTorch's took 0.1 ms of a step of 5 ms.
    if scores.is_cpu and scores.dtype is torch.float32:
        out: list[int] = scores.numpy().argmax(-1).tolist()
        return out
    return scores.argmax(-1).tolist()


class Chooser:
    """The processors and the choice of one call; `ids` are its rows as transformers shows them,
    up to `ends`, which the loop moves on."""

    def __init__(
        self, prepared: Prepared, ids: Tensor, ends: list[int], generator: torch.Generator | None
    ) -> None:
        self.processors: Any = prepared.processors  # which say LongTensor, a type of the past
        self.sample = prepared.config.do_sample
        self.ids, self.ends, self.generator = ids, ends, generator
        self.memoryless = all(type(p) in _MEMORYLESS for p in self.processors)
        rowwise = _MEMORYLESS + _ROWWISE
        self.rowwise = len(ids) == 1 or all(type(p) in rowwise for p in self.processors)
        self.all_scores: Tensor | None = None

    def together(self, active: list[int], logits: Tensor, end: int) -> tuple[Tensor, list[int]]:
        """Scores and tokens of the unfinished rows, which are all `end` long.

        Finished rows keep their last scores and are drawn again, and thrown away, so that sampling
        takes the random numbers transformers takes.
        """
        rows = len(self.ids)
        if self.all_scores is None or len(active) == rows:
            self.all_scores = logits
        else:
            self.all_scores = self.all_scores.index_copy(
                0, torch.tensor(active, device=logits.device), logits
            )
        scores = self.all_scores
        if len(self.processors):
            scores = self.processors(self.ids[:, :end], self.all_scores.clone())
        if not self.sample:
            tokens = best(scores)
        else:
            chances = scores.softmax(-1)
            tokens = torch.multinomial(chances, 1, generator=self.generator)[:, 0].tolist()
        return scores[active] if len(active) < rows else scores, [tokens[row] for row in active]

    def scores(self, rows: list[int], logits: Tensor, behind: list[list[int]]) -> Tensor:
        """Processed logits (n, vocabulary); behind[i]: drafted tokens that follow row rows[i]."""
        if not len(self.processors):
            return logits
        if self.memoryless:
            found: Tensor = self.processors(self.ids[:1, :1], logits.clone())
            return found
        out = []
        for i, (row, tokens) in enumerate(zip(rows, behind, strict=True)):
            history = self.ids[row, : self.ends[row]]
            if tokens:
                history = torch.cat((history, history.new_tensor(tokens)))
            out.append(self._alone(row, history, logits[i]))
        return torch.cat(out)

    def _alone(self, row: int, history: Tensor, logits: Tensor) -> Tensor:
        """Processed logits (1, vocabulary) of one row with tokens history (length,)."""
        if self.rowwise:
            processors: Any = LogitsProcessorList(_of_row(p, row) for p in self.processors)
            out: Tensor = processors(history[None], logits[None].clone())
            return out
        # What goes by a row's place in the batch finds it there.
        rows = len(self.ids)
        all_rows = self.processors(history.repeat(rows, 1), logits.repeat(rows, 1))
        of_row: Tensor = all_rows[row : row + 1]
        return of_row

    def pick(self, scores: Tensor) -> list[int]:
        """A token for every row of scores."""
        if not self.sample:
            return best(scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator)[:, 0].tolist()

    def draft(
        self, rows: list[int], logits: Tensor, behind: list[list[int]]
    ) -> tuple[list[int], list[Tensor | None]]:
        """A drafted token for each row, and the probabilities it was drawn with."""
        scores = self.scores(rows, logits, behind)
        if not self.sample:
            return best(scores), [None] * len(rows)
        q = scores.softmax(-1)
        tokens = torch.multinomial(q, 1, generator=self.generator)[:, 0].tolist()
        return tokens, list(q)
