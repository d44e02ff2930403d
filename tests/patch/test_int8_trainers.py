"""An int8 base under Trainer and SFTTrainer: nearly the float32 run, and checkpoints of PEFT."""

import pytest
import torch
from models import batch, causal_lm, with_lora
from peft import PeftModel
from safetensors.torch import load_file
from test_trainers import history, sft, trained

from fastft.ops.quantized_layer import quantized_layers
from fastft.patch import patch, unpatch


def plain():
    return with_lora(causal_lm("llama"))


def over_int8():
    model = plain()
    patch(model, base_weights="int8")
    return model


SETTINGS = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_trainer(tmp_path, settings):
    wanted = trained(tmp_path / "plain", plain, "never", **settings)
    got = trained(tmp_path / "int8", over_int8, "never", **settings)
    assert quantized_layers(got.model)
    assert history(got, "loss") == pytest.approx(history(wanted, "loss"), rel=0.01)
    assert history(got, "grad_norm") == pytest.approx(history(wanted, "grad_norm"), rel=0.05)


def test_checkpoints_are_adapters_of_the_full_base(tmp_path):
    got = trained(tmp_path, over_int8, "never", save_strategy="steps", save_steps=3)
    folder = tmp_path / "never" / "checkpoint-3"
    assert not any("base_layer" in n for n in load_file(folder / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(causal_lm("llama"), folder).eval()
    model, inputs = got.model.eval(), batch("none")
    with torch.no_grad():
        near, exact = model(**inputs).logits, loaded(**inputs).logits
    assert (near - exact).norm() < 0.05 * exact.norm()
    merged = loaded.merge_and_unload()
    unpatch(model)
    torch.testing.assert_close(merged(**inputs).logits, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"packing": True}], ids=str)
def test_sft_trainer(tmp_path, settings):
    wanted, *_ = sft(tmp_path / "plain", plain, "never", **settings)
    got, _, shapes = sft(tmp_path / "int8", over_int8, "never", **settings)
    assert quantized_layers(got.model)
    assert all(shape[0] == 1 for shape in shapes), "rows are laid end to end"
    assert history(got, "loss") == pytest.approx(history(wanted, "loss"), rel=0.01)
