"""Learning something new without losing the old: replay, EWC and distillation in `fastft train`.

With w the weights and w* those that the run began with, a step's loss is

    task + ewc / 2 * sum over i of F_i (w_i - w_i*)^2
         + distill * T^2 KL(softmax(z* / T) || softmax(z / T))

F is the diagonal of the Fisher information of the old data (Kirkpatrick et al. 2017, arXiv
1612.00796), z the logits and z* those of the model as it was (Li and Hoiem 2016, arXiv 1606.09282),
T a temperature. Where the new data has classes that the model did not know, the head has rows for
them behind the old ones, and z are the logits of the old classes alone. task and KL are means over
the items (rows, tags, tokens) of the whole step, so accumulated batches are the step that one batch
is; the pull to w* is counted once a step.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastft.finetune import UserError, assets, examples, loading, reading, tasks
from fastft.finetune.data import IGNORED
from fastft.finetune.run_folder import processes

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def old_rows(config: Any) -> dict[str, Any]:
    """The training rows of every file of config.old_data, by its name. Raises: UserError."""
    return {path: reading.splits(path)["train"] for path in config.old_data or ()}


def all_names(names: list[str] | None, old: dict[str, Any], config: Any) -> list[str] | None:
    """names and behind them the classes that only old rows have.

    Where what was learned is to be kept, those that the model knows come first, in their order.
    """
    found = [tasks.of(config.task).names(rows, config, names) for rows in old.values()]
    if names is None:
        return None
    known = loading.known_labels(config.model)
    first = known if known and config.continues else []
    every = list(dict.fromkeys([*first, *names, *sum(found, [])]))
    if known and not set(known) <= set(every):
        assets.say(
            f"{config.model}: its classes {', '.join(known)} give way to those of the data; with "
            "replay, distill or ewc they would stay"
        )
    return every


def encode(
    old: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    config: Any,
    names: Sequence[str] | None,
) -> Any:
    """Old rows as the task gives them to the model, in one Dataset; None where there are none."""
    if not old:
        return None
    from datasets import concatenate_datasets

    parts = []
    for path, rows in old.items():
        try:
            own = replace(config, data=path)  # a text file's lines are one text
            parts.append(examples.encode({"train": rows}, tokenizer, own, names)["train"])
        except UserError as error:
            raise UserError(f"old_data: {path}: {error}") from None
    return concatenate_datasets(parts)


def replayed(train: "Dataset", old: "Dataset", share: float, seed: int) -> "Dataset":
    """train and as many of the old rows that they are share of both; the old ones drawn by seed.

    Where there are fewer old rows than that, each is there several times, as evenly as can be.
    """
    from datasets import concatenate_datasets

    wanted = max(1, round(len(train) * share / (1 - share)))
    return concatenate_datasets([train, _drawn(old, wanted, seed)])


def _drawn(rows: "Dataset", count: int, seed: int) -> "Dataset":
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(len(rows), generator=generator) for _ in range(0, count, len(rows))]
    return rows.select(torch.cat(passes)[:count].tolist())


def keeping(
    config: Any,
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    names: Sequence[str] | None,
    old: Any,
) -> "Keeping | None":
    """What config adds to the loss of a training step; None without ewc and distill.

    model: ready to train, before its first step. Raises: UserError.
    """
    if not (config.ewc or config.distill):
        return None
    known = None if names is None else loading.known_labels(config.model)
    if names is not None and not known:
        which = "ewc" if config.ewc else "distill"
        raise UserError(
            f"{which}: {config.model} was not trained for the classes {', '.join(names)}, so there "
            "is nothing of theirs to keep; adapter_name trains an adapter beside what it knows"
        )
    added = Keeping(config.task, config.multi_label, None if known is None else len(known))
    device = processes().device
    if config.ewc:
        added.ewc = config.ewc
        rows = _drawn(old, min(config.ewc_rows, len(old)), config.seed)
        collate = tasks.of(config.task).collator(tokenizer, config)
        batches = ({n: v.to(device) for n, v in collate([row]).items()} for row in rows)
        generator = torch.Generator(device).manual_seed(config.seed)
        found = fisher(model.to(device), batches, added.scores, draw_from(generator))
        added.pulls = [(weight, weight.detach().clone(), own) for weight, own in found]
    if config.distill:
        added.distill, added.temperature = config.distill, config.temperature
        added.teacher = _teacher(config, tokenizer, known).to(device)
    return added


def _teacher(
    config: Any, tokenizer: "PreTrainedTokenizerBase", names: Sequence[str] | None
) -> nn.Module:
    from fastft.finetune import running

    teacher = running.load_model(config, tokenizer, names).requires_grad_(False).eval()
    if config.patch:
        from fastft.patch import patch

        patch(teacher)
    return teacher


@dataclass
class Keeping:
    """(outputs, inputs, num_items_in_batch=None) -> the terms beside a training step's task loss.

    inputs: what the model was given, and labels. num_items_in_batch: of the whole step, as Trainer
    counts it; by default those of this batch. known: the classes that were learned before, of which
    alone something can be kept; behind them new ones may follow.
    """

    task: str
    multi_label: bool = False
    known: int | None = None
    ewc: float = 0.0
    pulls: list[tuple[nn.Parameter, Tensor, Tensor]] = field(default_factory=list)  # w, w*, F
    distill: float = 0.0
    temperature: float = 2.0
    teacher: nn.Module | None = None

    def __call__(
        self, outputs: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        own = self.items(inputs["labels"])
        step = own if num_items_in_batch is None else num_items_in_batch
        step = torch.as_tensor(step, device=own.device).clamp_min(1)
        terms = []
        if self.pulls:
            # A batch has its share of the pull, so that all batches of a step have it once.
            terms.append(self.ewc * self.penalty() * own / step)
        if self.teacher is not None:
            given = {name: value for name, value in inputs.items() if name != "labels"}
            with torch.no_grad():
                before = self.scores(self.teacher(**given)["logits"], inputs["labels"])
            now = self.scores(outputs["logits"], inputs["labels"])
            terms.append(self.distill * divergence(now, before, self.temperature) / step)
        total: Any = sum(terms)
        added: Tensor = total
        return added

    def penalty(self) -> Tensor:
        """1/2 sum over i of F_i (w_i - w_i*)^2, a scalar."""
        total: Any = sum((own * (weight - old).square()).sum() for weight, old, own in self.pulls)
        half: Tensor = total / 2
        return half

    def items(self, labels: Tensor) -> Tensor:
        """How many items labels has, as Trainer counts them."""
        return (self._shifted(labels) != IGNORED).sum()

    def scores(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits of the labelled items, (items, classes), in float32 at least.

        A class that may be there or not, with its one logit, is an item of two classes.
        """
        if self.task in ("lm", "sft"):
            # Prompt tuning puts the logits of its virtual tokens before those of the text.
            logits = logits[:, -labels.shape[1] : -1]
        logits = logits[..., : self.known]
        if self.multi_label:
            labels = labels[..., : self.known]
            logits = torch.stack([torch.zeros_like(logits), logits], -1)
        logits = logits[self._shifted(labels) != IGNORED]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _shifted(self, labels: Tensor) -> Tensor:
        return labels[:, 1:] if self.task in ("lm", "sft") else labels


def divergence(scores: Tensor, before: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(before / T) || softmax(scores / T)), summed over items; both (items, classes).

    Its gradient in scores is T (softmax(scores / T) - softmax(before / T)).
    """
    now, was = ((z / temperature).log_softmax(-1) for z in (scores, before))
    return temperature**2 * F.kl_div(now, was, reduction="sum", log_target=True)


def draw_from(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """(items, classes) logits -> (items,) classes, each drawn with its probability."""

    def draw(scores: Tensor) -> Tensor:
        return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)

    return draw


def fisher(
    model: nn.Module,
    rows: Iterable[dict[str, Any]],
    scores: Callable[[Tensor, Tensor], Tensor],
    draw: Callable[[Tensor], Tensor],
) -> list[tuple[nn.Parameter, Tensor]]:
    """Each trained weight and the diagonal of its Fisher information, of the weight's shape.

        F_i = 1 / items * sum over rows of (d/dw_i sum over items of log p(y | row))^2

    with y drawn from the model's own p, not the data's labels: what is curved in what the model
    says, however well it fits. Items are independent given the row, so that the square of their
    sum is the sum of their squares in expectation.

    rows: batches of one row, with labels. scores: (logits, labels) -> (items, classes).
    """
    trained, mode = [w for w in model.parameters() if w.requires_grad], model.training
    squares = [
        torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in trained
    ]
    items = 0
    model.eval()
    for row in rows:
        labels = row["labels"]
        given = {name: value for name, value in row.items() if name != "labels"}
        with torch.enable_grad():
            found = scores(model(**given)["logits"], labels)
            if not len(found):
                continue
            likelihood = -F.cross_entropy(found, draw(found.detach()), reduction="sum")
            gradients = torch.autograd.grad(likelihood, trained, allow_unused=True)
        for square, gradient in zip(squares, gradients, strict=True):
            if gradient is not None:
                square += gradient.to(square.dtype).square()
        items += len(found)
    model.train(mode)
    return [(w, square / max(items, 1)) for w, square in zip(trained, squares, strict=True)]
