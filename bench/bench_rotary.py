"""rotary, forward and backward, at SmolLM2-135M's sizes, against transformers' function."""

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fastft.ops.rotary import rotary

BATCH, TOKENS, HEADS, KV_HEADS, HEAD_DIM = 4, 128, 9, 3, 64


def bench_rotary(versus):
    q, k = (
        torch.randn(BATCH, TOKENS, n, HEAD_DIM).transpose(1, 2).requires_grad_()
        for n in (HEADS, KV_HEADS)
    )
    angle = torch.randn(1, TOKENS, HEAD_DIM // 2).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    dq, dk = torch.randn(q.shape), torch.randn(k.shape)

    def step(function):
        y = function(q, k, cos, sin)
        return *y, *torch.autograd.grad(y, (q, k), (dq, dk))

    versus(
        f"rotary {BATCH}x{HEADS}+{KV_HEADS}x{TOKENS}x{HEAD_DIM} fp32 fwd+bwd",
        {
            "eager": lambda: step(apply_rotary_pos_emb),
            "fastft": lambda: step(rotary),
        },
        at_least=1.5,
        check=lambda r: torch.testing.assert_close(r["eager"], r["fastft"], rtol=1e-4, atol=1e-5),
        rounds=99,
    )
