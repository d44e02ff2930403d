"""gated_mlp, forward and backward, at SmolLM2-135M's sizes, against eager and its byte floor."""

import pytest
import torch
import torch.nn.functional as F

from fastft.ops.gated_mlp import gated_mlp

TOKENS, INTERMEDIATE = 512, 1536
EAGER = {"silu": F.silu, "gelu": F.gelu}


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("halves", [False, True], ids=["two tensors", "two halves"])
def bench_gated_mlp(versus, activation, halves):
    if halves:
        gate, up = torch.randn(TOKENS, 2 * INTERMEDIATE).chunk(2, -1)
    else:
        gate, up = torch.randn(2, TOKENS, INTERMEDIATE)
    gate, up = (x.detach().requires_grad_() for x in (gate, up))
    dh = torch.randn(TOKENS, INTERMEDIATE)

    def step(forward):
        h = forward()
        return h, *torch.autograd.grad(h, (gate, up), dh)

    versus(
        f"gated_mlp {activation} {TOKENS}x{INTERMEDIATE}{' halves' if halves else ''} fp32 fwd+bwd",
        {
            "eager": lambda: step(lambda: EAGER[activation](gate) * up),
            "fastft": lambda: step(lambda: gated_mlp(gate, up, activation)),
        },
        at_least=1.5,
        check=lambda r: torch.testing.assert_close(r["eager"], r["fastft"], rtol=1e-4, atol=1e-5),
        rounds=99,
    )
