"""What is confirmed of one module holds for it as it will run, and is not taken for another."""

import pytest
import torch
from models import batch, causal_lm
from test_patch import assert_same_step, gradients
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP

from fastft.patch import patch


class DropsItsOutput(LlamaMLP):
    """As Seed-OSS does."""

    def forward(self, x):
        return F.dropout(super().forward(x), self.rate, self.training)


class DropsInside(LlamaMLP):
    """As GTE and T5Gemma do."""

    def forward(self, x):
        return self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("kind", [DropsItsOutput, DropsInside])
def test_dropout_that_evaluation_mode_hides(kind, rate):
    model, inputs = causal_lm("llama"), batch("none")
    for layer in model.model.layers:
        layer.mlp.__class__, layer.mlp.rate = kind, rate
        layer.mlp.dropout = torch.nn.Dropout(rate).eval()

    def step():
        torch.manual_seed(7)
        return gradients(model.train(), inputs)

    wanted, wanted_grads = step()
    report = patch(model.eval())
    assert report.count("gated_mlp") == (0 if rate else 2), str(report)
    assert not any(module.training for module in model.modules())
    got, grads = step()
    torch.testing.assert_close(got.loss, wanted.loss)
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("other", [torch.nn.GELU(), F.gelu, torch.nn.Tanh()], ids=str)
def test_an_activation_of_one_layer_alone(other):
    """Classes, sizes and settings are the same."""
    model = causal_lm("llama").train()
    mlp = model.model.layers[1].mlp
    del mlp.act_fn
    mlp.act_fn = other
    report = patch(model)
    assert report.count("gated_mlp") == (1 if type(other) is torch.nn.Tanh else 2), str(report)
    assert_same_step(model, batch("right"))


def test_two_models_of_one_class():
    """Configurations differ, of which modules hold nothing but a reference."""
    pair = torch.nn.ModuleList(causal_lm("granite", logits_scaling=scale) for scale in (4.0, 0.5))
    assert patch(pair).count("linear_cross_entropy") == 2
    for model in pair:
        assert_same_step(model.train(), batch("right"))
