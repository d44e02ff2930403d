"""Patched tiny models of every architecture against their unpatched selves, on the GPU."""

import pytest
import torch
from models import ARCHITECTURES, batch, causal_lm, with_lora
from test_patch import assert_no_further_from_float64, assert_same_step

from fastft.patch import patch


def ready(name: str, device: str, padding: str = "right", lora: bool = False, dtype=torch.float32):
    """A patched model in training mode, and a batch."""
    model = causal_lm(name)
    model = (with_lora(model) if lora else model).to(device, dtype).train()
    report = patch(model)
    assert report.count("linear_cross_entropy") == 1 and report.count("attention") == 2, str(report)
    return model, {key: value.to(device) for key, value in batch(padding).items()}


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_fine_tuning_step_is_the_same(device, name, padding):
    assert_same_step(*ready(name, device, padding))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_step_is_the_same(device, name):
    assert_same_step(*ready(name, device, lora=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_half_precision_is_no_further_from_float64(device, name, lora, dtype):
    model, inputs = ready(name, device, lora=lora, dtype=dtype)
    assert_no_further_from_float64(model, inputs)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_forward_is_the_same(device, name):
    model, inputs = ready(name, device)
    model.eval()
    with torch.no_grad():
        wanted = model(**inputs)
        got = torch.compile(model)(**inputs)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-5, atol=0)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], wanted.logits[real], rtol=1e-4, atol=1e-4)


def test_a_wrong_label_does_not_harm_the_next_step(device):
    model, inputs = ready("llama", device)
    wrong = inputs["labels"].clone()
    wrong[0, 5] = 10_000
    try:
        assert model(**{**inputs, "labels": wrong}).loss.isnan()
    except ValueError as error:
        assert "10000" in str(error)
    assert_same_step(model, inputs)
