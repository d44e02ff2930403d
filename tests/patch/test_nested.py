"""A patched model called while another one runs: what the other was told is not meant for it."""

import pytest
import torch
from encoders import batch, encoder

import fastft
from fastft.patch.swap import undo

HEAD = "TokenClassification"


def assert_unmoved(teacher, inputs, student, place, labelled):
    """The teacher's logits, asked for by a hook on the student's `place`, are as they are alone."""
    inputs = {k: v for k, v in inputs.items() if k != "labels"}
    real = inputs["attention_mask"].bool()

    def answer():
        logits = teacher(**inputs).logits
        return logits[real] if logits.shape[:2] == real.shape else logits

    with torch.no_grad():
        wanted, got = answer(), []

    @torch.no_grad()
    def ask(*_):
        if not got:  # a model that teaches itself comes by here again
            got.append(None)
            got[0] = answer()

    handle = student.get_submodule(place).register_forward_hook(ask)
    student(**labelled)
    handle.remove()
    torch.testing.assert_close(got[0], wanted, rtol=1e-5, atol=1e-5)


PLACES = {"bert": "bert.encoder.layer.0", "modernbert": "model.layers.0"}


@pytest.mark.parametrize("padding", ["right", "left", "empty"])
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("teacher", ["bert", "roberta", "gpt2", "itself"])
def test_a_teacher_inside_a_packed_forward(teacher, name, padding):
    student = encoder(name, HEAD)
    head = "SequenceClassification" if teacher == "gpt2" else HEAD
    other = student if teacher == "itself" else encoder(teacher, head, seed=1)
    fastft.patch(student)
    fastft.patch(other)
    assert_unmoved(other, batch(head, padding, seed=1), student, PLACES[name], batch(HEAD))


def test_a_teacher_that_keeps_its_padding_inside_a_packed_forward():
    """Its attention is ours all the same, and asks for a mask."""
    student, teacher = encoder("bert", HEAD), encoder("roberta", HEAD, seed=1)
    fastft.patch(student)
    fastft.patch(teacher)
    undo(teacher.roberta)
    undo(teacher.roberta.encoder)
    assert_unmoved(teacher, batch(HEAD, "left"), student, PLACES["bert"], batch(HEAD))


def test_weights_asked_of_another_model():
    """Only eager attention gives them, and it would not keep packed rows apart."""
    student, teacher = encoder("bert", HEAD), encoder("roberta", HEAD, seed=1)
    for model in (student, teacher):
        model.set_attn_implementation("eager")
        fastft.patch(model)
    labelled = batch(HEAD) | {"output_attentions": True}
    assert_unmoved(teacher, batch(HEAD, seed=1), student, PLACES["bert"], labelled)


@pytest.mark.parametrize("same", [True, False])
def test_a_teacher_inside_a_head_that_sees_labelled_places_alone(same):
    student = encoder("bert", "MaskedLM").train()
    teacher = student if same else encoder("bert", "MaskedLM", seed=1)
    fastft.patch(student)
    if not same:
        fastft.patch(teacher)
    labelled, inputs = batch("MaskedLM"), batch("MaskedLM", seed=1)
    assert_unmoved(teacher, inputs, student, "cls", labelled)
