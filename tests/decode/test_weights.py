"""decode_weights: copies that decoding reads, made anew when a weight changed, and their cost."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fastft
from fastft.decode.linears import DECODE_WEIGHT
from fastft.decode.weights import KINDS, DecodeWeight, perplexity, store
from fastft.ops import quantized_linear
from fastft.ops.quantized_linear import dequantize

KEYS = {"vocab_size": 96, "eos_token_id": None, "pad_token_id": 0}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, **KEYS,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
                        bos_token_id=1, **KEYS)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def round_inputs(module, inputs):
    x = inputs[0]
    return (quantized_linear.rounded(x.flatten(0, -2)).view_as(x),)


def rounded(model):
    """A model with the weights the copies stand for, its inputs rounded where theirs are."""
    other = copy.deepcopy(model)
    for module, twin in zip(model.modules(), other.modules(), strict=True):
        held = vars(module).get(DECODE_WEIGHT)
        if held is None:
            continue
        whole = dequantize(held.stored)
        # A tied embedding stays as it is: the head alone is stored.
        conv = type(twin).__name__ == "Conv1D"
        twin.weight = torch.nn.Parameter(whole.t().contiguous() if conv else whole)
        vars(twin).pop(DECODE_WEIGHT)
        if held.stored.round_inputs:
            twin.register_forward_pre_hook(round_inputs)
    return other


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_what_the_copies_stand_for(make, kind):
    model, ids = make(), torch.randint(2, 96, (3, 9))
    before = fastft.generate(model, ids, max_new_tokens=12, do_sample=False).sequences
    store(model, kind)
    out = fastft.generate(model, ids, max_new_tokens=12, do_sample=False).sequences
    wanted = rounded(model).generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(out, wanted)
    head = vars(model.get_output_embeddings())[DECODE_WEIGHT]
    assert head.kind == ("int8_weight_only" if kind.endswith("_only") else "int8")
    assert kind.startswith("int8") or not torch.equal(out, before)


def test_a_changed_weight_is_stored_anew():
    model = llama()
    store(model, "int8")
    layer = model.model.layers[1].mlp.down_proj
    held, place = vars(layer)[DECODE_WEIGHT], vars(layer)[DECODE_WEIGHT].stored.values.data_ptr()
    weight = layer.weight.detach()
    assert torch.equal(held.current(weight).values, DecodeWeight.of(weight, "int8").stored.values)
    layer.weight.data.mul_(-1.5)  # moves no version counter that anybody could read
    fresh = DecodeWeight.of(weight, "int8").stored
    assert torch.equal(held.current(weight).values, fresh.values)
    assert torch.equal(held.stored.scale, fresh.scale)
    assert held.stored.values.data_ptr() == place


def test_generate_sees_a_changed_weight():
    model, ids = llama(), torch.randint(2, 96, (2, 9))

    def tokens(model):
        return fastft.generate(model, ids, max_new_tokens=12, do_sample=False).sequences

    store(model, "int8")
    before = tokens(model)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(-1.5)
    after, fresh = tokens(model), copy.deepcopy(model)
    store(fresh, "int8")
    assert torch.equal(after, tokens(fresh)) and not torch.equal(after, before)


def test_patch_stores_and_unpatch_forgets():
    model, ids = llama(), torch.randint(2, 96, (1, 9))
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    report = fastft.patch(model, decode_weights="int4")
    assert report.count("quantized_linear") == 15 and report.count("decoder_layer") == 1
    fastft.patch(model)  # adds what is missing, keeps the copies
    coarse = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(coarse, rounded_generate(model, ids))
    assert set(model.state_dict()) == set(kept)
    fastft.unpatch(model)
    assert not any(DECODE_WEIGHT in vars(m) for m in model.modules())
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), plain)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def rounded_generate(model, ids):
    other = rounded(model)
    fastft.unpatch(other)
    return other.generate(ids, max_new_tokens=12, do_sample=False)


def test_verify_tells_the_perplexity():
    model, ids = llama(), torch.randint(2, 96, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    fastft.patch(model, decode_weights="int4")
    before, stored = fastft.verify(model, {"input_ids": ids, "attention_mask": mask}).perplexity
    fastft.unpatch(model)
    rows = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    truth = float(torch.exp(sum(losses) / sum(len(row) - 1 for row in rows)))
    assert before == pytest.approx(truth, rel=1e-4)
    assert stored != before and stored == pytest.approx(before, rel=0.5)
    assert fastft.verify(model, {"input_ids": ids}).perplexity is None
    assert perplexity(model, ids, mask, stored=True) == pytest.approx(truth, rel=1e-4)


def test_adapters_are_not_stored():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear")).eval()
    fastft.patch(model, decode_weights="int8")
    stored = [name for name, m in model.named_modules() if DECODE_WEIGHT in vars(m)]
    assert len(stored) == 15 and not any("lora_" in name for name in stored)
    ids = torch.randint(2, 96, (1, 9))
    assert fastft.generate(model, ids, max_new_tokens=3).stats.path == "decoder_layer"


def test_a_model_that_computes_something_else_is_handed_over():
    """Granite has Llama's parts and multiplies between them: only its logits tell."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, embedding_multiplier=5.0, residual_multiplier=0.3, **KEYS,
    )  # fmt: skip
    model, ids = GraniteForCausalLM(config).eval(), torch.randint(2, 96, (1, 9))
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
    store(model, "int8")
    out = fastft.generate(model, ids, max_new_tokens=6, do_sample=False)
    assert out.stats.path == "model.generate" and torch.equal(out.sequences, wanted)


def test_inputs_that_are_no_whole_groups_are_told():
    counts = store(llama(), "int4_g64")  # the two down projections have 96 inputs, and the head
    assert counts == {("Linear", "int4_g64"): 12, ("Linear", "int8"): 3}


def test_refuses():
    with pytest.raises(ValueError, match="decode_weights"):
        fastft.patch(llama(), decode_weights="int3")
