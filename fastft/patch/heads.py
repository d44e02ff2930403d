"""Swaps the loss of classification, tagging, multiple-choice and masked-language-model heads.

Under gradient accumulation these heads are handed `num_items_in_batch`, the number of labelled
items of all accumulated batches, and take the mean over their own batch all the same, so that loss
and gradients come out multiplied by the number of steps (transformers#47688). Here the loss is the
sum over the items divided by `num_items_in_batch`; without it, the mean over the batch as before.

A head that maps every token to a vocabulary computes the labelled places only while it trains;
`outputs.logits` is there when it is read.
"""

import inspect
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastft.decode.evaluating import evaluating
from fastft.foreign import ForeignModule
from fastft.ops.cross_entropy import cross_entropy
from fastft.patch import padding
from fastft.patch.confirm import TOLERANCE, Unlike, relative, undisturbed
from fastft.patch.labels import IGNORED
from fastft.patch.lazy import LazyLogits
from fastft.patch.packing import Selection, during, kept
from fastft.patch.pretrained import base_of, is_pretrained
from fastft.patch.swap import is_hooked, original_forward, swap_of, switched_off


@dataclass(frozen=True)
class Loss:
    """What was confirmed of a head's loss."""

    cross_entropy: bool  # of logits (..., classes) against labels (...); else another mean
    selects: bool = False  # the head works place by place: it may see the labelled ones alone
    names_problem: bool = False  # the forward writes config.problem_type
    takes_cache: bool = False  # the forward has an argument use_cache
    per_place: bool = False  # every place has its own label
    reads_padding: bool = False  # its scores depend on padded places, which must be computed
    remark: str = "over num_items_in_batch (transformers#47688)"


def served_by(options: Loss) -> str:
    """What the report names as doing the work."""
    return "cross_entropy" if options.cross_entropy else "PyTorch"


def is_candidate(module: nn.Module) -> bool:
    return is_pretrained(module) and base_of(module) is not module


def forward(module: ForeignModule, *args: Any, **kwargs: Any) -> Any:
    arguments = padding.bind(module, args, kwargs)
    num_items, labels = arguments.pop("num_items_in_batch", None), arguments.get("labels")
    options = module._fastft_swap.options
    if (
        options.takes_cache
        and arguments.get("use_cache") is None
        and _returns_dict(module, arguments)
    ):
        arguments["use_cache"] = False  # nothing is generated from here, and a cache keeps padding
    if "_loss_function" in vars(module):  # set by the user: what it means is not known
        arguments |= {} if num_items is None else {"num_items_in_batch": num_items}
        labels = None
    if labels is None:
        spans = arguments.get("start_positions") is not None  # softmax over all places of a row
        with kept() if spans or options.reads_padding else nullcontext():
            return original_forward(module)(**arguments)
    if torch.compiler.is_compiling() or not (
        options.reads_padding or _labels_padding(module, labels, arguments)
    ):
        return _forward(module, arguments, labels, num_items)
    with kept():
        return _forward(module, arguments, labels, num_items)


def _forward(
    module: ForeignModule, arguments: dict[str, Any], labels: Tensor, num_items: Tensor | int | None
) -> Any:
    if (
        torch.compiler.is_compiling()
        or not _returns_dict(module, arguments)
        or not _takes_classes(module, labels)
    ):
        return _over_items(original_forward(module)(**arguments), labels, num_items)
    del arguments["labels"]
    if module._fastft_swap.options.names_problem and module.config.problem_type is None:
        module.config.problem_type = "single_label_classification"
    if _selects(module, labels):
        return _forward_selected(module, arguments, labels, num_items)
    output = original_forward(module)(**arguments)
    flat = output.logits.view(-1, output.logits.shape[-1])
    output["loss"] = cross_entropy(flat, labels.view(-1).to(flat.device), num_items=num_items)
    # As the class orders them: whoever turns the output into a tuple finds the loss in front.
    return type(output)(**{k: output.get(k) for k in output.__dataclass_fields__})


def _returns_dict(module: ForeignModule, arguments: dict[str, Any]) -> bool:
    asked = arguments.get("return_dict")
    out: bool = module.config.return_dict if asked is None else asked
    return out


def _labels_padding(module: ForeignModule, labels: Tensor, arguments: dict[str, Any]) -> bool:
    """Padded places that have labels count in the model's own loss: they must be computed."""
    mask = arguments.get("attention_mask")
    if not module._fastft_swap.options.per_place or not isinstance(mask, Tensor):
        return False
    if mask.shape != labels.shape:
        return False
    found = bool(((labels != IGNORED) & (mask == 0).to(labels.device)).any())
    if found:
        warnings.warn(
            "labels at padded places: they count in the loss, so fastft computes the padding too; "
            f"{IGNORED} as their label leaves them out, which is faster and usually what is meant",
            stacklevel=3,
        )
    return found


def _takes_classes(module: ForeignModule, labels: Tensor) -> bool:
    """Whether this call's loss is the cross entropy that was confirmed."""
    problem = getattr(module.config, "problem_type", None)
    options = module._fastft_swap.options
    if options.names_problem and problem not in (None, "single_label_classification"):
        return False
    return options.cross_entropy and labels.dtype is torch.int64


def _over_items(output: Any, labels: Tensor, num_items: Tensor | int | None) -> Any:
    """The mean over a batch's items turned into its share of the mean over num_items."""
    if num_items is None:
        return output
    own = (labels != IGNORED).sum()
    if isinstance(output, tuple):
        return (output[0] * (own / num_items), *output[1:])
    output.loss = output.loss * (own / num_items)
    return output


def _selects(module: ForeignModule, labels: Tensor) -> bool:
    base = base_of(module)
    record = swap_of(base)
    return (
        module._fastft_swap.options.selects
        and torch.is_grad_enabled()
        and record is not None
        and record.active
        and base._compiled_call_impl is None
        and not is_hooked(base)
    )


def _forward_selected(
    module: nn.Module, arguments: dict[str, Any], labels: Tensor, num_items: Tensor | int | None
) -> Any:
    chosen = (labels != IGNORED).flatten().nonzero().flatten()
    selection, own = Selection(base_of(module), chosen), original_forward(module)
    with during(selection=selection):
        output = own(**arguments)
    if selection.output is None:  # asked for a tuple, or for what a packed forward cannot give
        raise RuntimeError("the base model did not run through its patched forward")
    flat = output.logits.view(-1, output.logits.shape[-1])
    loss = cross_entropy(flat, labels.flatten()[chosen].to(flat.device), num_items=num_items)

    def logits() -> Tensor:
        with during(selection=Selection(selection.owner, None, selection.output)):
            out: Tensor = own(**arguments).logits
            return out

    parts = (child for child in module.children() if child is not selection.owner)
    reads = [selection.output.last_hidden_state, *(p for part in parts for p in part.parameters())]
    lazy = LazyLogits(
        logits, (*labels.shape, flat.shape[-1]), flat.dtype, flat.device, loss.requires_grad, reads
    )
    rest = {k: output.get(k) for k in output.__dataclass_fields__}
    return type(output)(**{**rest, "loss": loss, "logits": lazy})


def recognise(module: ForeignModule) -> Loss:
    """Runs the head as it is on a few tokens; Unlike where its loss is none of the known ones."""
    function = type(module).forward
    if not function.__module__.startswith("transformers."):
        # Two rows cannot tell what else a loss of somebody's own depends on.
        raise Unlike("loss kept: the forward is not one of transformers'")
    parameters = inspect.signature(function).parameters
    if "start_positions" in parameters:
        return Loss(False, remark="padding computed while training: the loss counts it")
    if "labels" not in parameters:
        raise Unlike("loss kept: it takes no labels")
    config = module.config
    before = {k: getattr(config, k, None) for k in ("problem_type", "pad_token_id")}
    held = set(vars(config))
    try:
        if before["pad_token_id"] is None:
            config.pad_token_id = 0
        with undisturbed(), torch.no_grad(), evaluating(module), switched_off(module):
            found = replace(_recognise(module), takes_cache="use_cache" in parameters)
        with undisturbed(), torch.no_grad(), evaluating(module):
            if swap_of(base_of(module)) is None or not reads_padding(module):
                return found
        told = f"{found.remark}; padding kept: it reads padded places"
        return replace(found, reads_padding=True, remark=told)
    except Unlike:
        raise
    except Exception as error:  # the forward of an unknown architecture
        raise Unlike(f"loss kept: {type(error).__name__}: {error}") from error
    finally:
        for name, value in before.items():
            if name not in held:
                vars(config).pop(name, None)
            elif hasattr(config, name):
                setattr(config, name, value)


def _recognise(module: ForeignModule) -> Loss:
    config, own = module.config, type(module).forward
    embedding = module.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)

    def numbers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator).to(embedding.device)

    ids = numbers(embedding.shape[0], 2, 7)
    try:
        logits = own(module, input_ids=ids).logits
    except (RuntimeError, ValueError):  # multiple choice takes (batch, choices, length)
        ids = numbers(embedding.shape[0], 2, 3, 7)
        logits = own(module, input_ids=ids).logits
    per_token, classes = logits.shape[:-1] == ids.shape, logits.shape[-1]
    if not per_token and logits.shape[:-1] != ids.shape[:1]:
        raise Unlike(f"loss kept: its logits have the shape {tuple(logits.shape)}")
    names_problem = False
    if classes > 1:
        labels = numbers(classes, *logits.shape[:-1])
        if per_token:
            labels[0, 1:4] = IGNORED
        asked = getattr(config, "problem_type", None)
        if asked in (None, "single_label_classification"):
            loss = own(module, input_ids=ids, labels=labels).loss
            names_problem = getattr(config, "problem_type", None) is not None
            wanted = cross_entropy(logits.view(-1, classes).float(), labels.view(-1))
            if not relative(loss, wanted) <= _limit(logits):
                raise Unlike("loss kept: it is not the cross entropy of its logits")
            selects = per_token and classes > config.hidden_size
            selects = selects and _works_by_place(module, ids, logits)
            return Loss(True, selects, names_problem, per_place=per_token)
    labels = torch.rand(logits.shape, generator=generator).to(logits)
    each = [own(module, input_ids=ids[i : i + 1], labels=labels[i : i + 1]).loss for i in (0, 1)]
    both = own(module, input_ids=ids, labels=labels).loss
    if not relative(both, sum(each) / 2) <= _limit(logits):
        raise Unlike("loss kept: it is not the mean over its rows")
    return Loss(False)


def reads_padding(module: ForeignModule) -> bool:
    """Whether the head's scores change where padding is left out."""
    weight = module.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, weight.shape[0], (4, 7), generator=generator).to(weight.device)
    mask = (torch.arange(7) < torch.tensor([[4], [7], [2], [5]])).long().to(weight.device)
    # So that a head that looks for its last token finds the one that the mask has.
    ids = torch.where(mask.bool(), ids.clamp(1), 0)
    module.config.pad_token_id, before = 0, module.config.pad_token_id
    if module.__class__.__name__.endswith("MultipleChoice"):
        ids, mask = ids.view(2, 2, 7), mask.view(2, 2, 7)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "use_cache" in inspect.signature(type(module).forward).parameters:
        given["use_cache"] = False
    try:
        got = type(module).forward(module, **given).logits
        with kept():
            wanted = type(module).forward(module, **given).logits
    finally:
        module.config.pad_token_id = before
    if got.shape[:2] == mask.shape and got.dim() == 3:
        got, wanted = got[mask.bool()], wanted[mask.bool()]
    return not relative(got, wanted) <= _limit(wanted)


def _works_by_place(module: nn.Module, ids: Tensor, logits: Tensor) -> bool:
    """Whether the head gives a place the same logits among few as among all."""
    base, places = base_of(module), torch.tensor([1, 4, 8])
    record = swap_of(base)
    if record is None:
        return False
    record.active = True  # inside `switched_off`, which sets it again
    with during(selection=Selection(base, places)):
        some = type(module).forward(module, input_ids=ids).logits
    record.active = False
    wanted = logits.flatten(0, 1)[places.to(logits.device)]
    return some.shape == (1, *wanted.shape) and relative(some[0], wanted) <= _limit(logits)


def _limit(logits: Tensor) -> float:
    return TOLERANCE if logits.dtype is torch.float32 else 5e-2
