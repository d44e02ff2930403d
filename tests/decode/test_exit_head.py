"""Drafts from a model's own first layers: nothing changes but the speed, and training pays."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fastft
from fastft.decode.cache_name import own_name
from fastft.decode.exit_head import OUTSIDE, ExitHead
from fastft.decode.generate import generate
from fastft.decode.linears import DECODE_WEIGHT
from fastft.decode.step import FusedStep
from fastft.decode.train_draft import DraftTrainer, decoding_step, train_draft

pytestmark = pytest.mark.usefixtures("every_draft")

VOCABULARY, HIDDEN, LAYERS = 96, 32, 4


def llama(**settings):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.1, bos_token_id=0, eos_token_id=1, pad_token_id=2, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2(dropout=0.0):
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=128,
        initializer_range=0.1, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def lora(model, targets=("q_proj", "down_proj")):
    model = get_peft_model(model, LoraConfig(r=4, target_modules=list(targets)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model.eval()


MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "lora": lambda: lora(llama()),
    "lora_head": lambda: lora(llama(), ("q_proj", "lm_head")),
    "patched": lambda: patched(lora(llama())),
}


def patched(model, **settings):
    fastft.patch(model, **settings)
    return model


def exit_head(exit_layer=3, vocabulary=None, seed=0):
    """One that corrects something, so that its drafts are now right, now wrong."""
    generator = torch.Generator().manual_seed(seed)
    head = ExitHead(HIDDEN, exit_layer, 4, vocabulary, generator)
    head.b.data.normal_(std=0.02, generator=generator)
    return head


def prompts(rows=3, width=9):
    ids = torch.randint(3, VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def texts(model, rows=24, length=40):
    """What the model itself says: there a head can be right."""
    start = torch.randint(3, VOCABULARY, (rows, 2), generator=torch.Generator().manual_seed(5))
    out = generate(model, start, max_new_tokens=length, do_sample=True, seed=0, eos_token_id=None)
    return out.sequences.tolist()


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


def acceptance(model, head):
    """Share of positions where head and model agree on the next token."""
    target = decoding_step(model)
    agree = []
    with torch.no_grad():
        for row in texts(model, rows=4):
            one = target.new_cache(1, len(row)), target.new_cache(1, len(row))
            ours = head.step(target)(one[0], [row], len(row))
            theirs = target(one[1], [row], len(row))
            agree.append(ours.argmax(-1) == theirs.argmax(-1))
    return float(torch.cat(agree).float().mean())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "patched"])
def test_training_pays(kind):
    model, losses = MODELS[kind](), []
    head = train_draft(
        model, texts(model), exit_layer=3, rank=16, lr=1e-2, steps=40,
        progress=lambda step, loss: losses.append((step, loss)),
    )  # fmt: skip
    assert [step for step, _ in losses] == list(range(40))
    assert losses[-1][1] < losses[0][1]
    untrained = ExitHead(HIDDEN, 3, 16)
    assert acceptance(model, head) > acceptance(model, untrained) + 0.1


def test_the_seed_decides():
    model, rows = llama(), [[5, 6, 7, 8], [9, 10], [11, 12, 13]]

    def trained(seed):
        head = train_draft(model, rows, rank=4, steps=3, batch_tokens=5, seed=seed)
        return list(head.parameters())

    torch.manual_seed(1)
    first, other = trained(0), trained(1)
    assert all(map(torch.equal, first, trained(0)))
    assert not any(map(torch.equal, first, other))


def test_the_model_is_left_as_it_was():
    model = lora(gpt2(dropout=0.1), ("c_attn",)).train()
    model.base_model.model.transformer.h[1].eval()  # modes may be mixed
    loss = model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()

    def state():
        grads = [p.grad for p in model.parameters()]
        return (
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [None if g is None else g.clone() for g in grads],
            [p.detach().clone() for p in model.parameters()],
            [torch.get_rng_state()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            [sorted(vars(m)) for m in model.modules()],
        )

    before = state()
    train_draft(model, [[3, 4, 5, 6]] * 4, rank=2, steps=2)
    for old, new in zip(before, state(), strict=True):
        assert len(old) == len(new)
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_vocabulary_of_the_frequent():
    rows = [[9, 9, 9, 4, 4, 90], [9, 4, 50, 50]]
    head = train_draft(llama(), rows, vocabulary=3, rank=2, steps=1)
    assert head.vocabulary.tolist() == [4, 9, 50]
    # Too few in data: the lowest ids fill it.
    head = train_draft(llama(), rows, vocabulary=6, rank=2, steps=1)
    assert head.vocabulary.tolist() == [0, 1, 4, 9, 50, 90]
    assert train_draft(llama(), rows, vocabulary=VOCABULARY, rank=2, steps=1).vocabulary is None
    target = FusedStep(llama())
    scores = ExitHead(HIDDEN, 1, 2, torch.tensor([4, 9])).step(target)(
        target.new_cache(1, 4), [[1, 2]]
    )
    assert scores.shape == (1, VOCABULARY)
    assert (scores[0] > OUTSIDE).nonzero()[:, 0].tolist() == [4, 9]


def test_data_comes_in_many_forms():
    ids = [[5, 6, 7, 8, 9], [11, 12, 13]]
    model = llama()

    def trained(data):
        return [p.clone() for p in train_draft(model, data, rank=4, steps=3).parameters()]

    expected = trained(ids)
    padded = torch.tensor([[5, 6, 7, 8, 9], [2, 2, 11, 12, 13]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    same = [
        [torch.tensor(row) for row in ids],
        [{"input_ids": row} for row in ids],
        [{"input_ids": padded, "attention_mask": mask}],
        ({"input_ids": row} for row in ids),
    ]
    for data in same:
        assert all(torch.equal(a, b) for a, b in zip(trained(data), expected, strict=True))
    # Only what leads to a label counts: the token before it.
    labels = torch.tensor([[-100, -100, 7, -100, -100], [-100] * 5])
    some = trained([{"input_ids": padded, "attention_mask": mask, "labels": labels}])
    cut = trained([{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}])
    assert all(torch.equal(a, b) for a, b in zip(some, cut, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(some, expected, strict=True))


@pytest.mark.parametrize("vocabulary", [None, torch.arange(0, VOCABULARY, 2)])
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_trained_is_what_drafts(kind, vocabulary):
    target, head = decoding_step(MODELS[kind]()), exit_head(vocabulary=vocabulary)
    head.gain.data.uniform_(0.5, 2)
    row = list(range(3, 20))
    *_, hidden = head.step(target).states(target.new_cache(1, 17), [row])
    trained = DraftTrainer(target, head).logits(hidden).detach()
    drafts = head.step(target)(target.new_cache(1, 17), [row], len(row))
    drafts = drafts if vocabulary is None else drafts[:, vocabulary]
    assert torch.allclose(trained, drafts, atol=1e-4)


def test_beside_a_fine_tune():
    """hidden_states and logits of the model's own forward train it as train_draft does."""
    model, rows = llama(), [[5, 6, 7, 8, 9, 10]]
    ours = train_draft(model, rows, exit_layer=2, rank=4, steps=1, seed=4)
    head = ExitHead(HIDDEN, 2, 4, None, torch.Generator().manual_seed(4))
    trainer = DraftTrainer(model, head)
    out = model(input_ids=torch.tensor(rows), output_hidden_states=True)
    hidden, logits = out.hidden_states[2][0], out.logits[0].detach()
    p, q = logits.softmax(-1), trainer.logits(hidden).softmax(-1).detach()
    expected = float((p - q).abs().sum(-1).mean() / 2)  # the total variation distance
    assert trainer.step(hidden, logits) == pytest.approx(expected)
    assert all(
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(ours.parameters(), head.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="expected 6 rows, got 5"):
        trainer.step(hidden, logits[:5])
    with pytest.raises(ValueError, match="hidden: expected"):
        trainer.step(hidden[None], logits)


@pytest.mark.parametrize("chunk", [1, 96, 96 * 4 + 1])
def test_chunks_change_nothing(chunk, monkeypatch):
    rows = [[5, 6, 7, 8, 9, 10], [3, 4]]
    model = llama()
    whole = train_draft(model, rows, rank=4, steps=2)
    monkeypatch.setattr("fastft.decode.train_draft.CHUNK", chunk)
    cut = train_draft(model, rows, rank=4, steps=2)
    assert torch.allclose(whole.gain, cut.gain, atol=1e-5)


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


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ([[1, 2]], {"exit_layer": LAYERS}, "exit_layer: expected 1 to 3, got 4"),
        ([[1, 2]], {"exit_layer": 0}, "exit_layer: expected 1 to 3, got 0"),
        ([[1, 2]], {"steps": 0}, "steps: expected at least 1"),
        ([[1, 2]], {"batch_tokens": 0}, "batch_tokens: expected at least 1"),
        ([[1, 2]], {"vocabulary": 0}, "vocabulary: expected at least 1"),
        ([[1, 2]], {"rank": 0}, "rank"),
        ([], {}, "data: expected texts"),
        ([{"input_ids": [1, 2], "labels": [-100, -100]}], {}, "data: expected texts"),
        ([[1, 96]], {}, "token ids 1 to 96, the model has 96"),
        ([{"text": "a"}], {}, r"input_ids, got one with \['text'\]"),
        ([torch.ones(3)], {}, "expected token ids, got torch.float32"),
        ([{"input_ids": [1, 2], "labels": [1]}], {}, r"of the shape \(2,\)"),
    ],
)
def test_training_refuses(data, settings, message):
    with pytest.raises(ValueError, match=message):
        train_draft(llama(), data, **settings)


def test_models_without_a_fused_step_are_refused():
    model = llama()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="cannot draft for it: hooks on"):
        train_draft(model, [[1, 2]])
    # And decoding says so rather than going without.
    with pytest.raises(ValueError, match="decoder_layer covers"):
        drafted(model, prompts(), exit_head(), max_new_tokens=4)
