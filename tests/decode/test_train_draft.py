"""Training of an ExitHead: it pays, what is trained is what drafts, and the model stays."""

import pytest
import torch
from decode.exit_models import (
    HIDDEN,
    LAYERS,
    MODELS,
    VOCABULARY,
    exit_head,
    gpt2,
    llama,
    lora,
    texts,
)

from fastft.decode.exit_head import OUTSIDE, ExitHead
from fastft.decode.step import FusedStep
from fastft.decode.train_draft import DraftTrainer, decoding_step, train_draft


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
    model = llama()

    def trained():
        losses = []
        head = train_draft(
            model, [[5, 6, 7, 8, 9, 10], [3, 4]], rank=4, steps=2,
            progress=lambda step, loss: losses.append(loss),
        )  # fmt: skip
        return head, losses

    whole, wanted = trained()
    monkeypatch.setattr("fastft.decode.train_draft.CHUNK", chunk)
    cut, losses = trained()
    assert losses == pytest.approx(wanted, rel=1e-5)
    for ours, theirs in zip(cut.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


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
