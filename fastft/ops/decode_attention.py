"""decode_attention: attention of a few new queries per sequence over a preallocated KV cache.

The cache holds `capacity` slots per row, of which the first lengths[b] are valid, those of the new
tokens included. Query i of row b stands at position p = lengths[b] - queries + i, slot j at
position j, and head h reads key head h // groups:

    s_j = scale * q k_j        t = softcap * tanh(s / softcap)    (t = s without softcap)
    out = softmax(t over the slots j <= p, with a window: p - window < j <= p) v

A query that sees no slot gives 0. Slots from lengths[b] on may hold anything: they are never read.

One query is a step of decoding, several are draft tokens that are verified; so that verifying
changes no token, the kernels promise that the bits of a query's result depend on its position, its
own heads' values and the slots it sees alone: not on the other rows, the queries beside it, the
capacity or strides of the cache, or the number of threads. For this they cut the slots into blocks
at fixed positions; each block gives a maximum m, the sum z of e^(t - m) and that of e^(t - m) v, on
its own, and blocks are merged in ascending order:

    M = max(m, m')      z <- z e^(m - M) + z' e^(m' - M)      and the weighted values likewise

Everything between reading the query and the cache and writing is in float32, but that CUDA's kernel
rounds e^(t - m) to a half type's precision before it weights values of that type. There is no
gradient. The reference, which does not promise the same bits, serves float64, and on CUDA heads
that are no multiple of 8 up to 256 wide.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastft.library import autocast_dtype, needs_autograd, operator

# More are no decoding, and `attention` is the faster way.
MAX_QUERIES = 16


@operator(
    "decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths,"
    " float scale, int window, float softcap) -> Tensor out"
)
def _decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    queries, heads = query.shape[1:3]
    kv_heads, capacity = key_cache.shape[1:3]
    slot = torch.arange(capacity, device=query.device)
    i = torch.arange(queries, device=query.device)
    position = (lengths[:, None] - queries + i)[..., None]  # (batch, queries, 1)
    seen = slot <= position
    if window >= 0:
        seen = seen & (position - slot < window)
    seen = seen[:, None, None]  # (batch, 1, 1, queries, capacity)
    grouped = query.to(wide).unflatten(2, (kv_heads, heads // kv_heads))
    scores = torch.einsum("bqhgd,bhkd->bhgqk", grouped, key_cache.to(wide)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    # Masked again behind the softmax, which makes NaN of rows that see nothing.
    p = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).masked_fill(~seen, 0)
    # 0 times what an unused slot holds may be NaN.
    unused = (slot >= lengths[:, None])[:, None, :, None]
    value = value_cache.to(wide).masked_fill(unused, 0)
    out = torch.einsum("bhgqk,bhkd->bqhgd", p, value).flatten(2, 3)
    return out.to(query.dtype).contiguous()


def serving(query: Tensor) -> Callable[..., Tensor]:
    """The raw operator, or its reference for what the CUDA kernel does not take."""
    refused = query.is_cuda and (query.shape[3] % 8 or query.shape[3] > 256)
    return _decode_attention.reference if refused else _decode_attention


def _check(query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> None:
    if not query.is_floating_point():
        raise TypeError(f"query: expected a floating-point tensor, got {query.dtype}")
    for name, x, layout in (
        ("query", query, "(batch, queries, heads, head_dim)"),
        ("key_cache", key_cache, "(batch, kv_heads, capacity, head_dim)"),
        ("value_cache", value_cache, "(batch, kv_heads, capacity, head_dim)"),
    ):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected shape {layout}, got {tuple(x.shape)}")
        if x.dtype != query.dtype or x.device != query.device:
            raise TypeError(
                f"{name}: expected {query.dtype} on {query.device} as query has, "
                f"got {x.dtype} on {x.device}"
            )
        # A copy of the whole cache at every token would be a silent disaster.
        if x is not query and x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(
                f"{name}: expected a contiguous last dimension, got strides {x.stride()}"
            )
    batch, queries, heads, head_dim = query.shape
    rows, kv_heads, _, width = key_cache.shape
    if queries > MAX_QUERIES:
        raise ValueError(f"query: expected at most {MAX_QUERIES} queries, got {queries}")
    if (rows, width) != (batch, head_dim) or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"key_cache: expected ({batch}, a divisor of {heads}, capacity, {head_dim}), "
            f"got {tuple(key_cache.shape)}"
        )
    if value_cache.shape != key_cache.shape:
        raise ValueError(
            f"value_cache: expected shape {tuple(key_cache.shape)} as key_cache has, "
            f"got {tuple(value_cache.shape)}"
        )
    if lengths.shape != (batch,) or lengths.dtype != torch.int32:
        raise TypeError(
            f"lengths: expected {batch} of torch.int32, "
            f"got {tuple(lengths.shape)} of {lengths.dtype}"
        )
    if lengths.device != query.device:
        raise TypeError(f"lengths: expected a tensor on {query.device}, got {lengths.device}")
    # Reading values would stop a trace, or wait for a device.
    if torch.compiler.is_compiling() or not lengths.is_cpu or type(lengths) is not Tensor:
        return
    capacity = key_cache.shape[2]
    for length in lengths.tolist():
        if not 0 <= length <= capacity:
            raise ValueError(f"lengths: expected 0 to the capacity of {capacity}, got {length}")


def decode_attention(
    query: Tensor,  # (batch, queries, heads, head_dim)
    key_cache: Tensor,  # (batch, kv_heads, capacity, head_dim)
    value_cache: Tensor,  # (batch, kv_heads, capacity, head_dim)
    lengths: Tensor,  # (batch,)
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the valid slots of a cache; the module tells mask and promise.

    Args: up to 16 queries per row, the last ones of the lengths[b] tokens whose keys and values the
    cache already holds; lengths is int32 and lies on query's device. A window counts the query's
    own slot. heads is a multiple of kv_heads; scale is head_dim ** -0.5 unless given. float32,
    bfloat16, float16, float64, one for all; under autocast, query takes the caches' dtype.
    Caches may have any strides but for a contiguous last dimension. Lengths beyond the capacity are
    refused on the CPU and clamped on other devices, where reading them would wait.
    Returns: (batch, queries, heads, head_dim), contiguous, of query's dtype.
    Raises: ValueError or TypeError that names the argument; RuntimeError where a gradient is due.
    """
    if autocast_dtype(query.device) is not None and query.dtype != torch.float64:
        query = query.to(key_cache.dtype)
    _check(query, key_cache, value_cache, lengths)
    if window is not None and window < 1:
        raise ValueError(f"window: expected a positive number of keys or None, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    if needs_autograd(query, key_cache, value_cache):
        raise RuntimeError(
            "decode_attention has no gradient and no rule for torch.func: call it under "
            "torch.no_grad(), or call fastft.ops.attention.attention"
        )
    out: Tensor = serving(query)(
        query if query.stride(3) == 1 or query.shape[3] <= 1 else query.contiguous(),
        key_cache,
        value_cache,
        lengths,
        max(query.shape[3], 1) ** -0.5 if scale is None else float(scale),
        -1 if window is None else window,
        0.0 if softcap is None else float(softcap),
    )
    return out
