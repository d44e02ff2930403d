"""decode_attention against PyTorch's scaled_dot_product_attention over the slots in use.

The floor is the larger of two times: in which memory gives the bytes of the slots in use, and in
which the two products are computed. Caches that stay in the processor's own can be below it.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastft.ops.decode_attention import decode_attention

HEADS = {"9/3x64": (9, 3, 64), "32/8x128": (32, 8, 128)}
BANDWIDTH = 47e9  # bytes per second that 2 cores of a Zen 5 read from memory
FLOPS = 400e9  # what oneDNN's float32 product reaches there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 8])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("context", [512, 4096])
@pytest.mark.parametrize("name", HEADS)
def bench_decode_attention(versus, name, context, batch, queries, dtype):
    heads, kv_heads, dim = HEADS[name]
    query = torch.randn(batch, queries, heads, dim, dtype=dtype)
    key, value = torch.randn(2, batch, kv_heads, context + 64, dim, dtype=dtype)
    lengths = torch.full((batch,), context, dtype=torch.int32)
    seen = torch.ones(queries, context, dtype=torch.bool).tril(context - queries)

    def eager():
        return scaled_dot_product_attention(
            query.transpose(1, 2),
            key[:, :, :context],
            value[:, :, :context],
            seen if queries > 1 else None,
            enable_gqa=True,
        ).transpose(1, 2)

    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    nbytes = 2 * batch * kv_heads * context * dim * key.element_size()
    sizes = f"heads {name}, {context} slots, {batch}x{queries} tokens"
    versus(
        f"decode attention, {sizes}, {str(dtype)[6:]}",
        {"eager": eager, "fastft": lambda: decode_attention(query, key, value, lengths)},
        at_least=1.0,
        floor=max(nbytes / BANDWIDTH, 4 * queries * batch * heads * dim * context / FLOPS),
        check=lambda r: torch.testing.assert_close(
            r["eager"], r["fastft"], rtol=tolerance, atol=tolerance
        ),
        rounds=99 if nbytes < 2**23 else 9,
    )
