"""train_draft: an ExitHead for a model, trained on the data of its fine-tune.

    loss = 1 - sum over the vocabulary of min(p, q)                  the mean over positions

with p the model's own next-token distribution and q the head's: the chance that a draft drawn from
q is rejected, itself (Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6). On SmolLM2-135M it
left greedy and sampled drafts more often right than cross entropy did, against p or its best token.
It asks what the model says, whatever the text does, so the text needs no labels and the head
follows the fine-tuned model rather than its data. The model stays frozen and runs as
`fastft.generate` runs it, through the fused step: adapters, quantised weights, left-out padding and
roundings are those that drafts will meet.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastft.decode.evaluating import evaluating
from fastft.decode.exit_head import ExitHead, check_fits
from fastft.decode.linears import Unfit
from fastft.decode.prepare import HandOver, inner_model
from fastft.decode.step import FusedStep
from fastft.ops.norm import layer_norm, rms_norm
from fastft.ops.quantized_linear import dequantize

IGNORED = -100
# Logits that are held at once: 64 MB in float32, and a few times that for their gradient.
CHUNK = 2**24


@dataclass(frozen=True)
class Row:
    """Token ids, and at which of them the head learns what comes next."""

    ids: list[int]
    wanted: list[bool]


class DraftTrainer:
    """Trains an ExitHead from hidden states and logits that the caller has, such as a fine-tune's:

        out = model(**batch, output_hidden_states=True)
        trainer.step(out.hidden_states[head.exit_layer][labelled], out.logits[labelled])

    Raises: ValueError for a model the fused step does not cover, or a head of another model.
    """

    def __init__(self, model: nn.Module | FusedStep, head: ExitHead, lr: float = 2e-3) -> None:
        self.target = model if isinstance(model, FusedStep) else decoding_step(model)
        check_fits(head, self.target)
        self.head = head.to(self.target.device)
        self.optimizer = torch.optim.Adam(head.parameters(), lr=lr, betas=(0.9, 0.99))

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the head for the hidden states (n, hidden) at the exit: (n, its vocabulary)."""
        fused = self.target.fused
        first, x = fused.layers[0], self.head(hidden.float())
        norm = self.head.norm(fused.final_norm, first.offset)
        if first.center:
            x = layer_norm(x, norm.weight, norm.bias, first.eps)
        else:
            x = rms_norm(x, norm.weight, first.eps, offset=first.offset)
        rows = self.head.rows(fused.head)
        y = linear(x, dequantize(rows.weight), None if rows.bias is None else rows.bias.float())
        adapter = rows.adapters[0] if rows.adapters else None
        if adapter is not None:
            y = y + linear(linear(x, adapter.a.float()), adapter.b.float()) * adapter.scale
        return y

    def step(self, hidden: Tensor, logits: Tensor | Callable[[slice], Tensor]) -> float:
        """One step of Adam; returns the loss, the share of drafts rejected.

        Args:
            hidden: (n, hidden) behind the first `exit_layer` layers.
            logits: (n, vocabulary) of the model at the same positions, or what gives those of a
                slice of them, so that they need not exist all at once.
        """
        if hidden.dim() != 2 or not len(hidden):
            raise ValueError(f"hidden: expected (n, hidden), got {tuple(hidden.shape)}")
        if isinstance(logits, Tensor) and len(logits) != len(hidden):
            raise ValueError(f"logits: expected {len(hidden)} rows, got {len(logits)}")
        of = logits if callable(logits) else logits.__getitem__
        size, total = max(CHUNK // self.target.vocabulary, 1), 0.0
        self.optimizer.zero_grad()
        for begin in range(0, len(hidden), size):
            part = slice(begin, begin + size)
            with torch.no_grad():
                p = of(part).float().softmax(-1)
                if self.head.vocabulary is not None:
                    p = p.index_select(-1, self.head.vocabulary)
            with torch.enable_grad():
                q = self.logits(hidden[part].detach()).softmax(-1)
                loss = (len(p) - torch.minimum(p, q).sum()) / len(hidden)
                loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        return total


def train_draft(
    model: nn.Module,
    data: Iterable[Any],
    *,
    exit_layer: int | None = None,
    rank: int = 64,
    vocabulary: int | None = 8192,
    steps: int = 200,
    lr: float = 2e-3,
    batch_tokens: int = 1024,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> ExitHead:
    """An ExitHead whose drafts the model, as it is now, accepts; for `fastft.generate`.

    The model is only read: its mode, gradients, hooks and PyTorch's random numbers stay.

    Args:
        model: causal language model that the fused step covers (Llama-type, GPT-2), patched by
            fastft or not, LoRA adapters active or not.
        data: token ids as lists or tensors, or dicts with input_ids and perhaps attention_mask and
            labels, of one text or a batch. Masked tokens are left out; with labels, the head learns
            where they are not -100. Read until steps * batch_tokens tokens are there, then reused.
        exit_layer: layers a draft runs through; None: a fifth of them, so that with the reduced
            head a drafted token reads about a fifth of the weights. A draft of one token pays where
            it is accepted more often than the share of the weights it reads.
        vocabulary: how many ids it drafts, the most frequent ones in data; None: all.
        batch_tokens: of a step; texts are cut to as many.
        progress: called with the number of each step, from 0 on, and the share it rejects.
    Raises: ValueError that names the argument.
    """
    for name, value in {"steps": steps, "batch_tokens": batch_tokens}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    target = decoding_step(model)
    layers, hidden = len(target.fused.layers), target.fused.embedding.shape[1]
    if exit_layer is None:
        exit_layer = max(round(layers / 5), 1)
    if not 1 <= exit_layer < layers:
        raise ValueError(f"exit_layer: expected 1 to {layers - 1}, got {exit_layer}")
    longest = min(batch_tokens, target.most_positions or batch_tokens)
    rows = list(_read(data, longest, steps * batch_tokens))
    if not any(any(row.wanted) for row in rows):
        raise ValueError("data: expected texts with labels that are not all -100, got none")
    ids = _most_frequent(rows, vocabulary, target.vocabulary)
    generator = torch.Generator().manual_seed(seed)
    head = ExitHead(hidden, exit_layer, rank, ids, generator)
    trainer = DraftTrainer(target, head, lr)
    for number, batch in zip(range(steps), _batches(rows, batch_tokens, seed), strict=False):
        for group in trainer.optimizer.param_groups:
            group["lr"] = lr * (1 - number / steps)
        loss = trainer.step(*_states(target, batch, exit_layer))
        if progress is not None:
            progress(number, loss)
    return head.requires_grad_(False)


def decoding_step(model: nn.Module) -> FusedStep:
    """The step that decodes the model, also while it is in training mode.

    Raises: ValueError where there is none, with the reason.
    """
    try:
        inner = inner_model(model)
        with torch.no_grad(), evaluating(inner):
            return FusedStep(inner)
    except (Unfit, HandOver) as unfit:
        raise ValueError(f"model: an ExitHead cannot draft for it: {unfit}") from unfit


def _read(data: Iterable[Any], longest: int, tokens: int) -> Iterator[Row]:
    """The texts of data, until they hold so many tokens."""
    for item in data:
        for row in _rows(item):
            row = Row(row.ids[:longest], row.wanted[:longest])
            if any(row.wanted):
                yield row
                tokens -= len(row.ids)
        if tokens <= 0:
            return


def _rows(item: Any) -> Iterator[Row]:
    given = item if isinstance(item, Mapping) else {"input_ids": item}
    if "input_ids" not in given:
        raise ValueError(f"data: expected dicts with input_ids, got one with {sorted(given)}")
    ids = torch.as_tensor(given["input_ids"])
    if ids.dim() not in (1, 2) or (ids.numel() and ids.is_floating_point()):
        raise ValueError(f"data: expected token ids, got {ids.dtype} of shape {tuple(ids.shape)}")
    shape, given = ids.shape, {name: given.get(name) for name in ("attention_mask", "labels")}
    kept = torch.ones(shape) if given["attention_mask"] is None else given["attention_mask"]
    labels = torch.zeros(shape) if given["labels"] is None else given["labels"]
    kept, labels = torch.as_tensor(kept).bool(), torch.as_tensor(labels)
    if kept.shape != shape or labels.shape != shape:
        raise ValueError(
            f"data: expected attention_mask and labels of the shape {tuple(shape)} of input_ids, "
            f"got {tuple(kept.shape)} and {tuple(labels.shape)}"
        )
    for row, keep, label in zip(*map(torch.atleast_2d, (ids, kept, labels)), strict=True):
        # A label is what its token is to be; what is learned stands at the token before.
        after = (label[keep][1:] != IGNORED).tolist()
        tokens = row[keep].tolist()
        yield Row(tokens, [*after, given["labels"] is None][: len(tokens)])


def _most_frequent(rows: list[Row], wanted: int | None, every: int) -> Tensor | None:
    """(n,) ids by their number in rows; among equals the lower, in BPE the more frequent one."""
    ids = torch.tensor([i for row in rows for i in row.ids])
    if int(ids.min()) < 0 or int(ids.max()) >= every:
        raise ValueError(
            f"data: token ids {int(ids.min())} to {int(ids.max())}, the model has {every}"
        )
    if wanted is None or wanted >= every:
        return None
    if wanted < 1:
        raise ValueError(f"vocabulary: expected at least 1, got {wanted}")
    counts = ids.bincount(minlength=every)
    return counts.argsort(descending=True, stable=True)[:wanted].sort().values


def _batches(rows: list[Row], tokens: int, seed: int) -> Iterator[list[Row]]:
    """Without end: the rows in random order, as many at a time as hold so many tokens."""
    random = Random(seed)
    while True:
        batch: list[Row] = []
        held = 0
        for row in random.sample(rows, len(rows)):
            if batch and held + len(row.ids) > tokens:
                yield batch
                batch, held = [], 0
            batch.append(row)
            held += len(row.ids)
        yield batch


@torch.no_grad()
def _states(step: FusedStep, batch: list[Row], exit_layer: int) -> Any:
    """Of the wanted positions: hidden states at the exit, and the model's logits of a slice."""
    ids = [row.ids for row in batch]
    wanted = torch.tensor([w for row in batch for w in row.wanted], device=step.device)
    for layer, x in enumerate(step.states(step.new_cache(len(ids), max(map(len, ids))), ids), 1):
        if layer == exit_layer:
            hidden = x[wanted]
    final = x[wanted]
    return hidden, lambda part: step._head(final[part])
