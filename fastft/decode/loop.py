"""The loop of `fastft.generate`: rounds of one pass each, until every row has ended.

Each round feeds every unfinished row its last token and its draft, and takes what the model's own
choices confirm. Without drafts the rows go in step, and processors and criteria see the batch as
transformers shows it; with drafts they see one row at a time.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastft.decode.acceptance import accept_sampled
from fastft.decode.cache import KVCache
from fastft.decode.cache_name import own_name
from fastft.decode.choice import Chooser
from fastft.decode.cuda_graph import fused_step
from fastft.decode.draft_length import DraftLength
from fastft.decode.drafts import MOST, LookupDrafts, StepDrafts
from fastft.decode.exit_head import ExitHead
from fastft.decode.linears import Unfit
from fastft.decode.modules import ModuleStep
from fastft.decode.output import GenerateOutput, Kept, Stats
from fastft.decode.peak_memory import peak
from fastft.decode.prepare import Prepared, inner_model

# Slots of a row taken at first; most answers end long before the length they may have.
ROOM = 512


class Run:
    """One call, from its prompts to its output."""

    def __init__(
        self,
        model: nn.Module,
        prepared: Prepared,
        step: Any,
        stats: Stats,
        speculation: Any,
        seed: int | None,
    ) -> None:
        self.given, self.step, self.stats = prepared, step, stats
        rows, width = prepared.input_ids.shape
        self.width = width
        device = prepared.input_ids.device
        self.ids = torch.full((rows, prepared.max_length), prepared.pad, device=device)
        self.ids[:, :width] = prepared.input_ids
        self.ends = [width] * rows
        self.active = [row for row in range(rows) if width < prepared.max_length]
        self._check_positions()
        self.cache = self._cache(rows)
        self.pending = [p[n:] for p, n in zip(prepared.prompts, self.cache.lengths, strict=True)]
        self.generator = None
        if seed is not None:
            self.generator = torch.Generator(step.device).manual_seed(seed)
        self.chooser = Chooser(prepared, self.ids, self.ends, self.generator)
        config = prepared.config
        asked = config.return_dict_in_generate
        self.scores = Kept(rows) if asked and config.output_scores else None
        self.logits = Kept(rows) if asked and config.output_logits else None
        stats.rows, stats.prompt_tokens = rows, sum(map(len, prepared.prompts))
        stats.drafted, stats.accepted = [0] * rows, [0] * rows
        self.lengths = DraftLength()
        self.drafts = self._drafts(model, speculation)

    def _check_positions(self) -> None:
        given, most = self.given, self.step.most_positions
        longest, new = max(map(len, given.prompts)), given.max_length - self.width
        # A prompt that fits may still end in time, where something can end it.
        surely = min(new, 1) if given.eos or given.criteria else new
        # The last new token is never fed, so it needs no position.
        if most is not None and surely and longest + surely - 1 > most:
            raise ValueError(
                f"max_new_tokens: {longest} tokens of the prompt and {new} new ones exceed the "
                f"model's {most} positions"
            )

    def _cache(self, rows: int) -> Any:
        given = self.given
        longest = max(map(len, given.prompts))
        room = longest + min(given.max_length - self.width, ROOM) + MOST
        if given.cache is None:
            return self.step.new_cache(rows, room)
        cache, like = given.cache, self.step.new_cache(rows, 1).layers
        if len(cache.layers) != len(like):
            raise ValueError(f"{own_name()}: expected {len(like)} layers, got {len(cache.layers)}")
        keys = like[0].keys
        if not any(cache.lengths):
            cache.reserve(room)
            cache.allocate(rows, keys.shape[1], keys.shape[3], keys.dtype, keys.device)
            return cache
        held = cache.layers[0].keys
        if (held.shape[0], held.shape[1], held.shape[3]) != (rows, keys.shape[1], keys.shape[3]):
            raise ValueError(
                f"{own_name()}: expected (rows, heads, slots, head_dim) of "
                f"{(rows, keys.shape[1], 'any', keys.shape[3])}, got {tuple(held.shape)}"
            )
        if (held.dtype, held.device) != (keys.dtype, keys.device):
            raise ValueError(
                f"{own_name()}: expected {keys.dtype} on {keys.device}, got {held.dtype} on "
                f"{held.device}"
            )
        cache.keep_common(given.prompts)
        cache.reserve(room)
        return cache

    def _drafts(self, model: nn.Module, speculation: Any) -> Any:
        if speculation is None or not self.active:
            return None
        prompts = self.given.prompts
        if isinstance(speculation, str):
            self.stats.speculation = speculation
            return LookupDrafts(prompts)
        if isinstance(speculation, ExitHead):
            self.stats.speculation = "the model's own first layers"
            step, cache = speculation.step(self.step), self.cache
        else:
            self.stats.speculation = f"draft model {type(speculation).__name__}"
            step, cache = draft_step(inner_model(speculation)), None
        if step.vocabulary != self.step.vocabulary:
            raise ValueError(
                f"speculation: expected a draft of the model's vocabulary of "
                f"{self.step.vocabulary}, got {step.vocabulary}"
            )
        return StepDrafts(step, prompts, self.chooser.draft, cache)

    def rounds(self) -> Iterator[list[list[int]]]:
        """Runs to the end; yields the new tokens of each row, round by round."""
        while self.active:
            first = not self.stats.prefill_seconds
            started = time.perf_counter()
            # Not around the yield: what the caller does between rounds keeps its gradients.
            with torch.no_grad():
                new = self._round(first)
            self._synchronize()
            if first:
                self.stats.prefill_seconds = time.perf_counter() - started
            else:
                self.stats.decode_seconds += time.perf_counter() - started
                self.stats.steps += 1
            yield new

    def _synchronize(self) -> None:
        if self.step.device.type == "cuda":
            torch.cuda.synchronize(self.step.device)

    def _round(self, first: bool) -> list[list[int]]:
        before = list(self.cache.lengths)
        new: list[list[int]] = [[] for _ in self.ends]
        fed = [0] * len(self.ends)
        try:
            drafts, kinds = ({}, {}) if first or self.drafts is None else self._draft()
            taken = self._verify(drafts, first)
            fed = [len(self.pending[row]) if row in taken else 0 for row in range(len(fed))]
            self._append({row: tokens for row, (_, tokens) in taken.items()}, new)
        finally:
            # Also when something is raised, the cache holds the beginning of each row.
            for row, length in enumerate(before):
                held = length + fed[row] + max(len(new[row]) - 1, 0)
                if held < self.cache.lengths[row]:
                    self.cache.roll_back(row, held)
                self.cache.tokens[row] += self.pending[row][: fed[row]] + new[row][:-1]
        for row, (accepted, _) in taken.items():
            for kept in filter(None, (self.scores, self.logits)):
                kept.cut(row, self.ends[row] - self.width)
            self.pending[row] = new[row][-1:]
            if self.drafts is not None:
                if row in drafts:
                    drafted = len(drafts[row].tokens)
                    self.stats.count(row, drafted, min(accepted, len(new[row])))
                    self.lengths.observe(row, drafted, accepted, kinds[row])
                self.drafts.advance(row, new[row])
                if row not in self.active:
                    self.lengths.drop(row)
                    self.drafts.drop(row)
        return new

    def _draft(self) -> Any:
        """The drafts of this round by row, and their kinds."""
        offers = []
        for row in self.active:
            most = min(MOST, self.given.max_length - self.ends[row] - 1)
            if self.step.most_positions is not None:
                most = min(most, self.step.most_positions - self.cache.lengths[row] - 1)
            offers.append((row, *self.drafts.offer(row, max(most, 0))))
        chosen = self.lengths.choose(offers)
        lengths = {row: n for (row, _, _), n in zip(offers, chosen, strict=True) if n}
        started = time.perf_counter()
        drafts = self.drafts.draft(lengths) if lengths else {}
        if lengths:
            self.lengths.observe_draft(max(lengths.values()), time.perf_counter() - started)
        return drafts, {row: kind for row, _, kind in offers}

    def _verify(self, drafts: dict[int, Any], first: bool) -> dict[int, tuple[int, list[int]]]:
        """Row -> how many drafted tokens are accepted, and the tokens it takes."""
        feed: list[list[int]] = [[] for _ in self.ends]
        for row in self.active:
            feed[row] = self.pending[row] + (drafts[row].tokens if row in drafts else [])
            need, most = self.cache.lengths[row] + len(feed[row]), self.step.most_positions
            if most is not None and need > most:
                raise ValueError(
                    f"max_new_tokens: row {row} has not ended in the model's {most} positions"
                )
        started = time.perf_counter()
        longest = max((len(d.tokens) for d in drafts.values()), default=0)
        logits = self.step(self.cache, feed, longest + 1)
        taken = self._take(logits, drafts)
        if self.drafts is not None and not first:
            self._synchronize()
            self.lengths.observe_step(sum(map(len, feed)), time.perf_counter() - started)
        return taken

    def _take(self, logits: Tensor, drafts: dict[int, Any]) -> dict[int, tuple[int, list[int]]]:
        if not drafts:
            if self.drafts is None:
                scores, tokens = self.chooser.together(
                    self.active, logits, self.ends[self.active[0]]
                )
            else:
                scores = self.chooser.scores(self.active, logits, [[]] * len(self.active))
                tokens = self.chooser.pick(scores)
            self._keep(self.active, logits, scores)
            return {row: (0, [token]) for row, token in zip(self.active, tokens, strict=True)}
        guesses = {row: drafts[row].tokens if row in drafts else [] for row in self.active}
        rows = [row for row, guess in guesses.items() for _ in range(len(guess) + 1)]
        behind = [guess[:i] for guess in guesses.values() for i in range(len(guess) + 1)]
        scores = self.chooser.scores(rows, logits, behind)
        counts = [len(guess) + 1 for guess in guesses.values()]
        own = dict(zip(guesses, scores.split(counts), strict=True))
        if self.given.config.do_sample:
            taken = self._sample(own, guesses, drafts)
        else:
            taken = {}
            for row, guess in guesses.items():
                best = self.chooser.pick(own[row])
                accepted = 0
                while accepted < len(guess) and best[accepted] == guess[accepted]:
                    accepted += 1
                taken[row] = accepted, [*guess[:accepted], best[accepted]]
        for row, given in zip(guesses, logits.split(counts), strict=True):
            most = taken[row][0] + 1
            self._keep([row] * most, given[:most], own[row][:most])
        return taken

    def _sample(
        self, scores: dict[int, Tensor], guesses: dict[int, list[int]], drafts: dict[int, Any]
    ) -> dict[int, tuple[int, list[int]]]:
        """Accepts drafts by chance, all of one length at once; scores[row] (n + 1, vocabulary)."""
        taken = {}
        for n in sorted({len(guess) for guess in guesses.values()}):
            rows = [row for row, guess in guesses.items() if len(guess) == n]
            draft = torch.tensor([guesses[row] for row in rows], dtype=torch.long)
            q = None
            if n and drafts[rows[0]].q is not None:
                q = torch.stack([drafts[row].q for row in rows])
            stacked = torch.stack([scores[row] for row in rows])
            accepted, tokens = accept_sampled(stacked, draft.to(stacked.device), q, self.generator)
            for row, a, token in zip(rows, accepted.tolist(), tokens.tolist(), strict=True):
                if token < 0:
                    raise ValueError(f"scores: expected numbers and a finite maximum in row {row}")
                taken[row] = a, [*guesses[row][:a], token]
        return taken

    def _keep(self, rows: list[int], logits: Tensor, scores: Tensor) -> None:
        for kept, values in ((self.scores, scores), (self.logits, logits)):
            if kept is not None:
                kept.add(rows, values)

    def _append(self, tokens: dict[int, list[int]], new: list[list[int]]) -> None:
        """Puts tokens behind their rows, and into `new`, until a row ends."""
        given = self.given
        done = set()
        for row, own in tokens.items():
            for token in own:
                end = self.ends[row]
                self.ids[row, end] = token
                self.ends[row] = end + 1
                new[row].append(token)
                if token in given.eos or end + 1 >= given.max_length:
                    done.add(row)
                if given.criteria and self.drafts is not None:
                    scores = self.scores and self.scores.of(row, end + 1 - self.width)
                    shown = self.ids[row : row + 1, : end + 1]
                    if bool(given.criteria(shown, scores).all()):
                        done.add(row)
                if row in done:
                    break
        if given.criteria and self.drafts is None:
            shown = self.ids[:, : self.ends[self.active[0]]]
            ended = given.criteria(shown, self.scores and self.scores.columns()).tolist()
            done |= {row for row in self.active if ended[row]}
        self.active = [row for row in self.active if row not in done]

    def output(self) -> GenerateOutput:
        self.stats.new_tokens = sum(self.ends) - self.width * len(self.ends)
        self.stats.cuda_graphs = getattr(self.step, "report", None)
        self.stats.peak_memory = peak(self.step.device)
        make: Any = GenerateOutput  # whose annotations say LongTensor, and one tensor a tuple
        made: GenerateOutput = make(
            sequences=self.ids[:, : max(self.ends)],
            scores=self.scores and self.scores.columns(),
            logits=self.logits and self.logits.columns(),
            stats=self.stats,
            **{own_name(): self.cache if isinstance(self.cache, KVCache) else None},
        )
        return made


def draft_step(model: nn.Module) -> Any:
    """Raises: ValueError for a model that cannot draft."""
    try:
        return fused_step(model)
    except Unfit:
        pass
    try:
        return ModuleStep(model)
    except Unfit as unfit:
        raise ValueError(f"speculation: no draft model: {unfit}") from unfit
