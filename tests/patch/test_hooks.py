"""Hooks on a patched model, and decorators of its forwards: both do what they did."""

import functools

import pytest
import torch
import torch.nn.utils.prune
from encoders import encoder
from models import batch, causal_lm, with_lora
from test_patch import assert_same_step

from fastft.patch import patch


def test_hooks_still_run():
    model = with_lora(causal_lm("llama")).train()
    seen = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    inputs = batch("none")
    with torch.no_grad():
        model(**inputs)
        wanted = set(seen)
        patch(model)
        seen.clear()
        model(**inputs)
    assert seen == wanted


HOOKS = (
    "register_forward_pre_hook", "register_forward_hook",
    "register_full_backward_pre_hook", "register_full_backward_hook",
)  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2", "TokenClassification", "MaskedLM"])
def test_hooks_do_not_see_what_patch_tries(name):
    model = causal_lm(name) if name in ("llama", "gpt2") else encoder("bert", name)
    seen, handles = [], []
    for module in model.modules():
        for kind in HOOKS:
            handles.append(getattr(module, kind)(lambda *_, kind=kind: seen.append(kind)))
    before = {m: [list(v) for k, v in vars(m).items() if "hooks" in k] for m in model.modules()}
    report = patch(model)
    assert not seen and [e for e in report.swapped if e.operator == "padding"]
    after = {m: [list(v) for k, v in vars(m).items() if "hooks" in k] for m in model.modules()}
    assert after == before
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_hooks_that_compute_a_weight_run_when_patch_tries():
    model = encoder("bert", "SequenceClassification")
    for module in model.bert.encoder.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.utils.prune.random_unstructured(module, "weight", 0.5)
            module.weight = torch.full_like(module.weight, torch.nan)  # made by its hook
    assert [e for e in patch(model).swapped if e.operator == "padding"]


def renaming(function):
    """As transformers decorates a forward whose argument has a new name."""

    @functools.wraps(function)
    def forward(self, *args, **kwargs):
        if "states" in kwargs:
            kwargs["hidden_states"] = kwargs.pop("states")
        return function(self, *args, **kwargs)

    return forward


class OpaqueDecorator:
    def __init__(self, function):
        functools.update_wrapper(self, function)

    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(self.__wrapped__, instance)

    def __call__(self, *args, **kwargs):
        return self.__wrapped__(*args, **kwargs)


@pytest.mark.parametrize("decorate", [lambda f: renaming(renaming(f)), OpaqueDecorator])
def test_a_decorated_forward_keeps_its_decorators(decorate):
    model = causal_lm("llama").train()
    for layer in model.model.layers:
        own = type(layer.self_attn)
        layer.self_attn.__class__ = type("Decorated", (own,), {"forward": decorate(own.forward)})
    report = patch(model)
    known = decorate is not OpaqueDecorator
    assert report.count("rotary") == 2 * known, str(report)
    assert known or any("decorated" in left.reason for left in report.left), str(report)
    assert_same_step(model, batch("right"))
    if known:
        attention = model.model.layers[0].self_attn
        x = torch.randn(1, 4, 32)
        places = model.model.rotary_emb(x, torch.arange(4)[None])
        by_name, wanted = attention(states=x, position_embeddings=places), attention(x, places)
        assert torch.equal(by_name[0], wanted[0])
