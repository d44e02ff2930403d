"""A patched model's own generate: transformers' results, types and arguments, by the fused step."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastft
from fastft.decode import generate as decoding


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, eos_token_id=None, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def calls(monkeypatch):
    """The paths of the calls that fastft.generate served."""
    paths, generate = [], decoding.generate

    def watched(*args, **kwargs):
        out = generate(*args, **kwargs)
        paths.append(out.stats.path)
        return out

    monkeypatch.setattr(decoding, "generate", watched)
    return paths


IDS = torch.tensor([[5, 9, 3, 7], [0, 0, 11, 2]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
CASES = [
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.7, "top_k": 9},
    {"do_sample": False, "return_dict_in_generate": True, "output_scores": True},
    {"do_sample": True, "num_return_sequences": 3},
    {"num_beams": 3, "do_sample": False},
    {"num_beams": 2, "do_sample": False, "return_dict_in_generate": True, "output_scores": True},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gives_what_it_gave(model, calls, case):
    case = {"attention_mask": MASK, "max_new_tokens": 8, **case}
    torch.manual_seed(1)
    before = model.generate(IDS, **case)
    fastft.patch(model)
    torch.manual_seed(1)
    after = model.generate(IDS, **case)
    assert calls == ["model.generate" if "num_beams" in case else "decoder_layer"]
    if not case.get("return_dict_in_generate"):
        assert type(after) is type(before) and torch.equal(after, before)
        return
    assert torch.equal(after.sequences, before.sequences)
    for ours, theirs in zip(after.scores, before.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_positional_arguments_and_a_config(model, calls):
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.return_dict_in_generate = 5, True
    before = model.generate(IDS, config, None, None)
    fastft.patch(model)
    after = model.generate(IDS, config, None, None)
    assert torch.equal(after.sequences, before.sequences) and calls == ["decoder_layer"]


def test_is_undone(model):
    fastft.patch(model)
    assert "generate" in vars(model)
    twin = copy.deepcopy(model)
    assert twin.generate.__self__ is twin
    fastft.unpatch(model)
    assert "generate" not in vars(model)


def test_somebodys_own_generate_is_kept(model):
    def own(*args, **kwargs):
        return "own"

    model.generate = own
    report = fastft.patch(model)
    assert model.generate is own and "generate was replaced" in str(report)
    fastft.unpatch(model)
    assert model.generate is own


def test_inside_peft_and_as_an_assistant(model, calls):
    from peft import LoraConfig, get_peft_model

    assistant = copy.deepcopy(model)
    wanted = model.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    fastft.patch(assistant)
    assisted = model.generate(IDS[:1], max_new_tokens=8, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, wanted)
    calls.clear()
    peft = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False)).eval()
    wanted = peft.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False)
    fastft.patch(peft)
    out = peft.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False)
    assert torch.equal(out, wanted) and calls == ["decoder_layer"]


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_of_peft_are_not_left_out(model, kind):
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = peft.get_peft_model(model, config).eval()
    torch.nn.init.normal_(wrapped.prompt_encoder.default.embedding.weight)
    asked = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 8, "do_sample": False}
    wanted, without = wrapped.generate(**asked), model.generate(**asked)
    assert not torch.equal(wanted, without)
    fastft.patch(wrapped)
    assert torch.equal(wrapped.generate(**asked), wanted)
    assert torch.equal(model.generate(**asked), without)


def test_training_between_two_calls_is_seen(model):
    fastft.patch(model)
    model.generate(IDS, max_new_tokens=4, do_sample=False)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()
    out = model.generate(IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False)
    fastft.unpatch(model)
    wanted = model.generate(IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False)
    assert torch.equal(out, wanted)
