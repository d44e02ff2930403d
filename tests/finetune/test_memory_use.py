"""What a step holds, counted by hand on two layers."""

import torch
from torch import nn

from fastft.finetune import memory_use

FLOAT = 4  # bytes


def test_what_two_layers_hold():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    with memory_use.kept_for_backward(model) as kept:
        model(torch.randn(3, 4)).sum()
    # Both layers' inputs; the second is also what tanh keeps, once.
    assert sum(kept.values()) == FLOAT * (3 * 4 + 3 * 8)
    model[0].requires_grad_(False)
    held = {"weights": FLOAT * 58, "gradients": FLOAT * 18, "optimizer": 2 * FLOAT * 18}
    assert memory_use.of_weights(model) == held
