"""base_weights: frozen layers of eight bits, trained through, saved, and given back."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import fastft
from fastft.ops.quantized_layer import KINDS, QuantizedLinear
from fastft.ops.quantized_linear import dequantize
from fastft.patch.base_weights import FILE


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def with_lora(model, **options):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    return get_peft_model(model, config)


def quantized(kind, weight):
    return KINDS[kind][0](weight)


def batch(vocabulary=96):
    ids = torch.randint(2, vocabulary, (3, 17))
    return {"input_ids": ids, "labels": ids.clone()}


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()
                           if p.grad is not None}  # fmt: skip


def test_which_layers_and_what_they_hold(base):
    model = with_lora(llama())
    weights = {n: p.clone() for n, p in model.named_parameters()}
    before = sum(p.numel() * p.element_size() for n, p in weights.items() if ".base_layer." in n)
    report = fastft.patch(model, base_weights=base)
    held = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(held) == 14 and all(n.endswith(".base_layer") for n in held)
    assert report.count(f"{base}_linear") == 14 and report.count("lora") == 14
    for name, layer in held.items():
        stored = quantized(base, weights[name + ".weight"])
        assert layer.stored.values.dtype is stored.values.dtype
        assert torch.equal(layer.values, stored.values.view(torch.int8))
        assert torch.equal(layer.scale, stored.scale)
    now = sum(b.numel() * b.element_size() for m in held.values() for b in m.buffers())
    assert before / now > 3.7
    assert sum(p.numel() for n, p in model.named_parameters() if "base_layer" in n) == 0
    again = fastft.patch(model, base_weights=base)
    assert again.count(f"{base}_linear") == 14
    assert {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)} == set(held)


def test_a_base_that_is_not_frozen_is_told(base):
    report = fastft.patch(llama(), base_weights=base)
    assert report.count(f"{base}_linear") == 0
    assert f"base_weights='{base}': no linear layer is frozen" in {e.reason for e in report.left}


def test_gradients_are_those_of_the_numbers_within_rounding(base):
    model, inputs = with_lora(llama()), batch()
    twin = copy.deepcopy(model)
    for name, module in twin.named_modules():
        if name.endswith(".base_layer"):
            module.weight.data = dequantize(quantized(base, module.weight))
    fastft.patch(model, base_weights=base)
    loss, grads = gradients(model, inputs)
    wanted, truth = gradients(twin, inputs)
    assert set(grads) == set(truth)
    assert float((loss - wanted).abs()) < 0.01 * float(wanted)
    for name, grad in truth.items():
        gap = (grads[name] - grad).norm() / grad.norm()
        assert gap < 0.1, name


@pytest.mark.parametrize("originals", [False, True])
def test_unpatch_gives_the_weights_back(base, originals, tmp_path):
    model = with_lora(llama())
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    order = [n for n, _ in model.named_parameters()]
    fastft.patch(model, base_weights=base, originals=tmp_path / "kept" if originals else None)
    remarks = " ".join(fastft.unpatch(model))
    assert [n for n, _ in model.named_parameters()] == order
    for name, parameter in model.named_parameters():
        kept = originals or ".base_layer." not in name
        wanted = weights[name] if kept else dequantize(quantized(base, weights[name]))
        assert torch.equal(parameter, wanted), name
    assert ("as they were" in remarks) == originals
    assert (tmp_path / "kept" / FILE).exists() == originals
    merged = model.merge_and_unload()  # PEFT finds its weights again
    assert not any(isinstance(m, QuantizedLinear) for m in merged.modules())


def test_originals_read_from_a_checkpoint(base, tmp_path):
    whole = llama()
    whole.save_pretrained(tmp_path)
    files = sorted(p.name for p in tmp_path.iterdir())
    model = with_lora(whole)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    fastft.patch(model, base_weights=base, originals=tmp_path)
    fastft.unpatch(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    other = with_lora(llama())
    other.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.data += 1
    with pytest.raises(ValueError, match="another weight"):
        fastft.patch(other, base_weights=base, originals=tmp_path)
    assert not any(isinstance(m, QuantizedLinear) for m in other.modules())
    assert not any("_fastft_swap" in vars(m) for m in other.modules())


def test_merging_and_reading_a_weight_are_refused(base):
    model = with_lora(llama())
    fastft.patch(model, base_weights=base)
    with pytest.raises(RuntimeError, match="unpatch"):
        model.merge_adapter()
    layer = next(m for m in model.modules() if isinstance(m, QuantizedLinear))
    assert layer.weight.shape == (layer.out_features, layer.in_features)  # which PEFT asks
    with pytest.raises(RuntimeError, match="unpatch"):
        layer.weight + 0
    with pytest.raises(ValueError, match="base_weights"):
        fastft.patch(llama(), base_weights="int3")


def test_saved_models_are_ordinary(base, tmp_path):
    model, inputs = with_lora(llama()), batch()
    fastft.patch(model, base_weights=base)
    state = model.state_dict()
    plain = with_lora(llama())
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state)
    fastft.patch(plain, base_weights=base)
    for one, other in zip(plain.modules(), model.modules(), strict=True):
        if isinstance(one, QuantizedLinear):
            assert torch.equal(one.values, other.values)
            torch.testing.assert_close(one.scale, other.scale, rtol=2e-7, atol=0)
    model.load_state_dict(state)
    plain.eval(), model.eval()
    assert torch.equal(plain(**inputs).logits, model(**inputs).logits)


def train(model):
    """Losses of some steps on one batch, with dropout."""
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-2)
    inputs, losses = batch(), []
    for _ in range(15):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return torch.tensor(losses)


def test_training_with_dropout_and_checkpointing(base):
    model = with_lora(llama(), lora_dropout=0.1).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wanted = train(copy.deepcopy(model))
    fastft.patch(model, base_weights=base)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.1
    torch.testing.assert_close(losses, wanted, rtol=0.02, atol=0)


def test_casting_leaves_numbers_and_scales(base):
    """Of fp8 too, which is floating point as weights are."""
    model = with_lora(llama())
    fastft.patch(model, base_weights=base)
    layer = next(m for m in model.modules() if isinstance(m, QuantizedLinear))
    stored = layer.stored
    model.half().float()
    assert layer.stored.values.dtype is stored.values.dtype
    assert torch.equal(layer.stored.values.view(torch.int8), stored.values.view(torch.int8))
    assert torch.equal(layer.scale, stored.scale)


def test_a_frozen_encoder_under_a_head_that_is_trained(base):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=60,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.bert.requires_grad_(False)
    ids = torch.randint(2, 60, (4, 9))
    wanted = model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss
    fastft.patch(model, base_weights=base)
    held = [n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    assert len(held) == 13 and "classifier" not in held
    loss = model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    torch.testing.assert_close(loss, wanted, rtol=0.02, atol=0.02)


def test_originals_are_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="originals: expected a folder, got the file"):
        fastft.patch(with_lora(llama()), base_weights="int8", originals=tmp_path / "file")


def test_frozen_layers_of_another_kind_are_named():
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60)
    report = fastft.patch(with_lora(GPT2LMHeadModel(config)), base_weights="int8")
    assert "its frozen layers are Conv1D" in str(report)
