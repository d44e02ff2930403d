"""What transformers' common modelling tests ask of every model, asked of the patched one: each
behaviour gives what the same model gives unpatched."""

import copy

import pytest
import torch
from encoders import batch as encoder_batch
from encoders import encoder
from models import VOCABULARY, batch, causal_lm

import fastft

HEAD = "TokenClassification"  # of BERT
NAMES = ("bert", "gpt2", "llama", "qwen3", "gemma2")


def pair(name: str, **settings):
    """The same model unpatched and patched, and a padded batch with labels."""
    if name == "bert":
        model, inputs = encoder("bert", HEAD, **settings), encoder_batch(HEAD)
    else:
        model, inputs = causal_lm(name, **settings), batch("right")
    patched = copy.deepcopy(model)
    fastft.patch(patched)
    return model, patched, inputs


def unlabelled(inputs: dict) -> dict:
    return {k: v for k, v in inputs.items() if k != "labels"}


def assert_same(got, wanted, keep=None) -> None:
    assert got.shape == wanted.shape
    if keep is not None:
        got, wanted = got[keep], wanted[keep]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def assert_same_step(patched, model, inputs) -> None:
    real = inputs["attention_mask"].bool()
    ours, theirs = patched(**inputs), model(**inputs)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    assert_same(ours.logits, theirs.logits, real)
    ours.loss.backward()
    theirs.loss.backward()
    largest = max(p.grad.norm() for p in model.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(patched.named_parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            gap = (ours.grad - theirs.grad).norm()
            assert gap <= 1e-4 * max(theirs.grad.norm(), 1e-2 * largest), name


@pytest.mark.parametrize("name", NAMES)
class TestCommonModelling:
    @torch.no_grad()
    def test_batch_size_invariance(self, name):
        model, patched, inputs = pair(name)
        inputs, real = unlabelled(inputs), inputs["attention_mask"].bool()
        together = patched(**inputs).logits
        for row in range(len(real)):
            alone = patched(**{k: v[row : row + 1] for k, v in inputs.items()}).logits
            assert_same(alone, together[row : row + 1], real[row : row + 1])
        assert_same(together, model(**inputs).logits, real)

    @torch.no_grad()
    def test_left_padding_is_right_padding(self, name):
        _, patched, _ = pair(name)
        row, logits = torch.randint(3, VOCABULARY, (5,)), []
        for places in (slice(3, 8), slice(0, 5)):
            ids, mask = torch.ones(2, 8).long(), torch.ones(2, 8).long()
            ids[0, places], mask[0] = row, 0
            mask[0, places] = 1
            given = {"input_ids": ids, "attention_mask": mask}
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
            logits.append(patched(**given).logits[0, places])
        assert_same(*logits)

    def test_save_and_load(self, name, tmp_path):
        model, patched, inputs = pair(name)
        patched.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        for (key, ours), theirs in zip(
            loaded.state_dict().items(), model.state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs), key
        assert loaded.config._attn_implementation == model.config._attn_implementation
        fastft.patch(loaded)
        with torch.no_grad():
            given, real = unlabelled(inputs), inputs["attention_mask"].bool()
            assert_same(loaded(**given).logits, model(**given).logits, real)

    def test_resized_embeddings(self, name):
        model, patched, inputs = pair(name)
        for each in (model, patched):
            torch.manual_seed(3)
            each.resize_token_embeddings(VOCABULARY + 7, mean_resizing=False)
        inputs["input_ids"][0, 1] = VOCABULARY + 5
        assert_same_step(patched, model, inputs)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, name, reentrant):
        model, patched, inputs = pair(name)
        for each in (model, patched):
            each.train()
            each.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_same_step(patched, model, inputs)

    @torch.no_grad()
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_hidden_states_and_attentions(self, name, attention):
        if name == "gemma2" and attention == "sdpa":
            pytest.skip("Gemma 2 has no sdpa: it caps its scores")
        model, patched, inputs = pair(name)
        fastft.unpatch(patched)
        for each in (model, patched):
            each.set_attn_implementation(attention)
        fastft.patch(patched)
        asked = unlabelled(inputs) | {"output_hidden_states": True}
        asked["output_attentions"] = attention == "eager"
        ours, theirs = patched(**asked), model(**asked)
        real = inputs["attention_mask"].bool()
        for field in ("hidden_states", "attentions"):
            got, wanted = getattr(ours, field) or (), getattr(theirs, field) or ()
            assert len(got) == len(wanted)
            for a, b in zip(got, wanted, strict=True):
                kept = a if a.dim() == 3 else a.transpose(1, 2)
                assert_same(kept, b if b.dim() == 3 else b.transpose(1, 2), real)
        layers = model.config.num_hidden_layers
        assert len(theirs.hidden_states) == layers + 1
        assert attention == "sdpa" or len(theirs.attentions) == layers

    @pytest.mark.parametrize("padding", ["none", "right", "left"])
    def test_step_in_training_mode(self, name, padding):
        model, patched, inputs = pair(name)
        if name == "bert":
            inputs = encoder_batch(HEAD, padding)
        else:
            inputs = batch(padding)
        assert_same_step(patched.train(), model.train(), inputs)

    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_weights(self, name, tied):
        model, patched, inputs = pair(name, tie_word_embeddings=tied)
        if name != "bert":
            head = patched.get_output_embeddings().weight
            assert (head is patched.get_input_embeddings().weight) is tied
        assert_same_step(patched, model, inputs)
        fastft.unpatch(patched)
        assert {n for n, _ in patched.named_parameters()} == {
            n for n, _ in model.named_parameters()
        }

    @torch.no_grad()
    def test_cache_continues(self, name):
        if name == "bert":
            pytest.skip("an encoder has no cache")
        model, patched, inputs = pair(name)
        ids = inputs["input_ids"][1:2]
        whole = model(input_ids=ids).logits
        begun = patched(input_ids=ids[:, :7], use_cache=True)
        cache = begun.get("cache") if "cache" in begun else begun.past_key_values
        key = "cache" if "cache" in begun else "past_key_values"
        after = patched(input_ids=ids[:, 7:], **{key: cache})
        assert_same(torch.cat((begun.logits, after.logits), 1), whole)

    def test_inputs_embeds(self, name):
        model, patched, inputs = pair(name)
        ids = inputs.pop("input_ids")
        embeds = model.get_input_embeddings()(ids).detach()
        if name == "gemma2":
            assert_same(embeds, patched.get_input_embeddings()(ids).detach())
        assert_same_step(patched, model, inputs | {"inputs_embeds": embeds})
