"""Packed sequences for the tests of attention: bounds, inputs, and eager attention per sequence."""

import torch
from transformers.masking_utils import (
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from fastft.ops.attention import attention


def bounds(lengths, dtype=torch.int64):
    return torch.tensor([0, *torch.tensor(lengths, dtype=dtype).cumsum(0).tolist()], dtype=dtype)


def mask_of(length_q, length_k, causal, window):
    """(length_q, length_k), from transformers' own overlays."""
    i = torch.arange(length_q)[:, None] + length_k - length_q
    j = torch.arange(length_k)
    seen = i >= j if causal else torch.ones(length_q, length_k, dtype=torch.bool)
    if window is not None:
        overlay = sliding_window_overlay if causal else sliding_window_bidirectional_overlay
        seen = seen & overlay(window)(0, 0, i, j)
    return seen


def eager_sequence(q, k, v, seen, softcap, scale):
    """One sequence; (1, heads, tokens, head_dim). Rows that see nothing give 0."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale)
    else:  # as transformers' Gemma 2
        scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~seen, -torch.inf)
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.softmax(scores, -1, dtype=wide).nan_to_num(0).to(q.dtype) @ v
    return out.masked_fill(~seen.any(-1)[:, None], 0)


def sides(lengths_q, lengths_k=None, **options):
    """(ours, eager) as functions of packed query, key, value."""
    cu_q, cu_k = bounds(lengths_q), None if lengths_k is None else bounds(lengths_k, torch.int32)
    if cu_k is not None:
        cu_q = cu_q.int()

    def ours(q, k, v):
        return attention(q, k, v, cu_q, cu_k, **options)

    def eager(q, k, v):
        starts_k = cu_q if cu_k is None else cu_k
        outs = [(q + k.sum() + v.sum())[:0]]  # connected even where every sequence is empty
        for s in range(len(lengths_q)):
            a, b, c, d = (int(x) for x in (*cu_q[s : s + 2], *starts_k[s : s + 2]))
            if a == b:
                continue
            parts = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
            seen = mask_of(b - a, d - c, options.get("causal", False), options.get("window"))
            out = eager_sequence(*parts, seen, options.get("softcap"), options.get("scale"))
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return ours, eager


def inputs(dtype, tokens_q, tokens_k, heads, kv_heads, dim):
    def make(*shape):
        return torch.randn(*shape).to(dtype).requires_grad_()

    return make(tokens_q, heads, dim), make(tokens_k, kv_heads, dim), make(tokens_k, kv_heads, dim)


CASES = [
    {},
    {"causal": True},
    {"causal": True, "window": 5},
    {"window": 70},
    {"causal": True, "window": 100, "softcap": 3.0},
    {"softcap": 0.7, "scale": 0.3},
    {"causal": True, "scale": -0.2},
]
