"""What model.generate must serve: the same result, and the reason in the statistics."""

import pytest
import torch
from decoders import VOCABULARY, padded, prompt, tiny
from transformers import (
    GraniteConfig,
    MambaConfig,
    SeedOssConfig,
    T5Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import fastft


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def same(model, inputs, reason, **kwargs):
    torch.manual_seed(1)
    want = model.generate(**inputs, **kwargs, return_dict_in_generate=True)
    torch.manual_seed(1)
    out = fastft.generate(model, inputs, **kwargs)
    assert out.stats.path == "model.generate" and reason in out.stats.reason
    assert torch.equal(out.sequences, want.sequences)
    assert set(want) == set(out) and type(want) is type(out)  # scores of beams and the like too
    assert out.stats.rows == len(out.sequences)
    return out


ASKED = {
    "beams": ({"num_beams": 3}, "beam_search"),
    "beam sample": ({"num_beams": 3, "do_sample": True}, "beam_sample"),
    "beam scores": ({"num_beams": 2, "num_return_sequences": 2, "output_scores": True}, "beam"),
    "attentions": ({"output_attentions": True}, "attentions"),
    "hidden states": ({"output_hidden_states": True}, "hidden states"),
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "static": ({"cache_implementation": "static"}, "static"),
    "lookup": ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
}


@pytest.mark.parametrize("asked", ASKED)
def test_asked(llama, asked):
    kwargs, reason = ASKED[asked]
    x = {"input_ids": prompt(1, 6)} if asked == "lookup" else padded([7, 4])
    out = same(llama, x, reason, **kwargs, max_new_tokens=8)
    assert out.stats.speculation is None
    drafted = fastft.generate(llama, x, **kwargs, max_new_tokens=8, speculation="prompt_lookup")
    assert "none: " in drafted.stats.speculation


def test_tokens_are_counted(llama):
    """As where the loop here serves: to each row's end, and none of its padding."""
    x = padded([7, 4])
    plain = fastft.generate(llama, x, max_new_tokens=8)
    # The token with which the second row goes on ends it.
    eos = int(plain.sequences[1, x["input_ids"].shape[1] + 2])
    for options in ({"eos_token_id": eos, "pad_token_id": 0}, {"eos_token_id": None}):
        ours = fastft.generate(llama, x, max_new_tokens=8, **options).stats
        theirs = same(llama, x, "use_cache", use_cache=False, max_new_tokens=8, **options).stats
        assert (theirs.prompt_tokens, theirs.new_tokens) == (ours.prompt_tokens, ours.new_tokens)
        assert theirs.tokens_per_second > 0


def test_arguments(llama):
    ids = prompt(1, 6)
    same(llama, {"input_ids": ids}, "assistant_model", assistant_model=tiny(seed=1),
         max_new_tokens=6)  # fmt: skip
    embeds = llama.get_input_embeddings()(ids)
    out = same(llama, {"inputs_embeds": embeds}, "inputs_embeds", max_new_tokens=6)
    assert out.stats.new_tokens == 6
    positions = torch.arange(6)[None] + 3
    same(llama, {"input_ids": ids, "position_ids": positions}, "position_ids", max_new_tokens=6)

    def custom(model, input_ids, **kwargs):
        return input_ids.flip(1)

    out = fastft.generate(llama, ids, custom_generate=custom)
    assert torch.equal(out.sequences, ids.flip(1)) and out.stats.reason


def test_encoder_decoder():
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
                      decoder_start_token_id=0)  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    out = same(model, padded([6, 3], "right"), "encoder-decoder", max_new_tokens=6,
               output_attentions=True)  # fmt: skip
    assert out.cross_attentions and out.stats.new_tokens == 12
    with pytest.raises(ValueError, match="speculation: no draft model"):
        fastft.generate(tiny(), prompt(1, 4), speculation=model, max_new_tokens=4)


@pytest.fixture(scope="module")
def mamba():
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4,
                         pad_token_id=0)  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_models_with_a_state(mamba, llama):
    same(mamba, {"input_ids": prompt(2, 6)}, "", max_new_tokens=6)
    out = fastft.generate(mamba, prompt(1, 6), max_new_tokens=6, speculation="prompt_lookup")
    assert "rolled back" in out.stats.reason and "none" in out.stats.speculation
    with pytest.raises(ValueError, match="speculation: no draft model.*rolled back"):
        fastft.generate(llama, prompt(1, 4), speculation=mamba, max_new_tokens=4)


def test_models_that_look_like_llama_and_compute_something_else():
    config = GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, residual_multiplier=0.4, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    out = same(model, padded([6, 3]), "differ", max_new_tokens=6)
    assert "it computes something else" in out.stats.reason


def test_hooks_and_own_forwards_are_not_passed_over():
    model, x = tiny(), padded([6, 3])
    plain = fastft.generate(model, x, max_new_tokens=8).sequences
    handle = model.model.layers[1].mlp.register_forward_hook(lambda m, args, out: -out)
    assert not torch.equal(same(model, x, "hooks", max_new_tokens=8).sequences, plain)
    handle.remove()
    own = model.model.layers[0].self_attn.o_proj
    own.forward = lambda x: torch.zeros(*x.shape[:-1], own.out_features)
    assert not torch.equal(same(model, x, "forward", max_new_tokens=8).sequences, plain)
    del own.forward
    assert torch.equal(fastft.generate(model, x, max_new_tokens=8).sequences, plain)


def test_dropout_that_is_no_module():
    """In evaluation mode the step computes the model, and that stays known."""
    config = SeedOssConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
        attention_dropout=0.0, residual_dropout=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert fastft.generate(model, prompt(1, 4), max_new_tokens=3).stats.path == "decoder_layer"
    same(model.train(), padded([6, 3]), "training mode with dropout", max_new_tokens=6)


def test_dropout_in_training_mode():
    model = tiny("gpt2").train()
    same(model, padded([6, 3]), "training mode with dropout", max_new_tokens=6)
    assert model.training
    llama = tiny("llama").train()  # has none
    assert fastft.generate(llama, prompt(1, 4), max_new_tokens=3).stats.path == "decoder_layer"
