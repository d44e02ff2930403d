"""What tried to make patched encoders wrong in silence: each case here did, once."""

import importlib

import pytest
import torch
import transformers
from encoders import batch, encoder
from test_encoders import assert_same, packed, step  # noqa: F401

import fastft


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "roberta"])
def test_another_attention_chosen_after_patching(name):
    """Its mask would not keep packed rows apart."""
    model, inputs = encoder(name, "TokenClassification"), batch("TokenClassification")
    wanted = step(model, inputs)
    fastft.patch(model)
    model.set_attn_implementation("sdpa")
    assert_same(step(model, inputs), wanted)


def test_models_that_share_a_configuration():
    config = encoder("bert", "TokenClassification").config
    one, other = (transformers.BertForTokenClassification(config).eval() for _ in range(2))
    inputs = batch("TokenClassification")
    wanted = step(other, inputs)
    fastft.patch(one)
    fastft.patch(other)
    fastft.unpatch(one)
    assert_same(step(other, inputs), wanted)


class Weighted(transformers.BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if labels is not None:
            weight = torch.tensor([1.0, 5.0])
            output["loss"] = torch.nn.functional.cross_entropy(output.logits, labels, weight=weight)
        return output


def test_a_loss_of_ones_own_is_kept_and_told():
    model, inputs = encoder("bert", "SequenceClassification", num_labels=2), {}
    model.__class__ = Weighted
    inputs = batch("SequenceClassification") | {"labels": torch.tensor([0, 1, 1, 0])}
    wanted = step(model, inputs)
    report = fastft.patch(model)
    assert [e for e in report.left if "not one of transformers'" in e.reason]
    assert_same(step(model, inputs), wanted)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_a_loss_function_of_ones_own(name, when):
    head = "SequenceClassification" if name == "llama" else "MaskedLM"
    model, inputs = encoder(name, head), batch(head)
    real = model.loss_function

    def own(*args, **kwargs):
        return 3 * real(*args, **kwargs)

    if when == "before":
        model.loss_function = own
    else:
        fastft.patch(model)
        model.loss_function = own
    got = step(model, inputs)
    fastft.unpatch(model)
    wanted = step(model, inputs)
    if when == "before":
        fastft.patch(model)
        got = step(model, inputs)
    assert_same(got, wanted)


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_heads_that_read_padded_places(kind):
    model = encoder("electra", "MultipleChoice", summary_type=kind).train()
    inputs = batch("MultipleChoice")
    wanted = step(model, inputs)
    report = fastft.patch(model)
    assert [e for e in report.swapped if "it reads padded places" in e.reason]
    assert_same(step(model, inputs), wanted)


def test_noise_on_embeddings_sees_the_rows_as_they_were(packed):  # noqa: F811
    model, inputs = encoder("bert", "TokenClassification"), batch("TokenClassification")
    fastft.patch(model)
    shapes = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, given, out: shapes.append(tuple(out.shape[:2]))
    )
    model(**inputs)
    assert shapes == [(4, 11)]
    hook.remove()
    packed.clear()
    model.enable_input_require_grads()  # a hook that looks at nothing
    model(**inputs)
    assert packed == [int(inputs["attention_mask"].sum())]


def test_configurations_that_ask_for_tuples():
    model, inputs = encoder("bert", "SequenceClassification"), batch("SequenceClassification")
    model.config.return_dict = False
    wanted = model(**inputs)
    fastft.patch(model)
    for ours, theirs in zip(model(**inputs), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_patch_that_fails_leaves_nothing(monkeypatch):
    model = encoder("bert", "SequenceClassification")

    def broken(module):
        raise MemoryError

    monkeypatch.setattr(importlib.import_module("fastft.patch.heads"), "recognise", broken)
    before = model.config._attn_implementation
    with pytest.raises(MemoryError):
        fastft.patch(model)
    assert model.config._attn_implementation == before
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_masks_by_layer_type():
    model, inputs = encoder("modernbert", "TokenClassification"), batch("TokenClassification")
    full = inputs["attention_mask"].bool()[:, None, None, :].expand(4, 1, 11, 11)
    inputs["attention_mask"] = {"full_attention": full, "sliding_attention": full}
    wanted = model(**inputs).loss
    fastft.patch(model)
    torch.testing.assert_close(model(**inputs).loss, wanted, rtol=1e-5, atol=1e-6)


def test_soft_masks_with_weights_asked_for():
    model, inputs = encoder("bert", "TokenClassification"), batch("TokenClassification", "none")
    model.set_attn_implementation("eager")
    inputs["attention_mask"] = -3 * torch.rand(3, 1, 11, 11)
    wanted = model(**inputs, output_attentions=True)
    fastft.patch(model)
    got = model(**inputs, output_attentions=True)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.attentions[1], wanted.attentions[1], rtol=1e-4, atol=1e-6)


def test_scores_read_after_unpatch():
    model, inputs = encoder("bert", "MaskedLM").train(), batch("MaskedLM")
    real = inputs["attention_mask"].bool()
    wanted = model(**inputs).logits
    fastft.patch(model)
    output = model(**inputs)
    fastft.unpatch(model)
    torch.testing.assert_close(output.logits[real], wanted[real], rtol=2e-5, atol=2e-5)
