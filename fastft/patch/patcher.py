"""One walk over a model: what is recognised and confirmed is swapped, and all of it reported."""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from fastft.foreign import ForeignModule, is_lora
from fastft.patch import (
    attention,
    causal_lm,
    gated_mlp,
    generate,
    heads,
    linear,
    lora,
    norm,
    own_head,
    padding,
)
from fastft.patch.confirm import Unlike, is_weightless, unhooked
from fastft.patch.pretrained import is_pretrained
from fastft.patch.report import Report
from fastft.patch.swap import has_own_forward, swap, swap_of, undo


class Patcher:
    """One walk over a model. Modules that only their weights tell apart are tried once."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.known: dict[tuple[Any, ...], Any] = {}
        # By configuration: how many modules attend by its word.
        self.sharing: Counter[int] = Counter()

    def run(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.sharing.update(id(m.config) for m in modules if _attends(m))
        # The linears of a LoRA layer are its own to call.
        parts = {part for m in modules if is_lora(m) for part in m.modules()}
        for module in modules:
            if norm.is_candidate(module):
                self.try_swap(module, "norm", norm, lambda options: options.raw)
            elif gated_mlp.is_candidate(module):
                self.try_swap(module, "gated_mlp", gated_mlp, lambda options: "gated_mlp")
            elif linear.is_candidate(module) and module not in parts:
                self.try_swap(module, "linear", linear, lambda _: "linear")
            elif lora.is_candidate(module):
                self.swap_lora(module)
            elif is_lora(module):
                self.report.leave(module, "a LoRA layer over no linear base: PEFT's own path")
        for module in modules:
            if is_pretrained(module) and not heads.is_candidate(module):
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
            if not is_pretrained(module) or not generate.is_candidate(module):
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
        """room.recognise, asked once for one class, sizes, settings and configuration."""
        config = id(getattr(module, "config", None))
        key = (room.__name__, type(module), config, _settings(module), _sizes(module))
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
        try:
            with unhooked(module):
                padding.install(module)
        except Unlike as unlike:
            if isinstance(unlike, padding.OtherAttention):
                attention.undo(module)
            return str(unlike)
        return None

    def swap_attention(self, module: ForeignModule) -> list[nn.Module]:
        """The attention modules that now run ours."""
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


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """What a forward may read beside weights, of a module and of its activations and dropout."""
    own = [
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str, bool)) or inspect.isroutine(value)
    ]
    parts = [
        (name, type(child), _settings(child))
        for name, child in module._modules.items()
        if is_weightless(child)
    ]
    return *own, *parts


def _sizes(module: nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None)


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
