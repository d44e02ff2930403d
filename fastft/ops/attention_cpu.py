"""attention on the CPU: which kernel serves which call."""

import torch
from torch import Tensor

from fastft.library import implement
from fastft.ops.attention import _attention, _attention_backward

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _pieces(cu_q: Tensor, cu_k: Tensor):
    """(queries, keys) of every sequence as slices."""
    q, k = cu_q.tolist(), cu_k.tolist()
    for s in range(len(q) - 1):
        yield slice(q[s], q[s + 1]), slice(k[s], k[s + 1])


def _plain(cu_q: Tensor, cu_k: Tensor, options) -> bool:
    _, causal, window, softcap, dropout = options
    lengths = all(
        (a.stop - a.start == b.stop - b.start or not causal)
        and a.stop > a.start
        and b.stop > b.start
        for a, b in _pieces(cu_q, cu_k)
    )
    return window < 0 and not softcap and not dropout and lengths


def _batch(x: Tensor, groups: int = 1) -> Tensor:
    """(tokens, heads, head_dim) -> (1, heads * groups, tokens, head_dim)."""
    x = x.transpose(0, 1)[None]
    return x if groups == 1 else x.repeat_interleave(groups, 1)


@implement(_attention, "CPU", "PyTorch's flash kernel per sequence")
def _forward(query, key, value, cu_q, cu_k, seed, *options):
    if not _plain(cu_q, cu_k, options):
        return _attention.reference(query, key, value, cu_q, cu_k, seed, *options)
    scale, causal, *_ = options
    groups = query.shape[1] // key.shape[1]
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    for q, k in _pieces(cu_q, cu_k):
        part, part_lse = _flash(
            _batch(query[q]), _batch(key[k], groups), _batch(value[k], groups), 0.0, causal,
            scale=scale,
        )  # fmt: skip
        out[q] = part[0].transpose(0, 1)
        lse[:, q] = part_lse.view(part.shape[1:3])
    return out, lse


@implement(_attention_backward, "CPU", "PyTorch's flash kernel per sequence")
def _backward(dout, query, key, value, out, lse, cu_q, cu_k, seed, *options):
    if not _plain(cu_q, cu_k, options):
        return _attention_backward.reference(
            dout, query, key, value, out, lse, cu_q, cu_k, seed, *options
        )
    scale, causal, *_ = options
    groups = query.shape[1] // key.shape[1]
    dq, dk, dv = query.new_empty(query.shape), key.new_empty(key.shape), key.new_empty(key.shape)
    for q, k in _pieces(cu_q, cu_k):
        grads = _flash_backward(
            _batch(dout[q]), _batch(query[q]), _batch(key[k], groups), _batch(value[k], groups),
            _batch(out[q]), lse[:, q][None], 0.0, causal, scale=scale,
        )  # fmt: skip
        dq[q] = grads[0][0].transpose(0, 1)
        for full, grad in ((dk, grads[1]), (dv, grads[2])):
            full[k] = grad[0].unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return dq, dk, dv
