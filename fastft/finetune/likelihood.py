"""Classification by a language model's own words: the label whose text is likeliest after a prompt.

log p(label | prompt) = sum over the label's tokens of log p(token | what is before it)

Every text is computed as far as it is alone: once what all texts begin with (instructions, fixed
examples), once each prompt, and then only the labels, on a key-value cache. Nothing is padded on
the left, so positions, masks and windows are those of each text alone.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.decode.cache_name import own_name
from fastft.finetune import UserError
from fastft.foreign import ForeignModule

# Content-free inputs of Zhao et al. 2021, in the place of the text.
CONTENT_FREE = ("N/A", "[MASK]", "")
# Tokens of a prompt that may be computed once for each label, so that more prompts make a batch.
SPREAD = 16


@dataclass(frozen=True)
class _Row:
    """One prompt with every label: the tokens of each whole text, scored from position start."""

    number: int
    texts: list[list[int]]
    start: int


@torch.no_grad()
def score(
    model: nn.Module,
    encode: Callable[[str], list[int]],
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda done: None,
) -> Tensor:
    """(prompts, labels) float64: log p(answers[i][c] | prompts[i]), in nats.

    Prompt and answer are tokenized as one text. All answers of a prompt are scored from the first
    token at which one of their texts departs from the prompt's own tokens.

    Args:
        model: causal language model of transformers, patched or not, with adapters or without.
        encode: a text's ids (`Prompter.ids`).
        answers: one list of texts for each prompt, of the same length and not empty.
        batch_size: texts in a forward pass.
        progress: called with the number of prompts that were done.
    Raises: UserError for an answer without tokens, a text longer than the model takes, and a model
        that keeps no key-value cache.
    """
    model.eval()
    rows = [_row(i, encode, p, a) for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]
    if not rows:
        return torch.empty(0, 0, dtype=torch.float64)
    _check_length(model, rows)
    rows.sort(key=lambda row: row.start)
    scores = torch.empty(len(rows), len(rows[0].texts), dtype=torch.float64)
    device = next(model.parameters()).device
    # The last token before the first scored one predicts it: it is left to the labels' pass.
    shared = min(_common(text for row in rows for text in row.texts), rows[0].start - 1)
    trunk = None
    if shared:
        trunk = _extend(model, None, torch.tensor([rows[0].texts[0][:shared]], device=device))
    for batch in _batches(rows, max(1, batch_size // len(rows[0].texts))):
        own = batch[0].start - 1
        cache, heads = trunk, [row.texts[0][shared:own] for row in batch]
        if own > shared:
            cache = _extend(model, _repeated(trunk, [0] * len(batch)), _ids(heads, device))
        elif trunk is not None:
            cache = _repeated(trunk, [0] * len(batch))
        flat = [(i, text) for i, row in enumerate(batch) for text in row.texts]
        found = []
        for at in range(0, len(flat), batch_size):
            part = flat[at : at + batch_size]
            tails = [text[own:] for _, text in part]
            branch = _repeated(cache, [i for i, _ in part])
            logits, _ = _forward(model, branch, _ids([t[:-1] for t in tails], device))
            starts = [batch[i].start - own for i, _ in part]
            found += _sums(logits, tails, starts)
        for i, row in enumerate(batch):
            count = len(row.texts)
            scores[row.number] = torch.tensor(found[i * count : (i + 1) * count])
        progress(len(batch))
    return scores


def calibrate(scores: Tensor, content_free: Tensor) -> Tensor:
    """Contextual calibration (Zhao et al. 2021, "Calibrate Before Use"): log q, (rows, labels).

    q_c is proportional to p_c / p̄_c, where p̄_c is the mean over content-free inputs of p_c: what
    the prompt alone makes a label likely by is taken out. Their W = diag(p̄)^-1, b = 0; q is made to
    sum to 1.

    Args:
        scores: (rows, labels) log p of the rows' texts.
        content_free: (inputs, labels), or (rows, inputs, labels) where examples differ by row.
    """
    means = content_free.logsumexp(-2)  # up to a constant, which cancels
    return (scores - means).log_softmax(-1)


def _row(
    number: int, encode: Callable[..., list[int]], prompt: str, answers: Sequence[str]
) -> _Row:
    asked = encode(prompt)
    texts = [encode(prompt + answer) for answer in answers]
    start = min(_common((asked, text)) for text in texts)
    for answer, text in zip(answers, texts, strict=True):
        if len(text) <= start:
            raise UserError(f"the label {answer!r} has no token of its own behind the prompt")
    if start == 0:
        raise UserError(
            "the prompt has no token before the label, and this model's texts begin with none"
        )
    return _Row(number, texts, start)


def _check_length(model: nn.Module, rows: list[_Row]) -> None:
    longest = max(len(text) for row in rows for text in row.texts)
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and longest + _learned_prompt(model) > most:
        raise UserError(
            f"a prompt with its label has {longest} tokens, the model takes {most}: "
            "fewer shots, or shorter texts"
        )


def _common(texts: Iterable[list[int]]) -> int:
    """How many tokens all of them begin with."""
    texts = list(texts)
    low, high = min(texts), max(texts)  # the first and the last in order differ first
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))


def _batches(rows: list[_Row], size: int) -> Iterator[list[_Row]]:
    """Rows in order of length, so that cutting a batch to its shortest prompt costs little."""
    batch: list[_Row] = []
    for row in rows:
        if len(batch) == size or (batch and row.start - batch[0].start > SPREAD):
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _ids(rows: list[list[int]], device: torch.device | None) -> Tensor:
    """(rows, longest), filled on the right, where nothing that counts can see it."""
    longest = max(map(len, rows))
    # By their own last token: transformers warns of padding tokens that no mask hides.
    filled = [row + row[-1:] * (longest - len(row)) for row in rows]
    return torch.tensor(filled, device=device)


def _repeated(cache: Any, rows: list[int]) -> Any:
    """A cache of these rows of cache, a row any number of times; the given one stays as it is."""
    if cache is None:
        return None
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(torch.tensor(rows, device=chosen.layers[0].keys.device))
    return chosen


def _extend(model: nn.Module, cache: Any, ids: Tensor) -> Any:
    """cache with ids (rows, length) added to what it holds."""
    return _forward(model, cache, ids, keep=1)[1]


def _forward(model: ForeignModule, cache: Any, ids: Tensor, keep: int = 0) -> tuple[Tensor, object]:
    """Logits (rows, length, vocabulary) of ids, or the last keep of them; cache with ids."""
    if cache is not None and _learned_prompt(model):
        # It stands in the cache; PEFT would put it before these tokens again.
        model = model.get_base_model()
    # Named only where there is one: PEFT gives a learned prefix as the cache.
    given = {} if cache is None else {own_name(): cache}
    out = model(input_ids=ids, use_cache=True, logits_to_keep=keep, **given)
    held = getattr(out, own_name(), None)
    if not hasattr(held, "batch_select_indices"):
        raise UserError(
            f"{type(model).__name__} keeps no key-value cache, by which labels are compared"
        )
    # Logits of a learned prompt come first.
    return out.logits[:, -ids.shape[1] :], held


def _learned_prompt(model: nn.Module) -> int:
    """Tokens that a prompt-learning adapter of PEFT puts before every text."""
    settings: Any = getattr(model, "active_peft_config", None)
    return settings.num_virtual_tokens if getattr(settings, "is_prompt_learning", False) else 0


def _sums(logits: Tensor, tails: list[list[int]], starts: list[int]) -> list[float]:
    """log p of each tail from its start: logits (rows, length, vocabulary) predict tail[1:]."""
    sums = []
    for row, tail, start in zip(logits, tails, starts, strict=True):
        chosen = torch.tensor(tail[start:], device=row.device)
        # One row at a time in float32: the whole batch's would be the largest tensor of all.
        logs = row[start - 1 : len(tail) - 1].float().log_softmax(-1)
        sums.append(logs.gather(1, chosen[:, None]).double().sum().item())
    return sums
