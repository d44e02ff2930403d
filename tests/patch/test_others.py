"""Architectures that patch does not aim at: whatever it swaps in them must be right."""

import pytest
import torch
import transformers
from encoders import encoder
from models import VOCABULARY, batch, causal_lm

from fastft import library
from fastft.patch import patch, unpatch

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "pad_token_id": 0,
}  # fmt: skip
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
_BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "dropout": 0.0, "pad_token_id": 0, "decoder_start_token_id": 2,
}  # fmt: skip
_VIT = {k: v for k, v in _SIZES.items() if k.startswith(("hidden", "inter", "num"))}
CASES = {
    "pooled encoder": ("Bert", "ForSequenceClassification", {**_SIZES, **_STILL}),
    "encoder per token": ("Bert", "ForTokenClassification", {**_SIZES, **_STILL}),
    "masked": ("Roberta", "ForMaskedLM", {**_SIZES, **_STILL}),
    "encoder-decoder": ("Bart", "ForConditionalGeneration", _BART),
    "relative positions": (
        "T5", "ForConditionalGeneration",
        {**_T5, "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0},
    ),
    "cross-attention": ("GPT2", "LMHeadModel", {**_GPT2, "add_cross_attention": True}),
    "classified": ("GPT2", "ForSequenceClassification", _GPT2),
    "experts": (
        "Mixtral", "ForCausalLM",
        {**_SIZES, **_GROUPED, "num_local_experts": 4, "output_router_logits": True},
    ),
    "sinks": (
        "GptOss", "ForCausalLM",
        {**_SIZES, **_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "sinks below a head": (
        "GptOss", "ForTokenClassification",
        {**_SIZES, **_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "chunked": (
        "Llama4", "ForCausalLM",
        {**_SIZES, **_GROUPED, "num_local_experts": 2, "attention_chunk_size": 5},
    ),
    "image": ("ViT", "ForImageClassification", {**_VIT, **_STILL, "image_size": 16}),
}  # fmt: skip


def inputs_of(case, suffix):
    if case == "image":
        return {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 0])}
    inputs = batch("right")
    if suffix == "ForSequenceClassification":
        inputs["labels"] = torch.tensor([0, 1, 0])
    elif suffix == "ForTokenClassification":
        inputs["labels"] = torch.where(inputs["labels"] >= 0, inputs["labels"] % 2, -100)
    if case == "cross-attention":
        inputs["encoder_hidden_states"] = torch.randn(*inputs["input_ids"].shape, 32)
    return inputs


def step(model, inputs):
    model.zero_grad()
    torch.manual_seed(5)  # for the dropout of some heads
    loss = model(**inputs).loss
    loss.backward()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_step_is_the_same(case):
    prefix, suffix, settings = CASES[case]
    config_name = "Llama4TextConfig" if prefix == "Llama4" else f"{prefix}Config"
    settings = {**settings, "patch_size": 4} if case == "image" else settings
    config = getattr(transformers, config_name)(**settings)
    model = getattr(transformers, prefix + suffix)(config).train()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    inputs, before = inputs_of(case, suffix), model.config._attn_implementation
    loss, wanted = step(model, inputs)
    report = patch(model)
    assert ("sinks" in case) == any("attention kept" in e.reason for e in report.left), str(report)
    got, grads = step(model, inputs)
    torch.testing.assert_close(got, loss)
    assert grads.keys() == wanted.keys()
    largest = max(grad.norm() for grad in wanted.values())
    for name, grad in wanted.items():
        assert (grads[name] - grad).norm() <= 1e-4 * max(grad.norm(), 1e-2 * largest), name
    unpatch(model)
    assert torch.equal(step(model, inputs)[0], loss)
    assert model.config._attn_implementation == before


def test_nothing_is_warned_of_that_only_fastft_asks_for(monkeypatch):
    """transformers warns where a model without a loss, as the one inside, is asked for its own."""
    warned = []
    monkeypatch.setattr(transformers.modeling_utils.logger, "warning_once", warned.append)
    patch(causal_lm("llama"))
    patch(encoder("bert", "SequenceClassification"))
    assert not [text for text in warned if "loss_type" in text]


def test_the_report_tells_that_there_are_no_kernels(monkeypatch):
    assert "_C" not in str(patch(causal_lm("llama"))) or library.extension is None
    monkeypatch.setattr(library, "extension", None)
    assert (
        str(patch(causal_lm("llama"))).splitlines()[-1].startswith("warning: fastft._C is missing")
    )
