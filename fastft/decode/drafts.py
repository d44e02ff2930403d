"""Where drafts come from: the row's own text, a draft model, or the model's own first layers.

All have one interface. `offer` says how many tokens a row could draft and of what kind, `draft`
makes those that were chosen, `advance` tells which tokens the row really took.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft.decode.prompt_lookup import PromptLookup

# A step takes up to 16 tokens of a row in one tile: the last one and these.
MOST = 15


@dataclass
class Draft:
    tokens: list[int]
    q: Tensor | None = None  # (tokens, vocabulary) probabilities it was sampled with


class LookupDrafts:
    """n-grams of the row's own text: see prompt_lookup.py."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.lookup = PromptLookup()
        for row, tokens in enumerate(rows):
            self.lookup.extend(row, tokens)

    def offer(self, row: int, most: int) -> tuple[int, int]:
        suffix = self.lookup.suffix(row)
        return (most if suffix else 0), suffix.bit_length()

    def draft(self, lengths: dict[int, int]) -> dict[int, Draft]:
        return {row: Draft(self.lookup.draft(row, n)) for row, n in lengths.items()}

    def advance(self, row: int, tokens: list[int]) -> None:
        self.lookup.extend(row, tokens)

    def drop(self, row: int) -> None:
        self.lookup.drop(row)


class StepDrafts:
    """Token by token from another decode step: that of a draft model, or of the first layers.

    With `shared` the step reads and writes the target's own cache, whose slots the verification
    writes anew: then nothing is computed twice for the tokens that were accepted.
    """

    def __init__(
        self,
        step: Any,
        rows: list[list[int]],
        choose: Callable[..., Any],
        cache: Any = None,
    ) -> None:
        self.step, self.choose = step, choose
        self.tokens = [list(row) for row in rows]
        self.shared = cache is not None
        self.cache = cache if self.shared else step.new_cache(len(rows), max(map(len, rows)) + 64)

    def offer(self, row: int, most: int) -> tuple[int, int]:
        if self.step.most_positions is not None:
            most = min(most, self.step.most_positions - len(self.tokens[row]))
        return max(most, 0), 0

    def draft(self, lengths: dict[int, int]) -> dict[int, Draft]:
        before = list(self.cache.lengths)
        drafts = {row: Draft([]) for row in lengths}
        chances: dict[int, list[Tensor]] = {row: [] for row in lengths}
        for i in range(max(lengths.values(), default=0)):
            active = [row for row, n in lengths.items() if n > i]
            new: list[list[int]] = [[] for _ in before]
            for row in active:
                new[row] = drafts[row].tokens[-1:] if i else self.tokens[row][before[row] :]
            scores = self.step(self.cache, new)
            chosen = self.choose(active, scores, [drafts[row].tokens for row in active])
            for row, token, q in zip(active, *chosen, strict=True):
                drafts[row].tokens.append(token)
                if q is not None:
                    chances[row].append(q)
        for row, qs in chances.items():
            drafts[row].q = torch.stack(qs) if qs else None
        if self.shared:
            self.cache.set_lengths(before)
        return drafts

    def advance(self, row: int, tokens: list[int]) -> None:
        known = len(self.tokens[row])
        self.tokens[row] += tokens
        if not self.shared:
            # All but the last token were accepted from the draft, if they were drafted.
            kept = min(self.cache.lengths[row], known + len(tokens) - 1)
            self.cache.roll_back(row, kept)

    def drop(self, row: int) -> None:
        pass
