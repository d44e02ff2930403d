"""verify must agree where the patch is right, and see every way in which it could be wrong."""

import pytest
import torch
import transformers
from models import batch, causal_lm, with_lora

from fastft.ops.attention import attention
from fastft.patch import attention as room
from fastft.patch import patch, verify
from fastft.patch.confirm import relative
from fastft.patch.swap import swap_of, switched_off


def test_agrees_and_restores():
    model = with_lora(causal_lm("llama")).train()
    marker = next(p for p in model.parameters() if p.requires_grad)
    marker.grad = torch.full_like(marker, 3.0)
    result = verify(model, batch("right"))
    assert result.ok and result.without_gradient == [] and result.worst_gradient[1] < 1e-4
    assert swap_of(model.get_base_model()) is None, "patched only for the duration"
    assert torch.equal(marker.grad, torch.full_like(marker, 3.0)) and model.training
    assert "agrees" in str(result)


def test_without_labels():
    inputs = batch("none")
    del inputs["labels"]
    assert verify(causal_lm("gpt2"), inputs).ok


@pytest.mark.parametrize("head", ["", "ForMaskedLM", "ForTokenClassification"])
def test_without_labels_padded_states_of_an_encoder_do_not_count(head):
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=50,
    )  # fmt: skip
    model = getattr(transformers, f"BertModel{head}".replace("ModelFor", "For"))(config)
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]])
    result = verify(model, {"input_ids": ids, "attention_mask": (ids > 0).long()})
    assert result.ok, result


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("target", ["norm", "gated_mlp", "lora"])
def test_sees_a_wrong_operator(target, labelled):
    model = with_lora(causal_lm("llama")).train()
    patch(model)
    record = next(r for m in model.modules() if (r := swap_of(m)) and r.operator == target)
    right = record.replacement
    record.replacement = lambda module, x: right(module, x) * 1.01
    inputs = batch("right")
    if not labelled:
        del inputs["labels"]
    result = verify(model, inputs)
    assert not result.ok and "DIFFERS" in str(result)


@pytest.mark.parametrize("padding", ["none", "right"])
def test_sees_a_wrong_attention(padding, monkeypatch):
    """Without padding too, where the model as it was once ran the fused attention as well."""
    model = causal_lm("llama").train()
    patch(model)
    monkeypatch.setattr(room, "attention", lambda *a, **k: 1.01 * attention(*a, **k))
    assert not verify(model, batch(padding)).ok


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_it_compares_with_is_the_model_as_it_was(implementation, padding):
    model, inputs = causal_lm("llama").train(), batch(padding)
    model.set_attn_implementation(implementation)

    def step():
        model.zero_grad()
        output = model(**inputs)
        logits = output.logits.detach().clone()
        output.loss.backward()
        return [output.loss.detach(), logits, *(p.grad for p in model.parameters())]

    wanted = step()
    patch(model)
    with switched_off(model):
        got = step()
    assert all(map(torch.equal, got, wanted))
    assert model.config._attn_implementation == "fastft"
    model.set_attn_implementation("sdpa")  # chosen since: it stays
    with switched_off(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "sdpa"


def test_sees_a_lost_gradient():
    model = with_lora(causal_lm("llama")).train()
    patch(model)
    record = next(r for m in model.modules() if (r := swap_of(m)) and r.operator == "gated_mlp")
    right = record.replacement
    record.replacement = lambda module, x: right(module, x).detach()
    result = verify(model, batch("right"))
    assert not result.ok and any("mlp" in name for name in result.without_gradient)
    assert "nor in the original" not in str(result)


def test_a_gradient_that_the_original_lacks_too_is_no_loss():
    model = causal_lm("llama").train()
    model.unused = torch.nn.Linear(2, 2)
    result = verify(model, batch("right"))
    assert result.ok and "no gradient: unused.bias, nor in the original" in str(result)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_sees_gradients_that_are_no_numbers(number):
    model = with_lora(causal_lm("llama")).train()
    patch(model)
    record = [r for m in model.modules() if (r := swap_of(m)) and r.operator == "gated_mlp"][-1]
    right = record.replacement

    def broken(module, x):
        out = right(module, x)
        out.register_hook(lambda grad: grad * number)
        return out

    record.replacement = broken
    result = verify(model, batch("right"))
    assert result.loss < 1e-5 and result.logits < 1e-5, "the forward is right"
    assert not result.ok and result.worst_gradient[1] == torch.inf


def test_sees_logits_that_are_no_numbers():
    model = causal_lm("llama").requires_grad_(False)
    patch(model)
    head = swap_of(model)

    def broken(module, **arguments):
        output = type(module).forward(module, **arguments)
        output.logits = output.logits.index_fill(1, torch.tensor([-1]), torch.nan)
        return output

    head.replacement = broken
    result = verify(model, batch("none"))
    assert result.loss < 1e-5 and result.logits == torch.inf and not result.ok


def test_what_is_infinite_on_both_sides_agrees():
    a = torch.tensor([1.0, -torch.inf, torch.nan])
    b = torch.tensor([1.0, torch.inf, torch.nan])
    assert relative(a, a) == 0 and relative(a, b) == relative(b, a) == torch.inf
    assert relative(a * 1.01, a) == pytest.approx(0.01, rel=1e-3)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="batch: expected a mapping"):
        verify(causal_lm("llama"), torch.ones(2, 3))
