"""patch and unpatch: walks a model, swaps what is recognised and confirmed, reports all of it."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastft.foreign import ForeignModule
from fastft.ops.quantized_layer import quantized_layers
from fastft.patch import base_weights as stored_base
from fastft.patch import generate
from fastft.patch.confirm import Unlike, unhooked
from fastft.patch.report import Report
from fastft.patch.swap import has_own_forward, swap, swap_of, undo


def patch(
    model: nn.Module,
    *,
    decode_weights: str | None = None,
    base_weights: str | None = None,
    originals: str | Path | None = None,
) -> Report:
    """Swaps fused operators into this model's modules, in place; returns what was done.

    Covers norms, gated MLPs, rotary embeddings, attention, PEFT's LoRA layers, and head and loss of
    causal language models; padded training batches are computed without their padding. Only this
    instance changes, `unpatch` gives it back exactly, and what is not recognised is left alone and
    reported. May be called again, after adding an adapter for instance: it adds what is missing.

    Under padding, states come back zero at padded places, layers and their hooks see (1, tokens,
    hidden), and the logits of a training step are computed when first read: RuntimeError if the
    head has changed by then. RuntimeError also in a backward with create_graph=True, and in one
    after `unpatch` that would compute checkpointed layers again.

    Args:
        decode_weights: "int8", "int4" or "int4_g64" gives linear layers quantised copies that
            `generate` reads instead, on the CPU with inputs rounded to eight bits for them
            ("int8_weight_only" and "int4_weight_only" do not round); training does not see them.
            `verify` tells what they cost in perplexity, `unpatch` drops them.
        base_weights: "int8" makes frozen linear layers hold int8 numbers instead of their weights
            and multiply integers, forward and backward: a quarter of float32's memory, for training
            adapters. `generate` decodes from the same numbers; with decode_weights="int8" the head
            gets a copy too. The head and the embeddings stay. Merging and whatever else reads a
            weight needs `unpatch` first. `verify` tells what it costs. "fp8" does the same with
            e4m3 numbers, on CUDA devices that multiply them, where the model must lie already;
            `generate` is transformers' own then, and decode_weights refused.
        originals: a folder for the weights that base_weights takes away: a checkpoint that has
            them, to be read again, or a place to write them. `unpatch` gives them back; without,
            it gives back what the numbers of eight bits stand for, and says so.
    Raises: TypeError or ValueError that names the argument, and where the device has no fp8, what
        it lacks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    parameter = next(model.parameters(), None)
    report = Report(parameter.device.type if parameter is not None else "cpu")
    # Trials make their tensors on the CPU, or name a device, whatever default the caller has set.
    was_patched = any(swap_of(module) is not None for module in model.modules())
    try:
        with torch.device("cpu"):
            patcher = _Patcher(report)
            replaced = []
            if base_weights is not None:
                replaced = stored_base.store(model, base_weights, originals)
            for layer in quantized_layers(model):
                report.add(layer, f"{layer.kind}_linear", f"{layer.kind}_product")
            if base_weights is not None and not quantized_layers(model):
                report.leave(model, f"base_weights={base_weights!r}: no linear layer is frozen")
            patcher.run(model)
        patcher.swap_generate(model, decode_weights)
    except BaseException:
        if not was_patched:  # half a patch is worse than none
            unpatch(model)
        raise
    for layer in replaced:
        layer.release()
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Undoes `patch` on this instance; returns remarks on what could only be switched off."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    remarks = set(stored_base.restore(model))
    for module in model.modules():
        remark = undo(module)
        if remark is not None:
            remarks.add(f"{type(module).__name__}: {remark}")
        if "_fastft_attention_before" in vars(module):
            undo_attention(module)
        module.__dict__.pop("_fastft_attention", None)
        generate.undo(module)
    return sorted(remarks)


def undo_attention(module: ForeignModule) -> None:
    before = module.__dict__.pop("_fastft_attention_before", None)
    for child in module.modules():
        if getattr(child, "config", None) is module.config:
            before = child.__dict__.pop("_fastft_attention", before)
    if before is not None and module.config._attn_implementation == "fastft":
        module.config._attn_implementation_internal = before


@contextmanager
def patched(model: nn.Module) -> Iterator[Report]:
    """`with fastft.patched(model) as report:` patches for the block's duration."""
    report = patch(model)
    try:
        yield report
    finally:
        unpatch(model)


class _Patcher:
    """One walk over a model. What is recognised once per class and size is not tried again."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.known: dict[tuple[Any, ...], Any] = {}
        # By configuration: how many modules attend by its word.
        self.sharing: Counter[int] = Counter()

    def run(self, model: nn.Module) -> None:
        from fastft.patch import causal_lm, gated_mlp, heads, linear, lora, norm, own_head

        modules = list(model.modules())
        self.sharing.update(id(m.config) for m in modules if _attends(m))
        # The linears of a LoRA layer are its own to call.
        parts = {part for m in modules if _is_lora(m) for part in m.modules()}
        for module in modules:
            if norm.is_candidate(module):
                self.try_swap(module, "norm", norm, lambda options: options.raw)
            elif gated_mlp.is_candidate(module):
                self.try_swap(module, "gated_mlp", gated_mlp, lambda options: "gated_mlp")
            elif linear.is_candidate(module) and module not in parts:
                self.try_swap(module, "linear", linear, lambda _: "linear")
            elif lora.is_candidate(module):
                self.swap_lora(module)
            elif _is_lora(module):
                self.report.leave(module, "a LoRA layer over no linear base: PEFT's own path")
        for module in modules:
            if _is_pretrained(module) and not heads.is_candidate(module):
                self.swap_base(module)
        for module in modules:
            if causal_lm.is_candidate(module):
                self.try_swap(
                    module, "linear_cross_entropy", causal_lm, lambda _: "linear_cross_entropy"
                )
            elif heads.is_candidate(module):
                self.try_swap(module, "cross_entropy", heads, heads.served_by)
            elif not own_head.is_candidate(module):
                continue
            if swap_of(module) is None and _untouchable(module) is None:
                own_head.guard(module)

    def swap_generate(self, model: nn.Module, kind: str | None) -> None:
        """The model's own `generate`, and the weights it reads."""
        served = False
        for module in model.modules():
            if not _is_pretrained(module) or not generate.is_candidate(module):
                continue
            reason = generate.install(module)
            served = served or reason is None
            if reason is not None:
                self.report.leave(module, reason)
            else:
                self.report.add(module, "decoder_layer", "decoder_layer", "serves generate")
        if kind is None:
            return
        from fastft.decode import weights

        weights.check_kind(model, kind)
        if not served:
            self.report.leave(model, f"decode_weights={kind!r}: its generate is transformers' own")
            return
        for (name, stored), count in weights.store(model, kind).items():
            for _ in range(count):
                self.report.add(
                    name, "quantized_linear", "quantized_linear", f"{stored} in generate"
                )

    def try_swap(
        self, module: nn.Module, operator: str, room: Any, raw: Callable[..., Any]
    ) -> None:
        """Swaps one module by the rules of a file of this folder, if they recognise it."""
        record = swap_of(module)
        if record is not None:
            record.active = True
            if record.operator == operator:
                self.report.add(module, operator, raw(record.options), _remark(record.options))
                return
        reason = _untouchable(module)
        if reason is None:
            try:
                options = self.recognise(module, room)
            except Unlike as unlike:
                reason = str(unlike)
        if reason is not None:
            self.report.leave(module, reason)
            return
        undo(module)  # of an earlier call that did not recognise it
        swap(module, operator, room.forward, options)
        self.report.add(module, operator, raw(options), _remark(options))

    def recognise(self, module: nn.Module, room: Any) -> Any:
        """room.recognise, asked once for modules of one class, sizes and settings."""
        settings = tuple(
            (k, v) for k, v in vars(module).items() if isinstance(v, (int, float, str, bool))
        )
        key = (room.__name__, type(module), settings, _sizes(module))
        if key not in self.known:
            try:
                with unhooked(module):
                    self.known[key] = room.recognise(module)
            except Unlike as unlike:
                self.known[key] = unlike
        if isinstance(self.known[key], Unlike):
            raise self.known[key]
        return self.known[key]

    def swap_lora(self, module: nn.Module) -> None:
        from fastft.patch import lora

        reason = _untouchable(module) or lora.why_not(module)
        # PEFT's state may change later, so the swap is put in and asks at every call.
        if swap_of(module) is None and not has_own_forward(module):
            swap(module, "lora", lora.forward)
        if reason is None:
            self.report.add(module, "lora", "lora")
        else:
            self.report.leave(module, reason)

    def swap_base(self, module: ForeignModule) -> None:
        """Attention, rotary embeddings and padding of one base model."""
        from fastft.patch import attention

        reason = _untouchable(module)
        if reason is not None:
            self.report.leave(module, reason)
            return
        attending = self.swap_attention(module)
        for child in module.modules():
            if attention.is_candidate(child):
                self.try_swap(child, "rotary", attention, lambda _: "rotary")
        reason = None
        if module.config._attn_implementation != attention.NAME:
            return
        if swap_of(module) is None:
            if any(hasattr(parameter, "device_mesh") for parameter in module.parameters()):
                reason = "padding kept: to be confirmed, patch before sharding"
            else:
                reason = self.swap_padding(module)
        if module.config._attn_implementation == attention.NAME:
            for child in attending:
                self.report.add(child, "attention", "attention")
        if reason is None:
            self.report.add(module, "padding", "left out of training batches")
        else:
            self.report.leave(module, reason)

    def swap_padding(self, module: nn.Module) -> str | None:
        """Why not, if not; where attention is to blame, that is given back as well."""
        from fastft.patch import padding

        try:
            with unhooked(module):
                padding.install(module)
        except Unlike as unlike:
            if isinstance(unlike, padding.OtherAttention):
                undo_attention(module)
            return str(unlike)
        return None

    def swap_attention(self, module: ForeignModule) -> list[nn.Module]:
        """The attention modules that now run ours."""
        from fastft.patch import attention

        config = module.config
        before = config._attn_implementation
        attending = [c for c in module.modules() if _attends(c) and c.config is config]
        if before != attention.NAME and not attending:
            if not any(_attends(child) for child in module.modules()):  # else a part has its own
                self.report.leave(module, "attention kept: the class has one of its own")
            return []
        if before != attention.NAME and len(attending) < self.sharing[id(config)]:
            self.report.leave(
                module, "attention kept: it is set together with another that is kept"
            )
            return []
        if before not in ("sdpa", "eager", attention.NAME):
            self.report.leave(module, f"attention kept: {before} was asked for")
            return []
        if not module._can_set_attn_implementation():
            self.report.leave(module, "attention kept: the class has one of its own")
            return []
        attention.register()
        for child in attending:
            if before != attention.NAME or not hasattr(child, "_fastft_attention"):
                child._fastft_attention = before
        if before != attention.NAME:
            module._fastft_attention_before = before
            config._attn_implementation_internal = attention.NAME
        return attending


def _attends(module: nn.Module) -> bool:
    return hasattr(module, "is_causal") and hasattr(module, "config")


def _remark(options: Any) -> str:
    return getattr(options, "remark", "")


def _sizes(module: nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None)


def _is_lora(module: nn.Module) -> bool:
    layers = sys.modules.get("peft.tuners.lora.layer")
    return layers is not None and isinstance(module, layers.LoraLayer)


def _is_pretrained(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def _untouchable(module: nn.Module) -> str | None:
    """Why a module cannot be tried or swapped as it stands."""
    if has_own_forward(module):
        return "its forward was replaced by somebody else"
    if getattr(module, "use_kernels", False):
        return "use_kernels is on: transformers would put its own kernels back"
    for parameter in module.parameters():
        if parameter.is_meta:
            return "on the meta device"
        if hasattr(parameter, "ds_id"):
            return "sharded by ZeRO-3"
    return None
