"""attention over packed sequences, backward: probabilities are made again from the saved lse.

One kernel owns blocks of keys and walks the queries of all heads that read them, another owns
blocks of queries and walks the keys: every gradient has one writer and one order of summation.
Queries that saw no key, or lie beyond their sequence, get an lse of +inf, and so probabilities 0.
"""

from collections.abc import Iterator  # noqa: I001
from itertools import product

import torch
import triton
import triton.language as tl

from .attention import (
    SCALARS, STRIDES, Tile, _kept, _key_range, _row_bits, _seen, cases, check, options_of, padded,
    scalars,
)  # fmt: skip
from .common import (
    NAMES, Configuration, bounds_of, capability, load_rows, on_device, sequence_of, tanh,
)  # fmt: skip


@triton.jit
def _total(
    dout, out, total, dout_row, dout_head, tokens_q,
    HEAD_DIM: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * M
    head = tl.program_id(1).to(tl.int64)
    width = tl.num_programs(1).to(tl.int64) * HEAD_DIM
    rows, columns = tl.arange(0, M), tl.arange(0, D)
    left = tokens_q - row
    a = load_rows(
        dout + row * dout_row + head * dout_head, dout_row, rows, columns, left, HEAD_DIM, True
    )
    b = load_rows(out + row * width + head * HEAD_DIM, width, rows, columns, left, HEAD_DIM, True)
    sums = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    tl.store(total + head * tokens_q + row + rows, sums, mask=rows < left)


@triton.jit
def _base2(lse, inside):
    value = tl.load(lse, mask=inside, other=float("inf"))
    return tl.where(value == float("-inf"), float("inf"), value) * 1.4426950408889634


@triton.jit
def _slope(products, dp, lse, total, inner, outer, SOFTCAP: tl.constexpr):
    """(p, ds): probabilities from the saved lse, and the gradient of the uncapped scores."""
    scores = products * inner
    if SOFTCAP:
        scores = tanh(scores)
        p = tl.exp2(scores * outer - lse)
        return p, p * (dp - total) * (1.0 - scores * scores)
    p = tl.exp2(scores - lse)
    return p, p * (dp - total)


@triton.jit
def _walk_queries(
    state, keys, values, q, dout, lse, total, q_row, dout_row, low, high, begin_q, length_q,
    length_k, j, begin_k, seed, head, inner, outer, kept, threshold, window,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    dk, dv = state
    rows, columns = tl.arange(0, M), tl.arange(0, D)
    for start in range(low, high, M):
        place = tl.full([], 0, tl.int64) + start
        left = length_q - start
        i = start + rows
        queries = load_rows(q + place * q_row, q_row, rows, columns, left, HEAD_DIM, True)
        grad = load_rows(dout + place * dout_row, dout_row, rows, columns, left, HEAD_DIM, True)
        row_lse = _base2(lse + i, rows < left)[None, :]
        row_total = tl.load(total + i, mask=rows < left, other=0.0)[None, :]
        # Keys stand along the rows, so that p and ds enter the next products as they are.
        products = tl.dot(keys, tl.trans(queries), input_precision="ieee")
        dp = tl.dot(values, tl.trans(grad), input_precision="ieee")
        if DROPOUT:
            first, second = _row_bits(seed, head, begin_q + i)
            keep = _kept(first[None, :], second[None, :], (begin_k + j)[:, None], threshold)
            dp = tl.where(keep, dp * kept, 0.0)
        p, ds = _slope(products, dp, row_lse, row_total, inner, outer, SOFTCAP)
        if MASK:
            position = (i + length_k - length_q)[None, :]
            seen = _seen(position, j[:, None], length_k, window, CAUSAL, WINDOW)
            p = tl.where(seen, p, 0.0)
            ds = tl.where(seen, ds, 0.0)
        if DROPOUT:
            p = tl.where(keep, p, 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _keys(
    q, k, v, dout, lse, total, dk, dv, cu_q, cu_k, seed,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head, tokens_q, sequences, groups,
    scale, inner, outer, kept, threshold, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    KEY_GRAD: tl.constexpr, VALUE_GRAD: tl.constexpr,
    HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    sequence, start = sequence_of(cu_k, sequences, tl.program_id(0), N)
    begin_k, length_k = bounds_of(cu_k, sequence)
    if start >= length_k:
        return
    begin_q, length_q = bounds_of(cu_q, sequence)
    kv_head = tl.program_id(1).to(tl.int64)
    rows, columns = tl.arange(0, N), tl.arange(0, D)
    left = length_k - start
    row = begin_k + start
    keys = load_rows(k + row * k_row + kv_head * k_head, k_row, rows, columns, left, HEAD_DIM, True)
    values = load_rows(
        v + row * v_row + kv_head * v_head, v_row, rows, columns, left, HEAD_DIM, True
    )
    shift = length_k - length_q
    low = tl.full([], 0, tl.int32)
    high = length_q
    if CAUSAL:
        low = tl.maximum(start - shift, 0)
        if WINDOW:
            high = tl.minimum(high, start + N - 1 - shift + window)
    elif WINDOW:
        low = tl.maximum(start - window - shift, 0)
        high = tl.minimum(high, start + N - shift + window)
    low = low // M * M
    state = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    for index in range(groups):
        head = kv_head * groups + index
        one_q = q + begin_q * q_row + head * q_head
        one_dout = dout + begin_q * dout_row + head * dout_head
        # One loop, masked throughout: a second one without masks costs registers it then spills.
        state = _walk_queries(
            state, keys, values, one_q, one_dout, lse + head * tokens_q + begin_q,
            total + head * tokens_q + begin_q, q_row, dout_row, low, high, begin_q, length_q,
            length_k, start + rows, begin_k, seed, head, inner, outer, kept, threshold, window,
            CAUSAL or WINDOW, CAUSAL, WINDOW, SOFTCAP, DROPOUT, HEAD_DIM, M, D,
        )  # fmt: skip
    key_sum, value_sum = state
    width = tl.num_programs(1).to(tl.int64) * HEAD_DIM
    place = row * width + kv_head * HEAD_DIM + rows[:, None] * width + columns[None, :]
    inside = (rows < left)[:, None] & (columns < HEAD_DIM)[None, :]
    if KEY_GRAD:
        tl.store(dk + place, (key_sum * scale).to(dk.dtype.element_ty), mask=inside)
    if VALUE_GRAD:
        tl.store(dv + place, (value_sum * kept).to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _walk_keys(
    dq, queries, grad, row_lse, row_total, k, v, k_row, v_row, low, high, position, first, second,
    begin_k, length_k, inner, outer, kept, threshold, window,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.arange(0, N), tl.arange(0, D)
    for start in range(low, high, N):
        place = tl.full([], 0, tl.int64) + start
        left = length_k - start
        j = (start + rows)[None, :]
        keys = load_rows(k + place * k_row, k_row, rows, columns, left, HEAD_DIM, MASK)
        values = load_rows(v + place * v_row, v_row, rows, columns, left, HEAD_DIM, MASK)
        products = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        dp = tl.dot(grad, tl.trans(values), input_precision="ieee")
        if DROPOUT:
            keep = _kept(first[:, None], second[:, None], begin_k + j, threshold)
            dp = tl.where(keep, dp * kept, 0.0)
        _, ds = _slope(products, dp, row_lse[:, None], row_total[:, None], inner, outer, SOFTCAP)
        if MASK:
            seen = _seen(position[:, None], j, length_k, window, CAUSAL, WINDOW)
            ds = tl.where(seen, ds, 0.0)
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit
def _queries(
    q, k, v, dout, lse, total, dq, cu_q, cu_k, seed,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head, tokens_q, sequences, groups,
    scale, inner, outer, kept, threshold, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    sequence, start = sequence_of(cu_q, sequences, tl.num_programs(0) - 1 - tl.program_id(0), M)
    begin_q, length_q = bounds_of(cu_q, sequence)
    if start >= length_q:
        return
    begin_k, length_k = bounds_of(cu_k, sequence)
    head = tl.program_id(1).to(tl.int64)
    rows, columns = tl.arange(0, M), tl.arange(0, D)
    left = length_q - start
    row = begin_q + start
    k += begin_k * k_row + (head // groups) * k_head
    v += begin_k * v_row + (head // groups) * v_head
    queries = load_rows(q + row * q_row + head * q_head, q_row, rows, columns, left, HEAD_DIM, True)
    grad = load_rows(
        dout + row * dout_row + head * dout_head, dout_row, rows, columns, left, HEAD_DIM, True
    )
    row_lse = _base2(lse + head * tokens_q + row + rows, rows < left)
    row_total = tl.load(total + head * tokens_q + row + rows, mask=rows < left, other=0.0)
    position = start + rows + length_k - length_q
    first, second = rows, rows
    if DROPOUT:
        first, second = _row_bits(seed, head, row + rows)
    low, full, high = _key_range(start, length_q, length_k, window, CAUSAL, WINDOW, M, N)
    result = tl.zeros([M, D], tl.float32)
    if not WINDOW:
        result = _walk_keys(
            result, queries, grad, row_lse, row_total, k, v, k_row, v_row, low, full, position,
            first, second, begin_k, length_k, inner, outer, kept, threshold, window,
            False, CAUSAL, WINDOW, SOFTCAP, DROPOUT, HEAD_DIM, N, D,
        )  # fmt: skip
    result = _walk_keys(
        result, queries, grad, row_lse, row_total, k, v, k_row, v_row, full, high, position,
        first, second, begin_k, length_k, inner, outer, kept, threshold, window,
        True, CAUSAL, WINDOW, SOFTCAP, DROPOUT, HEAD_DIM, N, D,
    )  # fmt: skip
    width = tl.num_programs(1).to(tl.int64) * HEAD_DIM
    place = dq + row * width + head * HEAD_DIM + rows[:, None] * width + columns[None, :]
    inside = (rows < left)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(place, (result * scale).to(dq.dtype.element_ty), mask=inside)


def tile(dim: int, dtype: torch.dtype, target: int, of_keys: bool) -> Tile:
    """What compiles without spills with every option; Triton has no tensor cores on sm_75."""
    if dim > 128 and target == 75:
        # 64 KB of shared memory: the block that is owned is the smaller.
        return Tile(16, 8, 8, 1) if of_keys else Tile(8, 16, 8, 1)
    if dtype is torch.float32 or target == 75:
        return Tile(16, 16, 8, 1)
    return Tile(32, 64, 8, 2) if dim <= 64 else Tile(32, 32, 8, 2 if dim == 128 else 1)


def attention_backward(
    dout, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, seed, scale, causal, window,
    softcap, dropout, query_grad, key_grad, value_grad,
):  # fmt: skip
    check(query)
    tokens, heads, head_dim = query.shape
    keys, kv_heads = key.shape[:2]
    sequences = cu_seqlens_q.shape[0] - 1
    pairs = (query, query_grad), (key, key_grad), (value, value_grad)
    dq, dk, dv = (query.new_empty(x.shape if needed else 0) for x, needed in pairs)
    if not heads or not sequences:
        return dq, dk, dv
    total = torch.empty_like(lse)
    dim = padded(head_dim)
    strides = [s for x in (query, key, value, dout) for s in x.stride()[:2]]
    rest = (
        cu_seqlens_q, cu_seqlens_k, seed, *strides, tokens, sequences, heads // kv_heads, scale,
        *scalars(tokens + keys, scale, window, softcap, dropout),
    )  # fmt: skip
    meta = {
        "CAUSAL": causal, "WINDOW": window >= 0, "SOFTCAP": softcap > 0, "DROPOUT": dropout > 0,
        "HEAD_DIM": head_dim, "D": dim,
    }  # fmt: skip
    m, n, warps, stages = tile(dim, query.dtype, capability(query), True)
    with on_device(query):
        if tokens:
            _total[(triton.cdiv(tokens, 16), heads)](
                dout, out, total, *dout.stride()[:2], tokens, HEAD_DIM=head_dim, M=16, D=dim
            )
        if keys and (key_grad or value_grad):
            _keys[(keys // n + sequences, kv_heads)](
                query, key, value, dout, lse, total, dk, dv, *rest,
                KEY_GRAD=key_grad, VALUE_GRAD=value_grad, M=m, N=n, num_warps=warps,
                num_stages=stages, **meta,
            )  # fmt: skip
        if tokens and query_grad:
            m, n, warps, stages = tile(dim, query.dtype, capability(query), False)
            _queries[(tokens // m + sequences, heads)](
                query, key, value, dout, lse, total, dq, *rest, M=m, N=n, num_warps=warps,
                num_stages=stages, **meta,
            )  # fmt: skip
    return dq, dk, dv


def configurations() -> Iterator[Configuration]:
    for dtype, head_dim, feature, targets in cases():
        p, dim = f"*{NAMES[dtype]}", padded(head_dim)
        tensors = dict.fromkeys(("q", "k", "v", "dout", "dq", "dk", "dv", "out"), p)
        tensors |= {"lse": "*fp32", "total": "*fp32", "cu_q": "*i32", "cu_k": "*i32"} | SCALARS
        tensors |= {"seed": "*i64", "scale": "fp32"} | dict.fromkeys(STRIDES, "i32")
        for target, kernel in product(targets, (_keys, _queries)):
            m, n, warps, stages = tile(dim, dtype, target, kernel is _keys)
            # Bytes a thread spills: float16 without tensor cores is the one large case.
            stack = (336, 264) if dim > 128 and dtype is torch.float16 else (64, 24)
            constants = options_of(feature) | {"KEY_GRAD": True, "VALUE_GRAD": True}
            constants |= {"HEAD_DIM": head_dim, "M": m, "N": n, "D": dim}
            yield Configuration(
                kernel,
                {n: t for n, t in tensors.items() if n in kernel.arg_names},
                {n: c for n, c in constants.items() if n in kernel.arg_names},
                warps, stages, (target,), stack=stack[0], multiples=STRIDES, aligned_stack=stack[1],
                label=f"{NAMES[dtype]} {head_dim} {feature}",
            )  # fmt: skip
