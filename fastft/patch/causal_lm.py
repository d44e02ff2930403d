"""Swaps the head and loss of causal language models: hidden states to loss without the logits.

Rows without a label are not computed, padding is left out of the whole model, and `outputs.logits`
is there when it is read. Calls without labels, with logits_to_keep, under torch.compile, or with a
loss function that is not transformers' own take the model's own path.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.decode.cache_name import NAMES, cache_in
from fastft.foreign import ForeignModule
from fastft.library import autocast_dtype
from fastft.ops.linear_cross_entropy import Head, linear_cross_entropy
from fastft.patch import packing as packings
from fastft.patch import padding
from fastft.patch.confirm import TOLERANCE, Unlike, relative, stand_in, undisturbed
from fastft.patch.labels import IGNORED, count_padding, targets
from fastft.patch.lazy import LazyLogits
from fastft.patch.lora import as_lora_linear
from fastft.patch.packing import Packing
from fastft.patch.pretrained import base_of, is_pretrained
from fastft.patch.swap import is_hooked, original_forward, swap_of

_FIELDS = {"loss", "logits", *NAMES, "hidden_states", "attentions", "cross_attentions"}
_FIELDS |= {"router_logits", "aux_loss"}  # of mixtures of experts, where they are asked for


@dataclass(frozen=True)
class CausalLm:
    """What a model does between its head and its loss."""

    softcap: float | None
    logit_scale: float
    output: type  # of the forward


def is_candidate(module: ForeignModule) -> bool:
    # Asked for the head too: the name is also what classes without a loss of their own have.
    return (
        is_pretrained(module)
        and _loss_name(module) == "ForCausalLMLoss"
        and base_of(module) is not module
        and module.get_output_embeddings() is not None
    )


def _loss_name(module: ForeignModule) -> str:
    return getattr(module.loss_function, "__name__", "")


def _active(head: ForeignModule | None) -> ForeignModule | None:
    """The head itself, or the trained copy PEFT keeps beside it (modules_to_save)."""
    other = sys.modules.get("peft.utils.other")
    if other is not None and isinstance(head, other.ModulesToSaveWrapper):
        if is_hooked(head) or head.disable_adapters or len(head.active_adapters) != 1:
            return None
        name = head.active_adapters[0]
        return head.modules_to_save[name] if name in head.modules_to_save else head.original_module
    return head


def _head(module: ForeignModule, options: CausalLm) -> Head | None:
    """The head as the operator takes it; None if it must run by itself."""
    layer = _active(module.get_output_embeddings())
    if layer is None or is_hooked(layer):
        return None
    linear = as_lora_linear(layer)
    if linear is None or linear.transposed or (linear.a is not None and linear.dropout):
        return None
    if not isinstance(linear.weight, Tensor):
        return None
    a, b = linear.a, linear.b
    lora = None if a is None or b is None else (a, b, linear.scale)
    return Head(linear.weight, linear.bias, lora, options.logit_scale)


def forward(module: ForeignModule, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return original_forward(module)(*args, **kwargs)
    arguments = padding.bind(module, args, kwargs)
    options = module._fastft_swap.options
    head = _head(module, options)
    labels = arguments.get("labels")
    wants_tuple = arguments.get("return_dict", True) is False or not module.config.return_dict
    if wants_tuple and "use_cache" not in arguments:
        # A cache left out would move what stands behind it in the tuple.
        kwargs = {**kwargs, "use_cache": module.config.use_cache}
    if (
        labels is None
        or head is None
        or _loss_name(module) != "ForCausalLMLoss"
        or not _keeps_all(arguments.get("logits_to_keep", 0))
        or wants_tuple
        or padding.asks(arguments, module.config, "output_router_logits")  # a loss beside this one
    ):
        with packings.kept() if count_padding(arguments) else nullcontext():
            return original_forward(module)(*args, **kwargs)
    return _forward(module, head, arguments)


def _keeps_all(logits_to_keep: int | Tensor) -> bool:
    return isinstance(logits_to_keep, int) and logits_to_keep == 0


def _forward(module: ForeignModule, head: Head, arguments: dict[str, Any]) -> Any:
    options, base = module._fastft_swap.options, base_of(module)
    given, arguments = arguments, dict(arguments)
    labels = arguments.pop("labels")
    arguments.pop("logits_to_keep", None)
    num_items = arguments.pop("num_items_in_batch", None)
    shift_labels = arguments.pop("shift_labels", None)
    ignore_index = arguments.pop("ignore_index", IGNORED)
    predicted = targets(labels, shift_labels, ignore_index)
    packing: Packing | None = None
    run: AbstractContextManager[None] = nullcontext()
    record = swap_of(base)
    if record is not None and record.active:  # confirmed to take packed rows
        packing = padding.packing_for(base, arguments, keeps_cache=False)
    if packing is not None and _predicts_from_padding(packing, predicted, ignore_index):
        packing, run = None, packings.kept()
    elif packing is None and count_padding(given):  # a model inside the base may leave its own out
        run = packings.kept()
    if packing is not None:
        outputs = base(**padding.pack_arguments(packing, arguments))
        hidden, kept = outputs[0][0], predicted.flatten()[packing.places.to(predicted.device)]
    else:
        if module.training and "use_cache" not in arguments and not _needs_cache(module, arguments):
            arguments["use_cache"] = False
        with run:
            outputs = base(**arguments)
        hidden, kept = outputs[0].flatten(0, 1), predicted.flatten()
    loss = linear_cross_entropy(
        hidden, head, kept.to(hidden.device),
        num_items=num_items, ignore_index=ignore_index, softcap=options.softcap,
    )  # fmt: skip

    def logits() -> Tensor:
        states = outputs[0] if packing is None else packing.unpack(outputs[0])
        z = module.get_output_embeddings()(states)
        z = z if options.logit_scale == 1.0 else z * options.logit_scale
        out: Tensor = (
            z if options.softcap is None else options.softcap * torch.tanh(z / options.softcap)
        )
        return out

    lazy = LazyLogits(
        logits, (*predicted.shape, head.weight.shape[0]),
        autocast_dtype(hidden.device) or hidden.dtype, hidden.device, loss.requires_grad,
        [outputs[0], *module.get_output_embeddings().parameters()],
    )  # fmt: skip
    rest = {k: outputs.get(k) for k in options.output.__dataclass_fields__}
    return options.output(**{**rest, "loss": loss, "logits": lazy})


def _needs_cache(module: nn.Module, arguments: dict[str, Any]) -> bool:
    """A cache is given, or is one of the outputs in front of others that were asked for."""
    return (
        cache_in(arguments) is not None
        or padding.asks(arguments, module.config, "output_hidden_states")
        or padding.asks(arguments, module.config, "output_attentions")
    )


def _predicts_from_padding(packing: Packing, predicted: Tensor, ignore_index: int) -> bool:
    """A label that a padded place predicts counts in the model's own loss: it must be computed."""
    labelled = predicted.flatten() != ignore_index
    labelled[packing.places.to(labelled.device)] = False
    return bool(labelled.any())


class _Stub(nn.Module):
    """Stands for the base model: gives the hidden states it was made with."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)
        output.router_logits = None
        return output


def recognise(module: ForeignModule) -> CausalLm:
    """Tries the class's forward on large random hidden states with a small head; Unlike if none."""
    config = module.config.get_text_config(decoder=True)  # of one with images, that of its decoder
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise Unlike("head and loss kept: its configuration names no vocabulary")
    caps = {None, getattr(config, "final_logit_softcapping", None)}
    scales = {1.0}
    for value in (getattr(module, "logit_scale", None), getattr(config, "logit_scale", None)):
        scales |= {float(value)} if isinstance(value, (int, float)) else set()
    if isinstance(scaling := getattr(config, "logits_scaling", None), (int, float)) and scaling:
        scales.add(1.0 / scaling)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 8, generator=generator)
    labels = torch.randint(0, config.vocab_size, (2, 3), generator=generator)
    labels[0, 1] = IGNORED
    weight = torch.randn(config.vocab_size, 8, generator=generator) * 5
    head_name = next(
        (n for n, m in module.named_children() if m is module.get_output_embeddings()), None
    )
    if head_name is None:
        raise Unlike("head and loss kept: no output embedding of its own")
    linear = nn.Linear(8, config.vocab_size, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    children = {**module._modules, head_name: linear}

    def own(hidden: Tensor) -> Any:
        children[module.base_model_prefix] = _Stub(hidden)
        probe = stand_in(module, {}, children)
        return type(module).forward(probe, input_ids=labels, labels=labels)

    with undisturbed():
        leaf = hidden.clone().requires_grad_()
        try:
            output = own(leaf)
            (wanted,) = torch.autograd.grad(output.loss, leaf)
        except Exception as error:  # the forward of an unknown architecture
            raise Unlike(f"head and loss kept: {type(error).__name__}: {error}") from error
        if not set(output.__dataclass_fields__) <= _FIELDS:
            raise Unlike(f"head and loss kept: it returns a {type(output).__name__}")
        worst = float("inf")
        for softcap in caps:
            for scale in scales:
                ours = hidden.clone().requires_grad_()
                loss = linear_cross_entropy(
                    ours.flatten(0, 1), Head(weight, None, None, scale),
                    targets(labels, None).flatten(), softcap=softcap,
                )  # fmt: skip
                (grad,) = torch.autograd.grad(loss, ours)
                gap = max(relative(loss, output.loss), relative(grad, wanted))
                if gap <= TOLERANCE:
                    return CausalLm(softcap, scale, type(output))
                worst = min(worst, gap)
    raise Unlike(f"head and loss kept: its loss is another formula (difference {worst:.2g})")
