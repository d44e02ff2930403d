"""Drafts change neither greedy tokens, bit for bit, nor what processors, criteria and cache see."""

import pytest
import torch
from decoders import FUSED, padded, prompt, tiny

import fastft
from fastft.decode import weights
from fastft.decode.cache_name import own_name
from fastft.decode.exit_head import ExitHead

pytestmark = pytest.mark.usefixtures("every_draft")

KINDS = ("prompt_lookup", "draft", "modules", "exit")


def close_to(model):
    """A draft model that often agrees, and sometimes does not."""
    close = tiny("llama") if type(model).__name__.startswith("Llama") else None
    if close is None:
        return tiny("qwen3", seed=1)
    close.load_state_dict(model.state_dict())
    with torch.no_grad():
        close.lm_head.weight += 0.08 * torch.randn_like(close.lm_head.weight)
    return close


def draft_of(kind, model):
    if kind == "prompt_lookup":
        return kind
    if kind == "exit":
        return ExitHead(32, 2, rank=4)
    return close_to(model) if kind == "draft" else full_gemma()


def full_gemma():
    """A model that its own modules run, without a window, in which masked slots would count."""
    return tiny("gemma2", layer_types=["full_attention"] * 3)


def repeating(lengths, side="left"):
    """Padded prompts in which a few tokens come again and again."""
    x = padded(lengths, side)
    x["input_ids"] = torch.where(x["attention_mask"] > 0, x["input_ids"] % 2 + 10, 0)
    return x


@pytest.mark.parametrize("spec", KINDS)
@pytest.mark.parametrize("kind", FUSED)
def test_same_bits(kind, spec):
    if spec == "modules" and kind != "llama":
        pytest.skip("its drafts are as any others, and slow")
    same_bits(tiny(kind), spec)


@pytest.mark.parametrize("spec", KINDS)
def test_same_bits_of_half_weights(spec):
    same_bits(tiny("llama").to(torch.bfloat16), spec)


def same_bits(model, spec):
    drafts, drafted = draft_of(spec, model), 0
    for x in (repeating([12]), repeating([12, 1, 7]), repeating([3, 12, 5], "right")):
        plain = fastft.generate(model, x, max_new_tokens=25, output_logits=True)
        ours = fastft.generate(model, x, max_new_tokens=25, output_logits=True, speculation=drafts)
        assert ours.stats.path == "decoder_layer" and ours.stats.speculation
        drafted += sum(ours.stats.drafted)
        assert torch.equal(ours.sequences, plain.sequences)
        assert len(ours.logits) == len(plain.logits)
        for mine, its in zip(ours.logits, plain.logits, strict=True):
            assert torch.equal(mine, its)
    assert drafted > 0


def test_same_bits_with_weights_in_eight_bits():
    model = tiny("llama")
    weights.store(model, "int8")
    x = repeating([12, 1, 7])
    plain = fastft.generate(model, x, max_new_tokens=25)
    float_tokens = tiny("llama").generate(**x, max_new_tokens=25)
    assert plain.sequences.tolist() != float_tokens.tolist()  # the weights are read
    for kind in KINDS:
        ours = fastft.generate(model, x, max_new_tokens=25, speculation=draft_of(kind, model))
        assert torch.equal(ours.sequences, plain.sequences)


@pytest.mark.parametrize("spec", ["prompt_lookup", "draft"])
def test_models_of_modules_draft_too(spec):
    model = full_gemma()
    drafts, accepted = spec if spec == "prompt_lookup" else model, 0
    for x in (repeating([12]), repeating([12, 1, 7]), repeating([3, 12, 5], "right")):
        ours = fastft.generate(model, x, max_new_tokens=25, speculation=drafts, output_logits=True)
        assert not ours.logits[0].requires_grad
        assert ours.stats.path == "modules" and "Gemma2" in ours.stats.reason
        accepted += sum(ours.stats.accepted)
        for row, keep in enumerate(x["attention_mask"].bool()):
            alone = model.generate(x["input_ids"][row, keep][None], max_new_tokens=25)
            new = alone[0, int(keep.sum()) :].tolist()
            width = x["input_ids"].shape[1]
            assert ours.sequences[row, width : width + len(new)].tolist() == new
    assert accepted > 0


def allowed(row, ids):
    return range(3 + int(ids[-1]) % 3, 90, row + 2)


ASKED = {
    "penalty": {"repetition_penalty": 1.1, "no_repeat_ngram_size": 4},
    "minimum": {"min_new_tokens": 8, "eos_token_id": [28, 62, 11, 12]},
    "bad_words": {"bad_words_ids": [[11, 12], [30]], "forced_eos_token_id": 9},
    "prefix": {"prefix_allowed_tokens_fn": allowed},
    "encoder": {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 3},
}  # fmt: skip


@pytest.mark.parametrize("spec", KINDS)
@pytest.mark.parametrize("asked", ASKED)
def test_processors_see_the_drafts(asked, spec):
    model, drafted = tiny("llama"), 0
    for x in (repeating([12]), repeating([12, 7, 9])):
        kwargs = {"max_new_tokens": 20, "output_scores": True, **ASKED[asked]}
        plain = fastft.generate(model, x, **kwargs)
        ours = fastft.generate(model, x, **kwargs, speculation=draft_of(spec, model))
        assert torch.equal(ours.sequences, plain.sequences)
        assert all(map(torch.equal, ours.scores, plain.scores))
        drafted += sum(ours.stats.drafted)
    assert drafted > 0


def test_a_perfect_draft_that_ends_in_the_middle():
    model = tiny("llama")
    x = padded([9, 5])
    plain = fastft.generate(model, x, max_new_tokens=20)
    eos = int(plain.sequences[0, 12])
    for kwargs in (
        {"eos_token_id": eos},
        {"stopping_criteria": [lambda ids, s, **k: (ids[:, -1] == eos) & (len(s[-1]) == len(ids))],
         "output_scores": True},
    ):  # fmt: skip
        plain = fastft.generate(model, x, max_new_tokens=20, **kwargs)
        ours = fastft.generate(model, x, max_new_tokens=20, **kwargs, speculation=model)
        assert ours.sequences.tolist() == plain.sequences.tolist()
        assert ours[own_name()].lengths == plain[own_name()].lengths
        assert ours[own_name()].tokens == plain[own_name()].tokens
        if "output_scores" in kwargs:
            assert len(ours.scores) == len(plain.scores)
            assert all(map(torch.equal, ours.scores, plain.scores))  # zeros behind a row's end
        assert all(ours.stats.accepted) and ours.stats.steps < plain.stats.steps


def test_criteria_are_asked_about_every_accepted_token():
    lengths = []

    def criterion(ids, scores, **kwargs):
        lengths.append(ids.shape[1])
        return torch.zeros(len(ids), dtype=torch.bool)

    model = tiny("llama")
    fastft.generate(
        model, prompt(1, 5), max_new_tokens=10, stopping_criteria=[criterion], speculation=model
    )
    assert lengths == list(range(6, 16))


def test_statistics_add_up():
    model, x = tiny("llama"), repeating([12, 5])
    out = fastft.generate(model, x, max_new_tokens=20, eos_token_id=None, speculation=model)
    stats = out.stats
    assert stats.drafted == stats.accepted and stats.acceptance == 1
    assert stats.tried_at == stats.accepted_at
    assert stats.new_tokens == 40 == 2 + sum(stats.accepted) + 2 * stats.steps
    out = fastft.generate(
        model, x, max_new_tokens=20, eos_token_id=None, speculation=close_to(model)
    ).stats
    assert 0 < out.acceptance < 1 and out.speculation == "draft model LlamaForCausalLM"
    assert sum(out.accepted_at) == sum(out.accepted) and out.new_tokens == 40
    tried, accepted = out.tried_at, out.accepted_at + [0] * 5
    assert all(t >= a for t, a in zip(tried, accepted, strict=False))
    # A later token is tried where the one before was accepted, and was not the draft's last.
    assert all(t <= a for t, a in zip(tried[1:], accepted, strict=False))


def test_positions_limit_drafts():
    model = tiny("gpt2", n_positions=24)
    want = model.generate(repeating([12])["input_ids"], max_new_tokens=12)
    for draft in (model, tiny("gpt2", n_positions=16), "prompt_lookup"):
        out = fastft.generate(model, repeating([12]), max_new_tokens=12, speculation=draft)
        assert torch.equal(out.sequences, want)


def test_what_keeps_a_state_is_not_drafted_for():
    out = fastft.generate(
        tiny("llama"), prompt(1, 5), max_new_tokens=6, guidance_scale=1.5,
        speculation="prompt_lookup",
    )  # fmt: skip
    assert "ClassifierFree" in out.stats.speculation and out.stats.drafted == [0]
