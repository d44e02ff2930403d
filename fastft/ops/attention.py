"""attention: softmax attention over packed sequences, forward and backward.

Sequences lie one after another along the tokens; sequence s owns the queries cu_seqlens_q[s] to
cu_seqlens_q[s + 1] and the keys likewise, and sees no other. Head h reads key head h // groups.

    s = scale * q k^T            t = softcap * tanh(s / softcap)    (t = s without softcap)
    p = softmax(t over the keys seen)        out = (p * keep / (1 - dropout)) v

Queries and keys are aligned at the end of their sequence: the last query stands at the last key,
so query i stands at i + length_k - length_q. With d the position of the query less the key's:

    causal: d >= 0     window and causal: 0 <= d < window     window, not causal: |d| <= window

(both windows as transformers has them: `sliding_window_overlay` counts the query's own key,
`sliding_window_bidirectional_overlay` does not). A query that sees no key gives 0. Backward:

    dv = (p * keep / (1 - dropout))^T dout        dp = (dout v^T) * keep / (1 - dropout)
    dt = p * (dp - sum(dout * out))               ds = dt * (1 - (t / softcap)^2)
    dq = scale * ds k                             dk = scale * ds^T q

keep is a function of (seed, head, query token, key token) alone, so backward makes it again:
`_keep` is its definition. Everything between reading q, k, v and writing is in float32.

The CPU's kernel serves every call: against PyTorch's flash kernel, per sequence and as one batch
where lengths allow, it took 0.2 to 0.9 of the time of both passes on one core, on AVX-512 and AVX2
(head dims 32 to 256, sequences of 8 to 2,048). It is behind, by up to 1.7 on AVX2, where one query
per sequence reads thousands of keys whose heads are wide (one step of decoding), without gradients.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.library import (
    autocast_dtype,
    distinct,
    first_derivatives_only,
    implement_in_triton,
    needs_autograd,
    operator,
)


class AttentionOptions(NamedTuple):
    """What the raw operators take behind the tensors, in their order."""

    scale: float
    causal: bool = False
    window: int = -1  # -1: none
    softcap: float = 0.0  # 0: none
    dropout: float = 0.0


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers whose output bits look independent (lowbias32)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _keep(seed: Tensor, heads: int, tokens_q: int, tokens_k: int, dropout: float) -> Tensor:
    """(heads, tokens_q, tokens_k): which probabilities survive. Integers in [0, 2^32) in int64."""
    mask = 0xFFFFFFFF
    low = _mix(seed.to(torch.int64) & mask)
    high = _mix(((seed.to(torch.int64) >> 32) + low) & mask)
    head = torch.arange(heads, device=seed.device)[:, None, None]
    i = torch.arange(tokens_q, device=seed.device)[:, None]
    j = torch.arange(tokens_k, device=seed.device)
    first = _mix((_mix(low ^ i) + head) & mask)
    second = _mix(_mix((high + i) & mask) ^ head)
    return _mix((_mix(j ^ first) + second) & mask) >= _dropout_threshold(dropout)


def _dropout_threshold(dropout: float) -> int:
    return min(int(dropout * 2**32), 2**32 - 1)


def _visible(
    cu_q: Tensor, cu_k: Tensor, tokens_q: int, tokens_k: int, causal: bool, window: int
) -> Tensor:
    """(tokens_q, tokens_k): who sees whom."""
    i = torch.arange(tokens_q, device=cu_q.device, dtype=cu_q.dtype)
    j = torch.arange(tokens_k, device=cu_q.device, dtype=cu_q.dtype)
    sequence_q = torch.searchsorted(cu_q, i, right=True) - 1
    sequence_k = torch.searchsorted(cu_k.to(cu_q.dtype), j, right=True) - 1
    seen = sequence_q[:, None] == sequence_k
    ahead = (i - cu_q[sequence_q + 1] + cu_k[sequence_q + 1])[:, None] - j
    if causal:
        seen = seen & (ahead >= 0)
    if window >= 0:
        seen = seen & (ahead < window if causal else ahead.abs() <= window)
    return seen


def _scores(
    query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor, options: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """The capped scores, (kv_heads, groups, tokens_q, tokens_k), and who sees whom."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scale, causal, window, softcap, _ = options
    query = query.to(wide).unflatten(1, (key.shape[1], query.shape[1] // key.shape[1]))
    scores = torch.einsum("qhgd,khd->hgqk", query, key.to(wide)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores, _visible(cu_q, cu_k, query.shape[0], key.shape[0], causal, window)


def _kept_scale(query: Tensor, key: Tensor, seed: Any, dropout: float) -> Tensor | float:
    """keep / (1 - dropout), (kv_heads, groups, tokens_q, tokens_k); 1 without dropout and seed."""
    if not dropout:
        return 1.0
    keep = _keep(seed, query.shape[1], query.shape[0], key.shape[0], dropout)
    keep = keep.unflatten(0, (key.shape[1], query.shape[1] // key.shape[1]))
    out: Tensor | float = keep.to(torch.promote_types(query.dtype, torch.float32)) / (1 - dropout)
    return out


@operator(
    "attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " Tensor? seed, float scale, bool causal, int window, float softcap, float dropout)"
    " -> (Tensor out, Tensor lse)"
)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    scores, seen = _scores(query, key, cu_q, cu_k, options)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, -1)  # (kv_heads, groups, tokens_q), -inf where nothing is seen
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    p = p * _kept_scale(query, key, seed, options[-1])
    out = torch.einsum("hgqk,khd->qhgd", p, value.to(p.dtype)).flatten(1, 2)
    return out.to(query.dtype).contiguous(), lse.flatten(0, 1).contiguous()


@operator(
    "attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out,"
    " Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seed, float scale, bool causal,"
    " int window, float softcap, float dropout, bool query_grad, bool key_grad, bool value_grad)"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)
def _attention_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    options, needed = rest[:5], rest[5:]
    scale, _, _, softcap, dropout = options
    groups = (key.shape[1], query.shape[1] // key.shape[1])
    scores, seen = _scores(query, key, cu_q, cu_k, options)
    wide = scores.dtype
    dout, out = dout.to(wide), out.to(wide)
    total = (dout * out).sum(-1).t().unflatten(0, groups)
    # The row's lse is -inf where it sees nothing, and those rows are masked here.
    p = torch.exp(scores - lse.unflatten(0, groups)[..., None]).masked_fill(~seen, 0)
    kept = _kept_scale(query, key, seed, dropout)
    dout = dout.unflatten(1, groups)
    dv = torch.einsum("hgqk,qhgd->khd", p * kept, dout)
    dp = torch.einsum("qhgd,khd->hgqk", dout, value.to(wide)) * kept
    ds = p * (dp - total[..., None])
    if softcap:
        ds = ds * (1 - (scores / softcap).square())
    ds = ds * scale
    dq = torch.einsum("hgqk,khd->qhgd", ds, key.to(wide)).flatten(1, 2)
    dk = torch.einsum("hgqk,qhgd->khd", ds, query.to(wide).unflatten(1, groups))
    dq, dk, dv = (
        grad.to(query.dtype).contiguous() if need else query.new_empty(0)
        for grad, need in zip((dq, dk, dv), needed, strict=True)
    )
    return dq, dk, dv


implement_in_triton("attention", _attention)
implement_in_triton("attention_backward", _attention_backward)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        seed: Tensor | None,
        options: AttentionOptions,
    ) -> Tensor:
        # query: (tokens_q, heads, head_dim); key, value: (tokens_k, kv_heads, head_dim)
        cu_k = cu_q if cu_k is None else cu_k
        out, lse = _attention(query, key, value, cu_q, cu_k, seed, *options)
        ctx.save_for_backward(query, key, value, out, lse, cu_q, cu_k, seed)
        ctx.options = options
        return out

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        grads = _attention_backward(_rows(dout), *ctx.saved_tensors, *ctx.options, *needed)
        return *(g if n else None for g, n in zip(grads, needed, strict=True)), *(None,) * 4


def _rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension, which is all the kernels ask for."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 3:
            raise ValueError(
                f"{name}: expected shape (tokens, heads, head_dim), got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
        if x.dtype != query.dtype or x.device != query.device:
            raise TypeError(
                f"{name}: expected {query.dtype} on {query.device} as query has, "
                f"got {x.dtype} on {x.device}"
            )
    heads, head_dim = query.shape[1:]
    kv_heads = key.shape[1]
    if key.shape[2] != head_dim or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"key: expected (tokens, a divisor of {heads}, {head_dim}), got {tuple(key.shape)}"
        )
    if value.shape != key.shape:
        raise ValueError(
            f"value: expected shape {tuple(key.shape)} as key has, got {tuple(value.shape)}"
        )


def _check_lengths(name: str, cu: Tensor, tokens: int, sequences: int | None) -> None:
    if cu.dim() != 1 or cu.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{name}: expected a vector of int32 or int64, got {tuple(cu.shape)} of {cu.dtype}"
        )
    if cu.shape[0] == 0 or sequences not in (None, cu.shape[0] - 1):
        wanted = "at least one entry" if sequences is None else f"{sequences + 1} entries"
        raise ValueError(f"{name}: expected {wanted}, got {cu.shape[0]}")
    # Reading values would stop a trace, or wait for a device.
    if torch.compiler.is_compiling() or not cu.is_cpu or type(cu) is not Tensor:
        return
    bounds = cu.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(
            f"{name}: expected non-decreasing bounds from 0 to {tokens} tokens, got {bounds}"
        )


def _check_options(options: AttentionOptions, window: int | None, softcap: float | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window: expected a positive number of keys or None, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    if not 0 <= options.dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {options.dropout}")


def attention(
    query: Tensor,  # (tokens_q, heads, head_dim)
    key: Tensor,  # (tokens_k, kv_heads, head_dim)
    value: Tensor,  # (tokens_k, kv_heads, head_dim)
    cu_seqlens_q: Tensor,  # (sequences + 1,)
    cu_seqlens_k: Tensor | None = None,  # (sequences + 1,)
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v within each packed sequence; the module tells masks and formulas.

    Args: cu_seqlens are the bounds of the sequences, int32 or int64; for the keys the same as for
    the queries unless given; empty sequences are allowed. heads is a multiple of kv_heads. scale is
    head_dim ** -0.5 unless given. The same seed drops the same probabilities; without one it is
    drawn from torch's generator of the device. float32, bfloat16, float16, float64, one for all.
    Returns: (tokens_q, heads, head_dim), contiguous, of query's dtype (autocast's under autocast).
    Raises: ValueError or TypeError that names the argument.
    """
    dtype = autocast_dtype(query.device)
    if dtype is not None and query.dtype is not torch.float64:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check(query, key, value)
    _check_lengths("cu_seqlens_q", cu_seqlens_q, query.shape[0], None)
    if cu_seqlens_k is cu_seqlens_q:
        cu_seqlens_k = None  # a trace takes no tensor twice
    if cu_seqlens_k is not None:
        _check_lengths("cu_seqlens_k", cu_seqlens_k, key.shape[0], cu_seqlens_q.shape[0] - 1)
        cu_seqlens_k = cu_seqlens_k.to(query.device)
    elif key.shape[0] != query.shape[0]:
        raise ValueError(
            f"cu_seqlens_k: expected bounds for {key.shape[0]} keys, which are not as many as the "
            f"{query.shape[0]} queries, got None"
        )
    options = AttentionOptions(
        max(query.shape[2], 1) ** -0.5 if scale is None else float(scale),
        causal,
        -1 if window is None else window,
        0.0 if softcap is None else float(softcap),
        float(dropout),
    )
    _check_options(options, window, softcap)
    drawn = None
    if dropout and seed is None:
        drawn = torch.randint(2**62, (), device=query.device)
    elif dropout:
        drawn = torch.tensor(seed, device=query.device)
    query, key, value = (_rows(x) for x in (query, key, value))
    cu_q = cu_seqlens_q.to(query.device)
    if needs_autograd(query, key, value):
        tensors = distinct(query, key, value, cu_q, cu_seqlens_k, drawn)
        out: Tensor = _Attention.apply(*tensors, options)
        return out
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k
    return _attention(query, key, value, cu_q, cu_k, drawn, *options)[0]
