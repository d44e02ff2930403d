"""Adapters: unmerged as PEFT computes them, one per row, and what goes another way."""

import pytest
import torch
from decoders import padded, prompt, tiny
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model

import fastft
from fastft.decode.exit_head import ExitHead

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(kind="llama", adapters=("default",), targets=None, **lora):
    """A model with adapters that change what it says, the first one active."""
    targets = targets or ({"gpt2": ["c_attn", "c_proj", "c_fc"], "phi3": [
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}.get(kind, LLAMA))  # fmt: skip
    model = None
    for i, name in enumerate(adapters):
        config = LoraConfig(r=4 + i, lora_alpha=8, target_modules=targets, **lora)
        if model is None:
            model = get_peft_model(tiny(kind), config, name)
        else:
            model.add_adapter(name, config)
    torch.manual_seed(11)
    for module in model.modules():
        for factor in getattr(module, "lora_B", {}).values():
            factor.weight.data.normal_(0, 0.2)
    return model.eval()


def same(model, x, path="decoder_layer", **kwargs):
    want = model.generate(
        **x, **kwargs, output_logits=True, return_dict_in_generate=True, eos_token_id=None
    )
    ours = fastft.generate(model, x, **kwargs, output_logits=True, eos_token_id=None)
    assert ours.stats.path == path, ours.stats.reason
    assert torch.equal(ours.sequences, want.sequences)
    for mine, its in zip(ours.logits, want.logits, strict=True):
        torch.testing.assert_close(mine, its, atol=2e-4, rtol=2e-4)
    return ours


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "qwen3"])
def test_unmerged(kind):
    model, x = adapted(kind), padded([7, 4])
    ours = same(model, x, max_new_tokens=10)
    with model.disable_adapter():
        base = same(model, x, max_new_tokens=10)
    assert not torch.equal(ours.sequences, base.sequences)
    model.merge_adapter()
    same(model, x, max_new_tokens=10)
    with model.disable_adapter():  # where PEFT takes the adapter out again at the next forward
        out = fastft.generate(model, x, max_new_tokens=10, eos_token_id=None)
        assert torch.equal(out.sequences, base.sequences)


def test_head_adapter():
    same(adapted(targets=[*LLAMA, "lm_head"]), padded([7, 4]), max_new_tokens=10)


def test_switching_and_training_adapters_is_seen():
    model, x = adapted(adapters=("one", "two")), padded([7, 4])
    first = same(model, x, max_new_tokens=10)
    model.set_adapter("two")
    second = same(model, x, max_new_tokens=10)
    for module in model.modules():
        if hasattr(module, "lora_B"):
            module.lora_B["two"].weight.data.mul_(-1.0)
    third = same(model, x, max_new_tokens=10)
    assert len({str(out.sequences.tolist()) for out in (first, second, third)}) == 3


@pytest.mark.parametrize("speculation", [None, "prompt_lookup", "draft", "exit"])
def test_an_adapter_for_each_row(speculation, every_draft):
    model, x = adapted(adapters=("one", "two")), padded([7, 4, 6, 5])
    names = ["two", "__base__", "one", "two"]
    drafts = {"draft": tiny(), "exit": ExitHead(32, 2, rank=4)}.get(speculation, speculation)
    ours = fastft.generate(
        model, x, adapter_names=names, max_new_tokens=10, speculation=drafts, eos_token_id=None
    )
    assert ours.stats.path == "decoder_layer"
    peft = model.generate(**x, adapter_names=names, max_new_tokens=10, eos_token_id=None)
    assert torch.equal(ours.sequences, peft)
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in x.items()}
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**own, max_new_tokens=10, eos_token_id=None)
        else:
            model.set_adapter(name)
            alone = model.generate(**own, max_new_tokens=10, eos_token_id=None)
        assert ours.sequences[row].tolist() == alone[0].tolist()


def test_adapter_names_and_return_sequences():
    model, ids = adapted(adapters=("one", "two")), prompt(1, 6).repeat(2, 1)
    out = fastft.generate(
        model, ids, adapter_names=["one", "two"], num_return_sequences=2, do_sample=True,
        top_k=1, max_new_tokens=8,
    ).sequences  # fmt: skip
    assert torch.equal(out[0], out[1]) and torch.equal(out[2], out[3])
    assert not torch.equal(out[0], out[2])


def test_wrong_adapter_names():
    model, ids = adapted(adapters=("one", "two")), prompt(4, 6)
    for names, error, words in (
        (["one", "three"] * 2, ValueError, r"adapter_names: no adapter \['three'\]"),
        (["one", "two"], ValueError, "adapter_names: expected one for each of 4 rows, got 2"),
        ([], ValueError, "adapter_names: expected one for each of 4"),
        ("one", TypeError, "adapter_names: expected a list"),
    ):
        with pytest.raises(error, match=words):
            fastft.generate(model, ids, adapter_names=names, max_new_tokens=2)
    with pytest.raises(ValueError, match="adapter_names: no adapter"):
        fastft.generate(tiny(), prompt(1, 4), adapter_names=["one"], max_new_tokens=2)


def several(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=LLAMA))
    model.base_model.set_adapter(["default", "other"])
    return model


OTHERS = {
    "dora": (lambda: adapted(use_dora=True), "DoRA"),
    "several": (lambda: several(adapted()), "several active adapters"),
    "bias": (lambda: adapted(lora_bias=True), "factors"),
    "ia3": (lambda: get_peft_model(tiny(), IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])), "k_proj"),
    "prompt": (lambda: get_peft_model(tiny(), PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4)), "prompt-learning"),
    "embedding": (lambda: adapted(targets=["embed_tokens", "q_proj"]), "embedding"),
    "dropout": (lambda: adapted(lora_dropout=0.5).train(), "training mode with dropout"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_what_goes_another_way(other):
    make, words = OTHERS[other]
    model, x = make(), padded([7, 4])
    if other != "dropout":
        model.eval()
    torch.manual_seed(0)
    want = model.generate(**x, max_new_tokens=8)
    torch.manual_seed(0)
    out = fastft.generate(model, x, max_new_tokens=8)
    assert out.stats.path == "model.generate"
    assert words in out.stats.reason
    assert torch.equal(out.sequences, want)
