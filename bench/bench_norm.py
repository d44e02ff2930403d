"""norm, forward and backward, at SmolLM2-135M's and BERT-base's sizes, against eager."""

import pytest
import torch

from fastft.ops.norm import layer_norm, rms_norm

TOKENS = 512


def eager_rms_norm(x, weight):
    """transformers' LlamaRMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


@pytest.mark.parametrize("hidden, kind", [(576, "rms"), (768, "layer")])
def bench_norm(versus, hidden, kind):
    x = torch.randn(TOKENS, hidden, requires_grad=True)
    weight, bias = torch.ones(hidden), torch.zeros(hidden)
    dy = torch.randn(TOKENS, hidden)

    def step(forward):
        return torch.autograd.grad(forward(), x, dy)[0]

    if kind == "rms":
        sides = {
            "eager": lambda: step(lambda: eager_rms_norm(x, weight)),
            "fastft": lambda: step(lambda: rms_norm(x, weight)),
        }
    else:
        sides = {
            "eager": lambda: step(
                lambda: torch.nn.functional.layer_norm(x, (hidden,), weight, bias)
            ),
            "fastft": lambda: step(lambda: layer_norm(x, weight, bias)),
        }
    versus(
        f"{kind} norm {TOKENS}x{hidden} fp32 fwd+bwd",
        sides,
        at_least=1.5,
        check=lambda r: torch.testing.assert_close(r["eager"], r["fastft"], rtol=1e-4, atol=1e-5),
        rounds=99,
    )
