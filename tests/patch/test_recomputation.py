"""Gradient checkpointing: what runs in backward is what ran in forward, or nothing does."""

from functools import partial

import pytest
import torch
from encoders import batch, encoder
from models import batch as lm_batch
from models import causal_lm
from torch.utils.checkpoint import checkpoint

import fastft

CASES = {
    "bert": "TokenClassification",
    "roberta": "SequenceClassification",
    "modernbert": "MaskedLM",
    "gpt2": "SequenceClassification",
    "llama": "CausalLM",
}


def model_and_batches(name: str):
    head = CASES[name]
    if head == "CausalLM":
        model, inputs = causal_lm(name), lm_batch("right")
    else:
        model, inputs = encoder(name, head), batch(head)
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    return model, (inputs, {k: v.flip(0) for k, v in inputs.items()})  # padded elsewhere


def gradients(model) -> torch.Tensor:
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(grads)


def assert_same(got, wanted):
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", CASES)
def test_two_forwards_before_their_backwards(name):
    model, batches = model_and_batches(name)

    def step():
        losses = [model(**inputs).loss for inputs in batches]
        for loss in losses:
            loss.backward()
        return gradients(model)

    wanted = step()
    fastft.patch(model)
    assert_same(step(), wanted)


@pytest.mark.parametrize("name", CASES)
def test_backward_after_unpatch_is_refused(name):
    model, (inputs, _) = model_and_batches(name)
    with fastft.patched(model):
        loss = model(**inputs).loss
    with pytest.raises(RuntimeError, match="unpatched between forward and backward"):
        loss.backward()
    model(**inputs).loss.backward()  # the next step is the model's own


def test_another_attention_chosen_between_forward_and_backward_is_refused():
    model, (inputs, _) = model_and_batches("bert")
    fastft.patch(model)
    loss = model(**inputs).loss
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()


@pytest.mark.parametrize("name", CASES)
def test_backward_after_unpatch_without_checkpointing(name):
    """Nothing is recomputed: the graph has all it needs."""
    model, (inputs, _) = model_and_batches(name)
    model.gradient_checkpointing_disable()
    model(**inputs).loss.backward()
    wanted = gradients(model)
    with fastft.patched(model):
        loss = model(**inputs).loss
    loss.backward()
    assert_same(gradients(model), wanted)


def test_a_whole_encoder_checkpointed_by_its_user():
    """What packs its rows must be known in backward, too, when the base model is not running."""
    model, (inputs, _) = model_and_batches("roberta")
    model.gradient_checkpointing_disable()
    model(**inputs).loss.backward()
    wanted = gradients(model)
    fastft.patch(model)
    encoder = model.roberta.encoder
    encoder.forward = partial(checkpoint, encoder.forward, use_reentrant=False)
    model(**inputs).loss.backward()
    assert_same(gradients(model), wanted)
