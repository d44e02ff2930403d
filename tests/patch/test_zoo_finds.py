"""What the zoo of architectures has found, each held by the smallest model that shows it."""

import pytest
import torch
import transformers
from models import VOCABULARY

import fastft
from fastft.patch.trial import windows_shortened
from tests.zoo.check import journey, step
from tests.zoo.tiny import cases

CASES = {case.name: case for case in cases()}
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip


def built(name: str):
    model = CASES[name].build()
    return model, fastft.patch(model)


def reasons(report) -> str:
    return "\n".join(entry.reason for entry in report.left)


@pytest.mark.parametrize("name", ["bert-causal", "hunyuan_v1_moe-causal", "fuyu-causal"])
def test_first_token_predicted_from_left_padding_under_a_head_that_is_kept(name):
    """The padded place in front of a row predicts its first token, and that counts in the loss."""
    case, model = CASES[name], CASES[name].build()
    labelled = case.batch("left")
    labelled["labels"] = labelled["input_ids"].masked_fill(labelled["attention_mask"] == 0, -100)
    wanted = step(model, labelled, True)[0]
    assert fastft.patch(model).count("padding") == 1
    torch.testing.assert_close(step(model, labelled, True)[0], wanted, rtol=1e-5, atol=0)


def test_gradient_of_a_query_that_sees_no_key_under_soft_capping():
    """Eager attention adds the mask, so such a query's scores have gradients."""
    case, model = CASES["gemma2-causal"], CASES["gemma2-causal"].build()
    labelled = case.batch("left")
    wanted = step(model, labelled, True)[2]["model.embed_tokens.weight"]
    fastft.patch(model)
    got = step(model, labelled, True)[2]["model.embed_tokens.weight"]
    assert (got - wanted).norm() <= 1e-4 * wanted.norm()


def test_values_narrower_than_keys():
    """Multi-head latent attention: the fused operator wants them alike."""
    model, report = built("deepseek_v3-token")
    assert report.count("attention") == 4 and report.count("padding") == 1
    assert fastft.verify(model, CASES["deepseek_v3-token"].batch("none")).ok


def test_attention_with_sinks_that_are_not_handed_over_is_kept():
    """Its padded trial raises; before, the attention stayed and was wrong by half."""
    model, report = built("hy_v4-causal")
    assert report.count("attention") == 0 and "attention" in reasons(report)
    assert model.config._attn_implementation != "fastft"


def test_attention_that_is_causal_by_its_mask_alone_is_kept():
    """Without padding no mask is made, and such a module says that it is not causal."""
    _, report = built("bigbird_pegasus-sequence")
    assert report.count("attention") == 0


def test_a_configuration_is_not_set_for_a_part_of_what_attends_by_it():
    model, _ = built("bigbird_pegasus-sequence")
    assert not any("_fastft_attention" in vars(module) for module in model.modules())


def test_window_that_mask_and_module_count_differently():
    """T5Gemma's encoder masks distances above its window, and hands flash attention one less."""
    model, report = built("t5gemma-token")
    assert report.count("padding") == 0
    assert fastft.verify(model, CASES["t5gemma-token"].batch("right")).ok


def test_windows_are_given_back():
    config = transformers.ModernBertConfig(**SMALL, local_attention=7)
    model = transformers.ModernBertModel(config)
    before = config.to_dict(), [vars(m).get("sliding_window") for m in model.modules()]
    with windows_shortened(model):
        assert config.sliding_window == 2
    after = config.to_dict(), [vars(m).get("sliding_window") for m in model.modules()]
    assert after == before


@pytest.mark.parametrize("name", ["lfm2-causal", "phi-causal", "modernbert-decoder-causal"])
def test_a_decoder_with_parts_of_other_names_is_patched(name):
    """`patch` raised AttributeError: reading it for decoding looked for `norm`."""
    _, report = built(name)
    assert "made otherwise" in reasons(report) or report.count("decoder_layer")


def test_modules_called_with_more_than_was_confirmed():
    """Zamba2 hands its MLPs the number of the layer, Mamba its norms a gate."""
    journey(CASES["zamba2-causal"])


@pytest.mark.parametrize("name", ["mbart-causal", "mvp-causal", "gpt_neo-causal"])
def test_prompt_lookup_where_rows_depend_on_the_padding(name):
    """Drafts run a ragged batch through the model's modules, which must be confirmed."""
    case, model = CASES[name], CASES[name].build()
    prompts = {k: v for k, v in case.batch("left").items() if k != "labels"}
    out = fastft.generate(model, **prompts, max_new_tokens=3, speculation="prompt_lookup")
    assert out.stats.path == "model.generate"


def test_experts_with_their_balancing_loss():
    case, model = CASES["mixtral-causal"], CASES["mixtral-causal"].build()
    asked = case.batch("right") | {"output_router_logits": True}
    wanted = model(**asked)
    assert fastft.patch(model).count("linear_cross_entropy") == 1
    got = model(**asked)
    torch.testing.assert_close((got.loss, got.aux_loss), (wanted.loss, wanted.aux_loss))


def test_head_left_alone_is_guarded_once_and_given_back():
    model, report = built("bert-causal")
    assert "head and loss kept" in reasons(report)
    again = fastft.patch(model)
    assert "head and loss kept" in reasons(again) and again.count("linear_cross_entropy") == 0
    fastft.unpatch(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_that_takes_no_tokens_keeps_its_attention():
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=4,
    )  # fmt: skip
    report = fastft.patch(transformers.ViTModel(config))
    assert report.count("attention") == 0 and "attention not tried" in reasons(report)


def test_a_model_whose_configuration_holds_those_of_its_parts():
    """`patch` raised AttributeError: Gemma 3 with images names its vocabulary in `text_config`."""
    _, report = built("gemma3-causal")
    assert report.count("attention") == 4


def test_rotary_embedding_of_queries_alone_is_kept():
    _, report = built("qwen4_exp_text-causal")
    assert "rotary embedding kept: it may be called without k" in reasons(report)
    journey(CASES["qwen4_exp_text-causal"])
