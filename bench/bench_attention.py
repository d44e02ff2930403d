"""attention over packed sequences, forward and backward, against PyTorch's own CPU flash kernel.

"eager" calls scaled_dot_product_attention once per sequence, which is what a packed batch takes;
"batched" gives it all sequences at once, which only a batch of one length allows.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastft.ops.attention import attention

RAGGED = [13, 47, 22, 60, 35, 10, 51, 29, 18, 44, 38, 26, 57, 15, 33, 41]
FLOPS = 400e9  # what oneDNN's float32 product reaches on 2 cores of a Zen 5
CASES = {
    "SmolLM2 4x128, heads 9/3x64, causal": ([128] * 4, 9, 3, 64, True, 1.5),
    "long 1x2048, heads 9/3x64, causal": ([2048], 9, 3, 64, True, 1.5),
    "BERT 16 of 10-60, heads 12x32": (RAGGED, 12, 12, 32, False, 2.0),
    "BERT 2x512, heads 12x64": ([512] * 2, 12, 12, 64, False, 1.2),
}


def _side(query, key, value, causal):
    """(sequences, tokens, heads, head_dim) in and out."""
    return scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        is_causal=causal,
        enable_gqa=query.shape[2] != key.shape[2],
    ).transpose(1, 2)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def bench_attention(versus, name, dtype):
    lengths, heads, kv_heads, dim, causal, aim = CASES[name]
    tokens = sum(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = (torch.randn(tokens, h, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dout = torch.randn(tokens, heads, dim, dtype=dtype)

    def step(forward):
        out = forward().reshape(tokens, heads, dim)
        return (out, *torch.autograd.grad(out, leaves, dout))

    def eager():
        parts = zip(*(x.split(lengths) for x in leaves), strict=True)
        return torch.cat([_side(*(x[None] for x in part), causal)[0] for part in parts])

    sides = {
        "eager": lambda: step(eager),
        "fastft": lambda: step(lambda: attention(*leaves, cu, causal=causal)),
    }
    if len(set(lengths)) == 1 and len(lengths) > 1:
        sides["batched"] = lambda: step(
            lambda: _side(*(x.unflatten(0, (len(lengths), -1)) for x in leaves), causal)
        )
    tolerance = 1e-4 if dtype is torch.float32 else 5e-2
    short = tokens * max(lengths) < 2**18
    # 2 products forward and 5 backward, each of 2 operations per pair and column.
    pairs = sum(n * (n + 1) / 2 if causal else n * n for n in lengths)
    versus(
        f"attention, {name}, {str(dtype)[6:]}",
        sides,
        at_least=aim if dtype is torch.float32 else None,
        floor=14 * pairs * heads * dim / FLOPS if dtype is torch.float32 else None,
        check=lambda r: torch.testing.assert_close(
            r["eager"], r["fastft"], rtol=tolerance, atol=tolerance
        ),
        rounds=(29 if short else 5) if dtype is torch.float32 else (9 if short else 3),
    )
