"""patch on tiny models of many architectures: same results, real swaps, exact undo."""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
import transformers
from models import ARCHITECTURES, batch, causal_lm, with_lora

from fastft.patch import patch, patched, unpatch, verify
from fastft.patch.swap import swap_of, switched_off

PADDINGS = ["none", "right", "left"]


def gradients(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output, grads


def assert_same_step(model, inputs, tolerance=1e-5):
    with switched_off(model):
        wanted, wanted_grads = gradients(model, inputs)
    got, got_grads = gradients(model, inputs)
    assert abs(got.loss - wanted.loss) <= tolerance * abs(wanted.loss)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], wanted.logits[real], rtol=1e-4, atol=1e-4)
    assert got_grads.keys() == wanted_grads.keys()
    largest = max(g.norm() for g in wanted_grads.values())
    for name, grad in wanted_grads.items():
        gap = (grad - got_grads[name]).norm()
        assert gap <= 10 * tolerance * max(grad.norm(), 1e-3 * largest), name


def assert_no_further_from_float64(model, inputs, half=nullcontext):
    """The step of a patched model beside eager's, both inside half(); the model is float64 then."""
    with half():
        ours, our_grads = gradients(model, inputs)
        with switched_off(model):
            eager, eager_grads = gradients(model, inputs)
    with switched_off(model):
        truth, grads = gradients(model.double(), inputs)
    assert abs(ours.loss - truth.loss) <= 2 * abs(eager.loss - truth.loss) + 1e-2 * truth.loss
    assert our_grads.keys() == grads.keys()
    largest = max(grad.norm() for grad in grads.values())
    for name, grad in grads.items():
        error, allowed = ((g[name] - grad).norm() for g in (our_grads, eager_grads))
        assert error <= 2 * allowed + 1e-2 * max(grad.norm(), 1e-1 * largest), name


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_fine_tuning_step_is_the_same(name, padding):
    model = causal_lm(name).train()
    report = patch(model)
    assert report.count("linear_cross_entropy") == 1 and report.count("norm") >= 3, str(report)
    assert report.count("attention") == 2 and report.count("padding") == 1, str(report)
    if name not in ("gpt2", "cohere"):
        assert report.count("rotary") == 2, str(report)
    if name != "gpt2":
        assert report.count("gated_mlp") == 2, str(report)
    assert_same_step(model, batch(padding))


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_step_is_the_same(name, padding):
    model = with_lora(causal_lm(name)).train()
    report = patch(model)
    linears = {"gpt2": 4, "phi3": 4}.get(name, 7)
    assert report.count("lora") == 2 * linears, str(report)
    assert_same_step(model, batch(padding))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi3"])
def test_undo_is_exact(name):
    model = with_lora(causal_lm(name))
    inputs = batch("right")
    before = model(**inputs)
    keys = list(model.state_dict())
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    config = copy.deepcopy(model.config.to_dict())
    implementation = model.config._attn_implementation
    patch(model)
    assert list(model.state_dict()) == keys
    model(**inputs)
    assert unpatch(model) == []
    after = model(**inputs)
    assert torch.equal(before.loss, after.loss) and torch.equal(before.logits, after.logits)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation


def test_patched_context_and_patching_twice():
    model = causal_lm("llama")
    with patched(model) as report:
        assert swap_of(model) is not None
        assert str(patch(model)) == str(report)
    assert swap_of(model) is None and unpatch(model) == []


def test_only_this_instance_changes():
    inputs = batch("right")
    config = causal_lm("llama").config
    one, other = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    before = other(**inputs)
    patch(one)
    after = other(**inputs)
    assert torch.equal(before.loss, after.loss) and torch.equal(before.logits, after.logits)
    assert not any(swap_of(m) for m in other.modules())
    third = causal_lm("qwen3")
    patch(third)
    assert_same_step(one.train(), inputs)
    assert_same_step(third.train(), inputs)
    unpatch(one)
    assert_same_step(third, inputs)


def test_adapter_states_take_pefts_own_path():
    model = with_lora(causal_lm("llama"))
    patch(model)
    inputs = batch("right")

    def same():
        with switched_off(model):
            wanted = model(**inputs)
        got = model(**inputs)
        torch.testing.assert_close(got.loss, wanted.loss)
        return got.loss

    on = same()
    with model.disable_adapter():
        assert not torch.equal(same(), on)
    model.merge_adapter()
    torch.testing.assert_close(same(), on)
    model.unmerge_adapter()
    config = copy.deepcopy(model.peft_config["default"])
    config.init_lora_weights = False  # else "default" alone would give the same
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    assert not torch.isclose(same(), on)
    model.set_adapter("second")
    assert not torch.isclose(same(), on)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_variants_are_reported_and_right(settings):
    model = with_lora(causal_lm("llama"), **settings)
    report = patch(model)
    assert report.count("lora") == 0
    assert any("PEFT's own path" in entry.reason for entry in report.left)
    assert_same_step(model.train(), batch("right"))


def test_modules_to_save_and_lora_on_the_head():
    inputs = batch("right")
    for settings in (
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "v_proj"]},
    ):
        model = with_lora(causal_lm("llama"), **settings).train()
        assert patch(model).count("linear_cross_entropy") == 1
        assert_same_step(model, inputs)


def test_dropout_is_pefts_without_padding():
    model = with_lora(causal_lm("llama"), dropout=0.3).train()
    inputs = batch("none")

    def step():
        torch.manual_seed(7)
        return gradients(model, inputs)

    wanted, wanted_grads = step()
    patch(model)
    got, grads = step()
    torch.testing.assert_close(got.loss, wanted.loss)
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5)


def test_half_precision_base_with_float32_adapters():
    model = with_lora(causal_lm("llama", torch.bfloat16)).train()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    patch(model)
    result = verify(model, batch("right"))
    assert result.ok and 0 < result.worst_gradient[1], str(result)
    assert_no_further_from_float64(model, batch("right"))


def test_autocast():
    model = with_lora(causal_lm("llama")).train()
    patch(model)
    half = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    assert_no_further_from_float64(model, batch("right"), half)


def test_gradient_checkpointing():
    model = with_lora(causal_lm("llama")).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    patch(model)
    assert_same_step(model, batch("right"))


def test_trained_and_decoded_in_turns():
    """Weights move under fused AdamW and by writes to .data, and the next call must see it."""
    model = with_lora(causal_lm("llama"))
    twin = copy.deepcopy(model)
    patch(model)
    prompt = torch.randint(3, 97, (2, 5))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True) for m in (model, twin)]
    for step in range(3):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            each.train()
            each(**batch("right", seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            each.eval()
            next(p for n, p in each.named_parameters() if "lora_B" in n).data.add_(0.01)
        kwargs = {"max_new_tokens": 6, "do_sample": False}
        kwargs["attention_mask"] = torch.ones_like(prompt)
        assert torch.equal(model.generate(prompt, **kwargs), twin.generate(prompt, **kwargs))


def test_left_alone_with_a_reason():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return x * self.weight / (x.abs().mean(-1, keepdim=True) + self.eps)

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), Odd(), torch.nn.LayerNorm(8))
    report = patch(model)
    assert report.count("norm") == 1
    (entry,) = report.left
    assert entry.module == "Odd" and "computes something else" in entry.reason
    assert "Odd" in str(report) and "LayerNorm" in str(report)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        patch("model")


def test_meta_device_is_left_alone():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(causal_lm("llama").config)
    report = patch(model)
    norms = [entry for entry in report.left if entry.module == "LlamaRMSNorm"]
    assert not report.swapped and norms and all("meta device" in e.reason for e in norms)


def test_random_state_and_gradients_are_untouched():
    model = causal_lm("llama")
    state = torch.get_rng_state()
    patch(model)
    verify(model, batch("right"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
