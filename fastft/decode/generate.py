"""fastft.generate: what `model.generate` does, by a fused decode step, drafts and a fast cache.

One loop serves greedy decoding and sampling, one row or many, with or without drafts: each round
feeds every unfinished row its last token and its draft, and takes what the model's own choices
confirm. Without drafts the rows go in step, and processors and criteria see them as transformers
shows them; with drafts they see one row at a time.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastft.decode import layers as reading
from fastft.decode.acceptance import accept_sampled
from fastft.decode.choice import Chooser
from fastft.decode.draft_length import DraftLength
from fastft.decode.drafts import MOST, LookupDrafts, StepDrafts
from fastft.decode.exit_head import ExitHead
from fastft.decode.modules import ModuleStep
from fastft.decode.output import GenerateOutput, Stats
from fastft.decode.prepare import HandOver, Prepared, inner_model, own_generate, prepare
from fastft.decode.step import FusedStep

_EXACT = "the bits of every row are those of the row alone, token by token"
_TIES = "tokens are those of the row alone up to ties: widths and masks change roundings"


class Run:
    """One call, from its prompts to its output."""

    def __init__(self, model, prepared: Prepared, step, stats: Stats, speculation, seed):
        self.given, self.step, self.stats = prepared, step, stats
        rows, width = prepared.input_ids.shape
        self.width = width
        device = prepared.input_ids.device
        # One more, so that an answer of no tokens has a place to be refused from.
        self.ids = torch.full((rows, prepared.max_length), prepared.pad, device=device)
        self.ids[:, :width] = prepared.input_ids
        self.ends = [width] * rows
        self.active = [row for row in range(rows) if width < prepared.max_length]
        self.cache = self._cache(rows)
        self.pending = [p[n:] for p, n in zip(prepared.prompts, self.cache.lengths, strict=True)]
        self.generator = None
        if seed is not None:
            self.generator = torch.Generator(step.device).manual_seed(seed)
        self.chooser = Chooser(prepared, self.ids, self.ends, self.generator)
        self.kept_scores: list[list[Tensor]] = [[] for _ in range(rows)]
        self.kept_logits: list[list[Tensor]] = [[] for _ in range(rows)]
        stats.rows, stats.prompt_tokens = rows, sum(map(len, prepared.prompts))
        stats.drafted, stats.accepted = [0] * rows, [0] * rows
        self.lengths = DraftLength()
        self.drafts = self._drafts(model, speculation)

    def _cache(self, rows: int):
        given, longest = self.given, max(map(len, self.given.prompts))
        need = longest + given.max_length - self.width
        if self.step.most_positions is not None and need > self.step.most_positions:
            raise ValueError(
                f"max_new_tokens: {longest} tokens of the prompt and "
                f"{given.max_length - self.width} new ones exceed the model's "
                f"{self.step.most_positions} positions"
            )
        if given.cache is None or not given.cache.lengths:
            return self.step.new_cache(rows, need + MOST)
        cache = given.cache
        if len(cache.lengths) != rows:
            raise ValueError(
                f"past_key_values: expected {rows} rows as inputs have, got {len(cache.lengths)}"
            )
        for row, (length, prompt) in enumerate(zip(cache.lengths, given.prompts, strict=True)):
            if length >= len(prompt):
                raise ValueError(
                    f"past_key_values: row {row} holds {length} tokens, expected fewer than the "
                    f"{len(prompt)} of its input, which begins with them"
                )
        cache.reserve(need + MOST)
        return cache

    def _drafts(self, model, speculation):
        if speculation is None or not self.active:
            return None
        prompts = self.given.prompts
        if isinstance(speculation, str):
            if speculation != "prompt_lookup":
                raise ValueError(
                    "speculation: expected 'prompt_lookup', a draft model, an ExitHead or None, "
                    f"got {speculation!r}"
                )
            self.stats.speculation = "prompt_lookup"
            return LookupDrafts(prompts)
        if isinstance(speculation, ExitHead):
            self.stats.speculation = "the model's own first layers"
            step, cache = speculation.step(self.step), self.cache
        elif isinstance(speculation, nn.Module):
            self.stats.speculation = f"draft model {type(speculation).__name__}"
            step, cache = draft_step(inner_model(speculation)), None
        else:
            raise TypeError(
                "speculation: expected 'prompt_lookup', a draft model, an ExitHead or None, "
                f"got {type(speculation).__name__}"
            )
        if step.vocabulary != self.step.vocabulary:
            raise ValueError(
                f"speculation: expected a draft of the model's vocabulary of "
                f"{self.step.vocabulary}, got {step.vocabulary}"
            )
        return StepDrafts(step, prompts, self.chooser.draft, cache)

    # ---- the loop --------------------------------------------------------------------------------

    def rounds(self) -> Iterator[list[list[int]]]:
        """Runs to the end; yields the new tokens of each row, round by round."""
        with torch.no_grad():
            started = time.perf_counter()
            while self.active:
                first = not self.stats.prefill_seconds
                new = self._round(first)
                self._synchronize()
                now = time.perf_counter()
                if first:
                    self.stats.prefill_seconds = now - started
                else:
                    self.stats.decode_seconds += now - started
                    self.stats.steps += 1
                started = now
                yield new
                started = time.perf_counter()

    def _synchronize(self) -> None:
        if self.step.device.type == "cuda":
            torch.cuda.synchronize(self.step.device)

    def _round(self, first: bool) -> list[list[int]]:
        drafts, kinds = ({}, {}) if first or self.drafts is None else self._draft()
        feed: list[list[int]] = [[] for _ in self.ends]
        for row in self.active:
            feed[row] = self.pending[row] + (drafts[row].tokens if row in drafts else [])
        started = time.perf_counter()
        longest = max((len(d.tokens) for d in drafts.values()), default=0)
        logits = self.step(self.cache, feed, longest + 1)
        taken = self._take(logits, drafts, longest)
        if self.drafts is not None and not first:
            self._synchronize()
            self.lengths.observe_step(sum(map(len, feed)), time.perf_counter() - started)
        new: list[list[int]] = [[] for _ in self.ends]
        for row, (accepted, tokens) in taken.items():
            drafted = len(drafts[row].tokens) if row in drafts else 0
            self.cache.roll_back(row, self.cache.lengths[row] - drafted + accepted)
            new[row] = self._append(row, tokens)
            self.pending[row] = new[row][-1:]
            if self.drafts is not None:
                self.drafts.advance(row, new[row])
                if drafted:
                    self.stats.count(row, drafted, accepted)
                    self.lengths.observe(row, drafted, accepted, kinds[row])
        return new

    def _draft(self):
        """The drafts of this round by row, and their kinds."""
        offers = []
        for row in self.active:
            most = min(MOST, self.given.max_length - self.ends[row] - 1)
            offers.append((row, *self.drafts.offer(row, most)))
        chosen = self.lengths.choose(offers)
        lengths = {row: n for (row, _, _), n in zip(offers, chosen, strict=True) if n}
        started = time.perf_counter()
        drafts = self.drafts.draft(lengths) if lengths else {}
        if lengths:
            self.lengths.observe_draft(max(lengths.values()), time.perf_counter() - started)
        return drafts, {row: kind for row, _, kind in offers}

    def _take(self, logits: Tensor, drafts, longest: int) -> dict[int, tuple[int, list[int]]]:
        """Row -> how many drafted tokens are accepted, and the tokens it takes."""
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
        taken, begin = {}, 0
        for row in self.active:
            guess = drafts[row].tokens if row in drafts else []
            own = logits[begin : begin + len(guess) + 1]
            begin += len(own)
            histories = [guess[:i] for i in range(len(guess) + 1)]
            scores = self.chooser.scores([row] * len(own), own, histories)
            if self.given.config.do_sample:
                q = drafts[row].q if row in drafts else None
                draft = torch.tensor(guess, dtype=torch.long, device=scores.device)
                accepted, token = accept_sampled(scores, draft, q, self.generator)
            else:
                best = self.chooser.pick(scores)
                accepted = 0
                while accepted < len(guess) and best[accepted] == guess[accepted]:
                    accepted += 1
                token = best[accepted]
            taken[row] = accepted, [*guess[:accepted], token]
            self._keep([row] * (accepted + 1), own[: accepted + 1], scores[: accepted + 1])
        return taken

    def _keep(self, rows: Sequence[int], logits: Tensor, scores: Tensor) -> None:
        if self.given.config.return_dict_in_generate:
            for i, row in enumerate(rows):
                if self.given.config.output_scores:
                    self.kept_scores[row].append(scores[i].clone())
                if self.given.config.output_logits:
                    self.kept_logits[row].append(logits[i].clone())

    def _append(self, row: int, tokens: list[int]) -> list[int]:
        """Puts tokens behind a row until it ends; returns those it took."""
        given = self.given
        for i, token in enumerate(tokens):
            end = self.ends[row]
            self.ids[row, end] = token
            self.ends[row] = end + 1
            done = token in given.eos or end + 1 >= given.max_length
            if given.criteria and not done:
                scores = tuple(self.kept_scores[row]) or None
                done = bool(given.criteria(self.ids[row : row + 1, : end + 1], scores).all())
            if done:
                self.active = [other for other in self.active if other != row]
                if self.drafts is not None:
                    self.lengths.drop(row)
                    self.drafts.drop(row)
                return tokens[: i + 1]
        return tokens

    def output(self) -> GenerateOutput:
        self.stats.new_tokens = sum(self.ends) - self.width * len(self.ends)
        self.stats.measure_memory(self.step.device)
        config = self.given.config
        asked = config.return_dict_in_generate
        slots = getattr(self.cache, "slots", None)
        return GenerateOutput(
            sequences=self.ids[:, : max(self.ends)],
            scores=_columns(self.kept_scores) if asked and config.output_scores else None,
            logits=_columns(self.kept_logits) if asked and config.output_logits else None,
            past_key_values=self.cache if slots is None else None,
            stats=self.stats,
        )


def _columns(rows: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Per step (rows, vocabulary), as transformers gives them; zeros behind a row's end."""
    steps = max(map(len, rows))
    blank = torch.zeros_like(next(row[0] for row in rows if row))
    return tuple(
        torch.stack([row[i] if i < len(row) else blank for row in rows]) for i in range(steps)
    )


def draft_step(model: nn.Module):
    try:
        return FusedStep(model)
    except reading.Unfit:
        return ModuleStep(model)


def _begin(model, inputs, generation_config, speculation, seed, adapter_names, kwargs) -> Run:
    """Raises HandOver where transformers must serve the call."""
    inner = inner_model(model)
    if kwargs.get("return_dict_in_generate") is None and (
        kwargs.get("output_scores") or kwargs.get("output_logits")
    ):
        kwargs = kwargs | {"return_dict_in_generate": True}  # our output always is one
    prepared = prepare(inner, inputs, generation_config, kwargs)
    stats = Stats(exact=_EXACT)
    if adapter_names is not None:
        adapter_names = _per_row(inner, adapter_names, prepared)
    try:
        with torch.no_grad():
            step = FusedStep(inner, adapter_names)
        if not step.bit_exact:
            stats.exact = _TIES
    except reading.Unfit as unfit:
        if speculation is None or adapter_names is not None:
            raise HandOver(str(unfit)) from unfit
        try:
            step = ModuleStep(inner)
        except reading.Unfit as other:
            raise HandOver(f"{unfit}; {other}") from other
        if prepared.cache is not None:
            raise HandOver(str(unfit)) from unfit
        stats.path, stats.reason, stats.exact = "modules", str(unfit), _TIES
    if speculation is not None:
        stateful = [type(p).__name__ for p in prepared.processors if type(p).__name__ in _STATEFUL]
        if stateful:
            stats.speculation = f"none: {', '.join(stateful)} keeps a state of its own"
            speculation = None
    return Run(inner, prepared, step, stats, speculation, seed)


# Processors whose scores depend on more than the tokens so far: a draft would leave its mark.
_STATEFUL = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
}


def _per_row(model: nn.Module, names, prepared: Prepared) -> list[str]:
    rows = len(prepared.input_ids)
    names = [names] if isinstance(names, str) else list(names)
    if len(names) != rows:
        if not names or rows % len(names):
            raise ValueError(
                f"adapter_names: expected one for each of {rows} rows, got {len(names)}"
            )
        names = [name for name in names for _ in range(rows // len(names))]
    known = {n for m in model.modules() if hasattr(m, "lora_A") for n in m.lora_A}
    unknown = sorted(set(names) - known - {"__base__"})
    if unknown:
        raise ValueError(f"adapter_names: no adapter {unknown}, the model has {sorted(known)}")
    return names


def generate(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor] | None = None,
    generation_config=None,
    *,
    speculation=None,
    streamer=None,
    seed: int | None = None,
    adapter_names: Sequence[str] | None = None,
    **kwargs: Any,
) -> GenerateOutput:
    """Decodes as `model.generate` does, faster; returns transformers' output and its `stats`.

    Takes what `model.generate` takes: token ids (rows, length) or a tokenizer's output, a
    GenerationConfig and its fields as keywords, processors, criteria, `num_return_sequences`,
    `tokenizer` for stop strings. Greedy decoding and sampling run here, beams and whatever else
    this loop does not do run in `model.generate`, and `stats.path` and `stats.reason` say so.
    Masked tokens are left out wherever they stand, so every row decodes as it would alone; only
    processors see the padding, as they do in transformers.

    Args:
        speculation: "prompt_lookup" drafts from the row's own text, a model of the same vocabulary
            drafts token by token, an `ExitHead` (of `train_draft` in `fastft.decode.train_draft`)
            from the model's own first layers. The tokens, and when sampling their distribution,
            stay the same.
        streamer: of transformers; gets the tokens as they come.
        seed: of a random generator of this call's own; None: PyTorch's.
        adapter_names: the LoRA adapter of each row, "__base__" for none, unmerged.
    Raises: ValueError or TypeError that names the argument.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "generate"):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    try:
        run = _begin(model, inputs, generation_config, speculation, seed, adapter_names, kwargs)
    except HandOver as reason:
        if seed is not None:
            torch.manual_seed(seed)
        return _handed_over(
            model, inputs, generation_config, streamer, adapter_names, speculation, kwargs, reason
        )
    if streamer is not None:
        streamer.put(run.given.input_ids.cpu())
    shown = run.width
    for _ in run.rounds():
        if streamer is not None:
            shown = _show(run, streamer, shown)
    if streamer is not None:
        streamer.end()
    return run.output()


def stream(model: nn.Module, inputs=None, generation_config=None, **kwargs) -> Iterator[list]:
    """`generate` as an iterator: yields each round's new tokens, a list of ids for every row.

    Takes the arguments of `generate` but streamer.
    Raises: as generate, and ValueError for what only `model.generate` does.
    """
    own = {name: kwargs.pop(name, None) for name in ("speculation", "seed", "adapter_names")}
    try:
        run = _begin(model, inputs, generation_config, **own, kwargs=kwargs)
    except HandOver as reason:
        raise ValueError(f"model.generate has no iterator, and serves {reason}") from reason
    yield from run.rounds()


def _show(run: Run, streamer, shown: int) -> int:
    """Gives the streamer the columns that all unfinished rows have reached, one by one."""
    last = min((run.ends[row] for row in run.active), default=max(run.ends))
    for column in range(shown, last):
        streamer.put(run.ids[:, column].cpu())
    return max(shown, last)


def _handed_over(
    model, inputs, generation_config, streamer, adapter_names, speculation, kwargs, reason
) -> GenerateOutput:
    stats = Stats(path="model.generate", reason=str(reason), exact="transformers' own")
    if speculation is not None:
        stats.speculation = f"none: {reason}"
    if isinstance(inputs, Mapping):
        kwargs, inputs = {**inputs, **kwargs}, None
    if adapter_names is not None:
        kwargs = kwargs | {"adapter_names": adapter_names}
    if inputs is not None:
        kwargs = kwargs | {"inputs": inputs}
    started = time.perf_counter()
    serve = own_generate(model)
    out = serve(
        generation_config=generation_config,
        streamer=streamer,
        **(kwargs | {"return_dict_in_generate": True}),
    )
    stats.decode_seconds = time.perf_counter() - started
    stats.rows = len(out.sequences)
    fields = {k: v for k, v in out.items() if k in GenerateOutput.__dataclass_fields__}
    return GenerateOutput(**fields, stats=stats)
