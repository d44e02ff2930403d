"""Drafts from a model's own first layers: nothing changes but the speed."""

import copy

import pytest
import torch
from decode.exit_models import HIDDEN, LAYERS, MODELS, VOCABULARY, exit_head, llama, patched

from fastft.decode.cache_name import own_name
from fastft.decode.exit_head import ExitHead
from fastft.decode.generate import generate
from fastft.decode.linears import DECODE_WEIGHT

pytestmark = pytest.mark.usefixtures("every_draft")


def prompts(rows=3, width=9):
    ids = torch.randint(3, VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def drafted(model, inputs, head, **settings):
    return generate(model, inputs, speculation=head, **settings)


@pytest.mark.parametrize("vocabulary", [None, torch.arange(0, VOCABULARY, 2)])
@pytest.mark.parametrize("kind", MODELS)
def test_greedy_tokens_are_the_same(kind, vocabulary):
    model, head = MODELS[kind](), exit_head(vocabulary=vocabulary)
    settings = {"max_new_tokens": 40, "do_sample": False, "output_logits": True}
    plain = generate(model, prompts(), **settings)
    fast = drafted(model, prompts(), head, **settings)
    assert torch.equal(fast.sequences, plain.sequences)
    # Bit for bit, not merely up to ties.
    for ours, theirs in zip(fast.logits, plain.logits, strict=True):
        assert torch.equal(ours, theirs)
    assert sum(fast.stats.drafted) > 0 and fast.stats.speculation
    assert 0 < sum(fast.stats.accepted) < sum(fast.stats.drafted)


def test_rows_that_end_are_the_same():
    model = llama()
    free = generate(model, prompts(), max_new_tokens=40, eos_token_id=None).sequences
    # A token in the middle of each row's answer: rows end at different places, inside drafts.
    ends = [int(row[9 + at]) for row, at in zip(free, (5, 13, 21), strict=True)]
    plain = generate(model, prompts(), max_new_tokens=40, eos_token_id=ends)
    fast = drafted(model, prompts(), exit_head(), max_new_tokens=40, eos_token_id=ends)
    assert torch.equal(fast.sequences, plain.sequences)
    assert plain.sequences.shape[1] < free.shape[1]


def test_quantised_copies_are_drafted_from():
    model = patched(llama(), decode_weights="int8")
    assert any(DECODE_WEIGHT in vars(m) for m in model.modules())
    head = exit_head(vocabulary=torch.arange(1, VOCABULARY, 3))
    plain = generate(model, prompts(), max_new_tokens=24)
    fast = drafted(model, prompts(), head, max_new_tokens=24)
    assert torch.equal(fast.sequences, plain.sequences)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.3}, {"top_k": 1}])
def test_sampling_runs(settings):
    head = exit_head(vocabulary=torch.arange(0, VOCABULARY, 2))
    model = llama()
    settings = {"do_sample": True, "max_new_tokens": 24, "seed": 3, **settings}
    first = drafted(model, prompts(), head, **settings)
    again = drafted(model, prompts(), head, **settings)
    assert torch.equal(first.sequences, again.sequences)
    assert sum(first.stats.drafted) > 0
    if settings.get("top_k") == 1:
        plain = generate(model, prompts(), **settings)
        assert torch.equal(first.sequences, plain.sequences)


def test_processors_may_rule_out_the_whole_vocabulary():
    head = exit_head(vocabulary=torch.arange(0, VOCABULARY, 2))
    # The processor leaves every score of the draft at -inf.
    out = drafted(
        llama(), prompts(), head, max_new_tokens=12, do_sample=True, seed=0, eos_token_id=None,
        suppress_tokens=list(range(0, VOCABULARY, 2)),
    )  # fmt: skip
    assert sum(out.stats.drafted) > 0
    assert bool((out.sequences[:, 9:] % 2 == 1).all())


def test_a_second_turn_equals_a_fresh_one():
    model, head = llama(), exit_head()
    settings = {"max_new_tokens": 15, "eos_token_id": None, "do_sample": False}
    first = drafted(model, prompts(), head, **settings)
    assert sum(first.stats.accepted) < sum(first.stats.drafted)  # some were taken back
    more = torch.full((3, 4), 7)
    inputs = torch.cat((first.sequences, more), 1)
    mask = torch.cat((prompts()["attention_mask"], torch.ones(3, 19, dtype=torch.long)), 1)
    inputs = {"input_ids": inputs, "attention_mask": mask}
    fresh = generate(model, inputs, **settings).sequences
    for speculation in (None, head):
        cache = copy.deepcopy(first[own_name()])
        held = generate(model, inputs, speculation=speculation, cache=cache, **settings).sequences
        assert torch.equal(held, fresh)


@pytest.mark.parametrize("vocabulary", [None, torch.tensor([3, 5, 8])])
def test_save_and_load(vocabulary, tmp_path):
    head = exit_head(vocabulary=vocabulary)
    head.gain.data.normal_()
    head.save(tmp_path / "head.safetensors")
    state = torch.get_rng_state()
    held = ExitHead.load(tmp_path / "head.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert (held.exit_layer, held.rank) == (head.exit_layer, head.rank)
    ours, theirs = held.state_dict(), head.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected a saved ExitHead"):
        ExitHead.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda: ExitHead(HIDDEN, LAYERS), "an exit behind layer 4 of a model of 4"),
        (lambda: ExitHead(HIDDEN * 2, 1), "hidden size of 64, the model has 32"),
        (lambda: ExitHead(HIDDEN, 1, vocabulary=torch.tensor([5, 96])), "token 96 of a model"),
        (lambda: ExitHead(HIDDEN, 0), "expected at least 1 each, got 0"),
        (lambda: ExitHead(HIDDEN, 1, 0), "expected at least 1 each, got 1 and 0"),
        (lambda: ExitHead(HIDDEN, 1, vocabulary=torch.tensor([5, 3])), "ascend"),
        (lambda: ExitHead(HIDDEN, 1, vocabulary=torch.tensor([-1, 3])), "ascend"),
        (lambda: ExitHead(HIDDEN, 1, vocabulary=torch.ones(3)), "torch.float32"),
    ],
)
def test_heads_that_do_not_fit(head, message):
    with pytest.raises(ValueError, match=message):
        drafted(llama(), prompts(), head(), max_new_tokens=4)


def test_models_without_a_fused_step_are_refused():
    model = llama()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    # Decoding says so rather than going without.
    with pytest.raises(ValueError, match="decoder_layer covers"):
        drafted(model, prompts(), exit_head(), max_new_tokens=4)
