"""Patched models are copied, saved, adapted, cast and prepared as unpatched ones."""

import copy
import io
import pickle

import pytest
import torch
from accelerate import Accelerator
from models import batch, causal_lm, with_lora
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLayer
from test_patch import assert_no_further_from_float64
from torch import nn

from fastft.patch import patch, unpatch, verify
from fastft.patch.swap import swap_of, switched_off

RIGHT = batch("right")


def loss_and_logits(model, inputs=RIGHT):
    output = model(**inputs)
    return output.loss, output.logits[inputs["attention_mask"].bool()]


def assert_same_results(model, other, inputs=RIGHT, tolerance=1e-5):
    for ours, theirs in zip(
        loss_and_logits(model, inputs), loss_and_logits(other, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)


def modules_reachable(model):
    """Identities of all modules that forwards of this model's modules are bound to."""
    bound = set()
    for module in model.modules():
        for value in (module.__dict__.get("forward"), getattr(swap_of(module), "original", None)):
            if hasattr(value, "__self__"):
                bound.add(id(value.__self__))
    return bound


@pytest.mark.parametrize("make", [causal_lm, lambda name: with_lora(causal_lm(name))])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_deepcopy(name, make):
    model = make(name).train()
    plain = copy.deepcopy(model)
    patch(model)
    twin = copy.deepcopy(model)
    own = {id(module) for module in twin.modules()}
    assert modules_reachable(twin) <= own and not modules_reachable(twin) & modules_reachable(model)
    assert sum(swap_of(m) is not None for m in twin.modules()) > 5
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    scaled = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(1.5)
    assert_same_results(twin, scaled, tolerance=1e-4)
    assert_same_results(model, plain)
    assert unpatch(twin) == []
    assert torch.equal(twin(**RIGHT).logits, scaled(**RIGHT).logits)
    assert not any(swap_of(m) for m in twin.modules())
    assert twin.config._attn_implementation == "sdpa" != model.config._attn_implementation
    assert_same_results(model, plain)
    assert verify(model, RIGHT).ok


def test_pickling_says_what_to_do():
    model = causal_lm("gpt2")
    patch(model)
    with pytest.raises(TypeError, match="unpatch it first"):
        pickle.dumps(model)
    unpatch(model)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**RIGHT).logits, model(**RIGHT).logits)


def test_save_pretrained(tmp_path):
    model = causal_lm("llama")
    plain = copy.deepcopy(model)
    patch(model)
    model.save_pretrained(tmp_path / "patched")
    plain.save_pretrained(tmp_path / "plain")
    for name in ("config.json", "model.safetensors"):
        one, other = ((tmp_path / kind / name).read_bytes() for kind in ("patched", "plain"))
        assert one == other, name
    loaded = type(model).from_pretrained(tmp_path / "patched").eval()
    assert not any(swap_of(m) for m in loaded.modules())
    assert torch.equal(loaded(**RIGHT).logits, plain(**RIGHT).logits)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = causal_lm("llama", seed=1)
    patch(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_results(other, plain)


def test_adapter_is_saved_and_loaded_onto_either_base(tmp_path):
    model = with_lora(causal_lm("llama"))
    patch(model)
    model.save_pretrained(tmp_path)
    unpatch(model)
    for is_patched in (False, True):
        base = causal_lm("llama")
        if is_patched:
            patch(base)
        loaded = PeftModel.from_pretrained(base, tmp_path)
        assert_same_results(loaded, model)
        assert patch(loaded).count("lora") == 14
        assert_same_results(loaded, model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_merge_and_unload(name):
    model = with_lora(causal_lm(name))
    plain = copy.deepcopy(model)
    patch(model)
    merged, wanted = model.merge_and_unload(), plain.merge_and_unload()
    for (key, ours), (other, theirs) in zip(
        merged.state_dict().items(), wanted.state_dict().items(), strict=True
    ):
        assert key == other and torch.equal(ours, theirs)
    assert_same_results(merged, wanted)
    assert unpatch(merged) == [] and torch.equal(merged(**RIGHT).logits, wanted(**RIGHT).logits)


def test_adapters_come_and_go():
    base, other = causal_lm("llama"), causal_lm("llama")
    patch(base)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(3)
    model = get_peft_model(base, config)
    torch.manual_seed(3)
    plain = get_peft_model(other, config)
    assert_same_results(model, plain)
    assert patch(model).count("lora") == 14
    assert_same_results(model.train(), plain.train())
    for each in (model, plain):
        torch.manual_seed(4)
        each.add_adapter("second", config)
        each.set_adapter("second")
    assert_same_results(model, plain)
    assert verify(model, RIGHT).ok
    for each in (model, plain):
        each.delete_adapter("default")
    assert_same_results(model, plain)
    assert patch(model).count("lora") == 14
    assert_same_results(model.unload(), plain.unload())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("lora", [False, True])
def test_dtype_changes_after_patching(dtype, lora):
    model = causal_lm("llama")
    model = (with_lora(model) if lora else model).train()
    truth = model(**RIGHT).loss.item()
    patch(model)
    model.to(dtype)
    result = verify(model, RIGHT)
    assert result.ok, str(result)
    output = model(**RIGHT)
    assert output.logits.dtype is dtype and abs(output.loss.item() - truth) < 0.05 * truth
    assert_no_further_from_float64(model, RIGHT)


def test_embeddings_are_resized_and_tied_weights_stay_tied():
    model = causal_lm("llama", tie_word_embeddings=True).train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    patch(model)
    for size in (97, 128):
        model.resize_token_embeddings(size)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert verify(model, RIGHT).ok
        assert model(**RIGHT).logits.shape[-1] == size
    inputs = {**RIGHT, "labels": RIGHT["labels"].clone()}
    inputs["labels"][0, 5] = 120
    assert verify(model, inputs).ok


class _Scaled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrized_weights(when):
    model = with_lora(causal_lm("llama")).train()
    if when == "after":
        patch(model)
    base = model.get_base_model()
    layer = base.model.layers[0]
    for module in (
        layer.input_layernorm, layer.mlp.up_proj.base_layer, layer.mlp.gate_proj.lora_A["default"],
        layer.self_attn.q_proj.base_layer, base.lm_head,
    ):  # fmt: skip
        nn.utils.parametrize.register_parametrization(module, "weight", _Scaled())
    wanted = copy.deepcopy(model)
    unpatch(wanted)
    assert "forward" not in vars(wanted.get_base_model().model.layers[0].input_layernorm)
    if when == "before":
        patch(model)
    assert_same_results(model, wanted)
    result = verify(model, RIGHT)
    assert result.ok, str(result)
    assert unpatch(model) == []


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = with_lora(causal_lm("llama")).train()
    patch(model)
    swaps = sum(swap_of(m) is not None for m in model.modules())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(3):
        output = prepared(**RIGHT)
        losses.append(output.loss.item())
        accelerator.backward(output.loss)
        optimizer.step()
        optimizer.zero_grad()
        assert not output.logits.is_materialized, "casting the outputs must not compute the logits"
    assert losses[2] < losses[0]
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert swap_of(unwrapped.get_base_model()).active
    assert sum(swap_of(m) is not None for m in unwrapped.modules()) == swaps
    assert verify(unwrapped, RIGHT).ok and unpatch(unwrapped) == []
    AcceleratorState._reset_state(reset_partial_state=True)


def test_quantised_base():
    """A bitsandbytes layer's own product is kept; the low-rank part is fused around it."""
    calls = []

    class Linear4bit(nn.Linear):
        def forward(self, x):
            calls.append(self)
            return nn.functional.linear(x, self.weight.sign() * 0.1, self.bias)

    Linear4bit.__module__ = "bitsandbytes.nn.modules"
    model = causal_lm("llama").train()
    for layer in model.model.layers:
        for parent, name in ((layer.self_attn, "q_proj"), (layer.mlp, "up_proj")):
            old = getattr(parent, name)
            base = Linear4bit(old.in_features, old.out_features, bias=False)
            base.load_state_dict(old.state_dict())
            config = LoraConfig(r=4, init_lora_weights=False)
            setattr(parent, name, LoraLayer(base, "default", r=4, lora_alpha=8, config=config))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    report = patch(model)
    assert report.count("lora") == 4, str(report)
    calls.clear()
    result = verify(model, RIGHT)
    assert result.ok and len(result.gradients) == 8, str(result)
    assert len(calls) == 8 and len(set(calls)) == 4, "once unpatched, once patched"
    with switched_off(model):
        wanted = model(**RIGHT).loss
    seen = []
    forward = LoraLayer.forward
    try:
        LoraLayer.forward = lambda self, *a, **k: seen.append(self) or forward(self, *a, **k)
        torch.testing.assert_close(model(**RIGHT).loss, wanted)
    finally:
        LoraLayer.forward = forward
    assert not seen, "PEFT's own path ran"
