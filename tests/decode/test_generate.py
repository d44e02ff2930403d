"""fastft.generate without drafts gives what model.generate gives, whatever it is asked for."""

import pytest
import torch
from decoders import BOS, CONFIGS, EOS, FUSED, PAD, VOCABULARY, padded, prompt, tiny
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.tokenization_utils_base import BatchEncoding

import fastft
from fastft.decode.cache_name import own_name
from fastft.decode.output import GenerateOutput


def same(model, inputs, path="decoder_layer", **kwargs):
    """Runs both, and asserts that the tokens are equal; returns both outputs."""
    torch.manual_seed(5)
    theirs = model.generate(**inputs, **kwargs, return_dict_in_generate=True)
    torch.manual_seed(5)
    ours = fastft.generate(model, inputs, **kwargs)
    assert ours.stats.path == path, ours.stats.reason
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    return ours, theirs


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy(kind):
    model, path = tiny(kind), "decoder_layer" if kind in FUSED else "model.generate"
    same(model, {"input_ids": prompt(1, 9)}, path, max_new_tokens=24)
    same(model, padded([9, 5, 1]), path, max_new_tokens=24)


@pytest.mark.parametrize("kind", FUSED)
def test_rows_decode_as_alone_wherever_their_padding_is(kind):
    model, lengths = tiny(kind), [4, 9, 7]
    x = padded(lengths, "right")
    x["attention_mask"][1, 3] = 0  # a hole
    out = fastft.generate(model, x, max_new_tokens=12).sequences[:, 9:]
    for row, keep in enumerate(x["attention_mask"].bool()):
        alone = model.generate(x["input_ids"][row, keep][None], max_new_tokens=12)
        new = alone[0, int(keep.sum()) :].tolist()
        assert out[row].tolist() == new + [PAD] * (12 - len(new))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_weights(half):
    """Not equal to eager's tokens, whose activations are rounded: to those of widened weights."""
    model = tiny("llama").to(half)
    out = fastft.generate(model, padded([6, 3]), max_new_tokens=8, output_logits=True)
    wide = model.float().generate(
        **padded([6, 3]), max_new_tokens=8, output_logits=True, return_dict_in_generate=True
    )
    gap = (out.logits[0] - wide.logits[0]).norm() / wide.logits[0].norm()
    assert 0 < gap < 0.02  # the cache is of the half type


def some_eos(model, inputs) -> int:
    """A token that some rows reach early and others late or never."""
    out = model.generate(**inputs, max_new_tokens=16)[:, inputs["input_ids"].shape[1] :]
    first = {
        token: [row.index(token) if token in row else 99 for row in out.tolist()]
        for token in out.flatten().tolist()
    }
    token = max(first, key=lambda t: len(set(first[t])))
    assert len(set(first[token])) > 1 and min(first[token]) < 10
    return token


def test_rows_end_apart_and_are_padded():
    model, x = tiny("llama"), padded([7, 4, 9, 5])
    eos = some_eos(model, x)
    ours, theirs = same(
        model, x, eos_token_id=eos, max_new_tokens=16, output_scores=True, output_logits=True
    )
    ends = [(row == eos).nonzero() for row in ours.sequences[:, 9:]]
    for kind in ("scores", "logits"):
        for i, (mine, its) in enumerate(zip(ours[kind], theirs[kind], strict=True)):
            for row, end in enumerate(ends):
                if len(end) == 0 or i <= end[0]:
                    torch.testing.assert_close(mine[row], its[row], atol=1e-4, rtol=1e-4)
                else:
                    assert not mine[row].any()
    same(model, x, eos_token_id=[eos, 5], max_new_tokens=16)
    same(model, x, eos_token_id=eos, pad_token_id=7, max_new_tokens=16)


def only_even(row, ids):
    """Depends on the row's place in the batch."""
    return list(range(3 + row, VOCABULARY, 2))


ASKED = {
    "max_length": {"max_length": 17},
    "min_new_tokens": {"min_new_tokens": 10, "max_new_tokens": 14},
    "min_length": {"min_length": 14, "max_new_tokens": 14},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[62], [13, 28], [96, 96]]},
    "suppress": {"suppress_tokens": list(range(10, 60)), "begin_suppress_tokens": [70, 71]},
    "forced_eos": {"forced_eos_token_id": 9},
    "forced_bos": {"forced_bos_token_id": 9},
    "sequence_bias": {"sequence_bias": [[[5], 3.0], [[7, 8], 5.0]]},
    "prefix": {"prefix_allowed_tokens_fn": only_even},
    "encoder_penalty": {"encoder_repetition_penalty": 1.5},
    "encoder_ngram": {"encoder_no_repeat_ngram_size": 1},
    "guidance": {"guidance_scale": 1.5},
    "decay": {"exponential_decay_length_penalty": (3, 1.3)},
    "config": {"generation_config": GenerationConfig(
        max_new_tokens=9, repetition_penalty=1.3, pad_token_id=PAD, eos_token_id=EOS)},
    "sample": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "min_p": {"do_sample": True, "min_p": 0.1, "renormalize_logits": True},
    "typical": {"do_sample": True, "typical_p": 0.7},
    "epsilon": {"do_sample": True, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01},
    "penalty": {"do_sample": True, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.mark.parametrize("asked", ASKED)
def test_asked(llama, asked):
    kwargs = dict(ASKED[asked])
    if "max_length" not in kwargs and asked != "config":
        kwargs.setdefault("max_new_tokens", 12)
    plain = {"max_new_tokens": kwargs.get("max_new_tokens", 12)}
    plain["do_sample"] = kwargs.get("do_sample", False)
    ends = {} if asked == "config" else {"eos_token_id": 28}
    width = 1 if asked == "forced_bos" else 8  # it is for prompts of one token
    before, changes = llama.generation_config.to_dict(), []
    for x, more in ((padded([7, 4]), ends), ({"input_ids": prompt(1, width)}, {})):
        ours, _ = same(llama, x, **kwargs, **more)
        torch.manual_seed(5)
        changes.append(ours.sequences.tolist() != llama.generate(**x, **plain, **more).tolist())
    assert any(changes), "what is asked for makes no difference here"
    assert llama.generation_config.to_dict() == before


def test_inputs_of_every_form(llama):
    ids = prompt(2, 6)
    want = llama.generate(ids, max_new_tokens=6).tolist()
    mask = torch.ones_like(ids)
    for args, kwargs in (
        ((ids,), {}),
        ((ids.int(),), {}),
        ((), {"input_ids": ids, "attention_mask": mask}),
        ((), {"inputs": ids}),
        (({"input_ids": ids},), {"attention_mask": mask.bool()}),
        ((BatchEncoding({"input_ids": ids, "attention_mask": mask}),), {}),
    ):
        assert fastft.generate(llama, *args, **kwargs, max_new_tokens=6).sequences.tolist() == want
    from_bos = fastft.generate(llama, max_new_tokens=6).sequences
    assert from_bos.tolist() == llama.generate(max_new_tokens=6).tolist()
    assert from_bos[0, 0] == BOS


def test_seed_is_of_this_call_alone(llama):
    ids, kwargs = prompt(2, 6), {"do_sample": True, "max_new_tokens": 10}
    models = llama, tiny("gemma2")
    torch.manual_seed(3)
    want = llama.generate(ids, **kwargs)
    state = torch.get_rng_state()
    for model in models:
        first = fastft.generate(model, ids, seed=3, **kwargs)
        assert torch.equal(first.sequences, fastft.generate(model, ids, seed=3, **kwargs).sequences)
        other = fastft.generate(model, ids, seed=4, **kwargs).sequences
        assert first.sequences.tolist() != other.tolist()
        if model is llama:
            assert torch.equal(first.sequences, want)
        else:
            assert first.stats.path == "model.generate"
    assert torch.equal(torch.get_rng_state(), state)


class Watch(LogitsProcessor, StoppingCriteria):
    """A processor, and a criterion, that remembers what it was shown."""

    def __init__(self, answer):
        self.shown, self.answer = [], answer

    def __call__(self, input_ids, scores):
        if isinstance(scores, tuple):
            scores = [s.tolist() for s in scores]
        self.shown.append((input_ids.tolist(), scores if scores is None else len(scores)))
        return self.answer(input_ids, scores)


def test_processors_and_criteria_see_the_batch_as_in_transformers(llama):
    x, seen = padded([7, 4, 6]), []
    for call in (llama.generate, lambda **kw: fastft.generate(llama, **kw).sequences):
        processor = Watch(lambda ids, scores: scores.roll(int(ids[:, -1].sum()) % 3, 1))
        criterion = Watch(lambda ids, scores: (ids[:, -1] % 7 == 0) & (ids.shape[1] > 9))
        tokens = call(
            **x, max_new_tokens=14, eos_token_id=[EOS],
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList([criterion]),
        )  # fmt: skip
        seen.append((tokens.tolist(), processor.shown, criterion.shown))
    assert seen[0] == seen[1]
    assert len(seen[0][2]) > 3


def test_criteria_are_given_scores(llama):
    ids = prompt(2, 5)
    shapes = []

    def criterion(ids, scores, **kwargs):
        shapes.append([tuple(s.shape) for s in scores])
        return torch.zeros(len(ids), dtype=torch.bool)

    fastft.generate(
        llama, ids, max_new_tokens=3, stopping_criteria=[criterion], output_scores=True,
        eos_token_id=None,
    )  # fmt: skip
    assert shapes == [[(2, VOCABULARY)] * n for n in (1, 2, 3)]


def test_a_row_that_a_criterion_ended_is_padded_also_without_eos(llama):
    llama.generation_config.eos_token_id, held = None, llama.generation_config.eos_token_id
    try:
        out = fastft.generate(
            llama, prompt(2, 5), max_new_tokens=6, pad_token_id=PAD,
            stopping_criteria=[lambda ids, scores, **kw: torch.tensor([ids.shape[1] >= 7, False])],
        )  # fmt: skip
        assert out.sequences[0, 7:].tolist() == [PAD] * 4
        assert (out.sequences[1, 5:] != PAD).all()
    finally:
        llama.generation_config.eos_token_id = held


def test_max_time_ends(llama):
    out = fastft.generate(llama, prompt(1, 5), max_new_tokens=40, max_time=0.0)
    assert out.sequences.shape[1] == 6


def test_output_and_statistics(llama):
    x = padded([7, 4])
    out = fastft.generate(llama, x, max_new_tokens=9, eos_token_id=None)
    stats = out.stats
    assert isinstance(out, GenerateOutput) and out.scores is None and out.logits is None
    assert (stats.path, stats.reason, stats.speculation) == ("decoder_layer", None, None)
    assert (stats.rows, stats.prompt_tokens, stats.new_tokens, stats.steps) == (2, 11, 18, 8)
    assert stats.drafted == stats.accepted == [0, 0] and stats.acceptance == 0
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0 and stats.peak_memory > 0
    assert stats.tokens_per_second == 16 / stats.decode_seconds
    none = fastft.generate(llama, x, max_new_tokens=0, output_scores=True, output_logits=True)
    assert torch.equal(none.sequences, x["input_ids"])
    assert none.scores == none.logits == () and none.stats.new_tokens == 0


def test_a_long_limit_takes_no_memory_for_what_never_comes(llama):
    out = fastft.generate(llama, prompt(1, 4), max_length=10**6, max_time=0.0)
    assert out[own_name()].capacity < 2000


def test_long_prompts_are_cut_into_chunks():
    model = tiny("mistral", max_position_embeddings=600)
    same(model, {"input_ids": prompt(2, 300)}, max_new_tokens=4)


def test_a_window_wider_than_the_confirmation_counts():
    same(tiny("mistral", sliding_window=11), {"input_ids": prompt(2, 9)}, max_new_tokens=12)


def test_training_in_place_is_seen(llama):
    model, ids = tiny("llama", seed=3), prompt(1, 6)
    first, _ = same(model, {"input_ids": ids}, max_new_tokens=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    second, _ = same(model, {"input_ids": ids}, max_new_tokens=10)
    model.model.layers[0].mlp.down_proj.weight.data.neg_()
    third, _ = same(model, {"input_ids": ids}, max_new_tokens=10)
    assert len({tuple(out.sequences[0].tolist()) for out in (first, second, third)}) == 3


def test_a_patched_model_decodes_the_same():
    model, x = tiny("llama"), padded([7, 4])
    want = model.generate(**x, max_new_tokens=10)
    with fastft.patched(model):
        out = fastft.generate(model, x, max_new_tokens=10)
    assert out.stats.path == "decoder_layer" and torch.equal(out.sequences, want)
