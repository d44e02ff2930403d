"""Peak extra memory, forward and backward, against vocabulary and length: eager, PyTorch's, fastft.

Head and loss at SmolLM2's width, and causal attention over one sequence. "formula" is attention as
transformers' `eager` implementation writes it, with a matrix of all pairs.
"""

import pytest
import torch
from torch.nn import functional as F

from bench.gpu.peers import torch_linear_cross_entropy
from fastft.ops.attention import attention
from fastft.ops.linear_cross_entropy import Head, linear_cross_entropy

TOKENS, HIDDEN = 1024, 576
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64


@pytest.mark.parametrize("vocabulary", [8192, 16384, 32768, 65536, 131072])
def bench_vocabulary(versus, vocabulary):
    x = (torch.randn(TOKENS, HIDDEN) * 2).requires_grad_()
    weight = torch.randn(vocabulary, HIDDEN) * 0.04
    labels = torch.randint(0, vocabulary, (TOKENS,))

    def step(loss):
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    def chunked():
        function = torch_linear_cross_entropy()
        return lambda: step(function(x, weight, labels))

    def check(results):
        torch.testing.assert_close(results["eager"], results["fastft"], rtol=1e-4, atol=1e-5)

    title = f"head and loss, {TOKENS} tokens, frozen head, fp32"
    versus(
        f"{title}, vocabulary {vocabulary}",
        {
            "eager": lambda: step(F.cross_entropy(F.linear(x, weight), labels)),
            "fastft": lambda: step(linear_cross_entropy(x, Head(weight), labels)),
        },
        peers={"F.linear_cross_entropy": chunked},
        check=check,
        memory=True,
        rounds=3,
        at=(title, "vocabulary", vocabulary),
    )


def formula(query, key, value):
    """transformers' eager_attention_forward with a causal mask, (1, heads, tokens, head_dim)."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * HEAD_DIM**-0.5
    hidden = torch.full(scores.shape[2:], torch.finfo(scores.dtype).min).triu(1)
    return torch.softmax(scores + hidden, -1) @ value


@pytest.mark.parametrize("tokens", [256, 512, 1024, 2048, 4096])
def bench_length(versus, tokens):
    leaves = [
        torch.randn(tokens, heads, HEAD_DIM, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    ends = torch.tensor([0, tokens])
    dout = torch.randn(tokens, HEADS, HEAD_DIM)

    def step(out):
        return torch.autograd.grad(out, leaves, dout)

    def rows(function, **options):
        """A function of (batch, heads, tokens, head_dim), for the one sequence."""
        sequence = (x.transpose(0, 1)[None] for x in leaves)
        return step(function(*sequence, **options)[0].transpose(0, 1))

    def check(results):
        for name in ("formula", "fastft"):
            torch.testing.assert_close(results[name], results["eager"], rtol=1e-4, atol=1e-4)

    title = f"attention, causal, heads {HEADS}/{KV_HEADS}x{HEAD_DIM}, fp32"
    eager = F.scaled_dot_product_attention
    versus(
        f"{title}, {tokens} tokens",
        {
            "eager": lambda: rows(eager, is_causal=True, enable_gqa=True),
            "formula": lambda: rows(formula),
            "fastft": lambda: step(attention(*leaves, ends, causal=True)),
        },
        check=check,
        memory=True,
        rounds=3,
        at=(title, "tokens", tokens),
    )
