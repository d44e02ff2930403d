"""attention over packed sequences, forward: blocks of queries walk the keys with a running softmax.

Scores live in base 2 (exp2 is one instruction). A program finds its sequence in cu_seqlens itself,
so that a launch never waits for the device to tell lengths: see `sequence_of`.
"""

from collections.abc import Iterator  # noqa: I001
from math import log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    NAMES, Configuration, bounds_of, capability, load_rows, next_power_of_2, on_device,
    sequence_of, tanh,
)  # fmt: skip

LOG2E = log2(2.718281828459045)
# A wider head would not leave room for the accumulator of a block.
WIDEST = 256


class Tile(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _seen(position, j, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Who sees whom; position (of the queries) and j broadcast against one another."""
    seen = j < length
    ahead = position - j
    if CAUSAL:
        seen = seen & (ahead >= 0)
        if WINDOW:
            seen = seen & (ahead < window)
    elif WINDOW:
        seen = seen & (ahead <= window) & (ahead >= -window)
    return seen


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _row_bits(seed, head, i):
    """What the dropout of a row of probabilities depends on: `_keep` of the reference."""
    bits = tl.load(seed)
    low = _mix(bits.to(tl.uint32))
    high = _mix((bits >> 32).to(tl.uint32) + low)
    i = i.to(tl.uint32)
    head = (tl.full([], 0, tl.int32) + head).to(tl.uint32)
    return _mix(_mix(low ^ i) + head), _mix(_mix(high + i) ^ head)


@triton.jit
def _kept(first, second, j, threshold):
    """threshold is 2**31 less than the reference's, and the comparison one of signed integers."""
    bits = _mix(_mix(j.to(tl.uint32) ^ first) + second)
    return (bits ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _walk(
    state, queries, k, v, k_row, v_row, low, high, position, first, second, begin_k, length_k,
    inner, outer, threshold, window,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    out, top, total = state
    columns = tl.arange(0, D)
    rows = tl.arange(0, N)
    for start in range(low, high, N):
        place = tl.full([], 0, tl.int64) + start
        left = length_k - start
        keys = load_rows(k + place * k_row, k_row, rows, columns, left, HEAD_DIM, MASK)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * inner
        if SOFTCAP:
            scores = tanh(scores) * outer
        if MASK:
            seen = _seen(
                position[:, None], (start + rows)[None, :], length_k, window, CAUSAL, WINDOW
            )
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing yet would subtract infinities.
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASK else higher
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            j = (begin_k + start + rows)[None, :]
            p = tl.where(_kept(first[:, None], second[:, None], j, threshold), p, 0.0)
        values = load_rows(v + place * v_row, v_row, rows, columns, left, HEAD_DIM, MASK)
        out = tl.dot(p.to(values.dtype), values, out * shrink[:, None], input_precision="ieee")
        top = higher
    return out, top, total


@triton.jit
def _forward(
    q, k, v, out, lse, cu_q, cu_k, seed,
    q_row, q_head, k_row, k_head, v_row, v_head, tokens_q, sequences, groups,
    inner, outer, kept, threshold, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    # Under a causal mask the last blocks of a sequence take longest: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, start = sequence_of(cu_q, sequences, block, M)
    begin_q, length_q = bounds_of(cu_q, sequence)
    if start >= length_q:
        return
    begin_k, length_k = bounds_of(cu_k, sequence)
    head = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, M)
    columns = tl.arange(0, D)
    i = start + rows
    shift = length_k - length_q
    position = i + shift
    k += begin_k * k_row + (head // groups) * k_head
    v += begin_k * v_row + (head // groups) * v_head
    row = begin_q + start
    queries = load_rows(
        q + row * q_row + head * q_head, q_row, rows, columns, length_q - start, HEAD_DIM, True
    )
    first, second = rows, rows
    if DROPOUT:
        first, second = _row_bits(seed, head, begin_q + i)

    low, full, high = _key_range(start, length_q, length_k, window, CAUSAL, WINDOW, M, N)
    state = (
        tl.zeros([M, D], tl.float32),
        tl.full([M], float("-inf"), tl.float32),
        tl.zeros([M], tl.float32),
    )
    if not WINDOW:
        state = _walk(
            state, queries, k, v, k_row, v_row, low, full, position, first, second, begin_k,
            length_k, inner, outer, threshold, window,
            False, CAUSAL, WINDOW, SOFTCAP, DROPOUT, HEAD_DIM, N, D,
        )  # fmt: skip
    total_out, top, total = _walk(
        state, queries, k, v, k_row, v_row, full, high, position, first, second, begin_k,
        length_k, inner, outer, threshold, window,
        True, CAUSAL, WINDOW, SOFTCAP, DROPOUT, HEAD_DIM, N, D,
    )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # top is -inf in these rows, and so will lse be
    tl.store(
        lse + head * tokens_q + row + rows,
        (top + tl.log2(total)) * 0.6931471805599453, mask=i < length_q,
    )  # fmt: skip
    result = total_out * (kept / total)[:, None]
    width = tl.num_programs(1).to(tl.int64) * HEAD_DIM
    place = out + row * width + head * HEAD_DIM + rows[:, None] * width + columns[None, :]
    inside = (i < length_q)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _key_range(
    start, length_q, length_k, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """(low, full, high): keys a block of queries sees; from low to full it sees every one."""
    nearest = start + length_k - length_q
    furthest = tl.minimum(start + M, length_q) - 1 + length_k - length_q
    low = tl.full([], 0, tl.int32)
    full = length_k
    high = length_k
    if CAUSAL:
        full = tl.minimum(full, nearest + 1)
        high = tl.minimum(high, furthest + 1)
        if WINDOW:
            low = tl.maximum(nearest - window + 1, 0)
    elif WINDOW:
        low = tl.maximum(nearest - window, 0)
        high = tl.minimum(high, furthest + window + 1)
    low = low // N * N
    full = low if WINDOW else tl.maximum(full, 0) // N * N
    return low, full, high


def check(query: Tensor) -> None:
    if query.dtype not in NAMES:
        raise TypeError(f"query: expected float32, bfloat16 or float16 on CUDA, got {query.dtype}")
    if query.shape[2] > WIDEST:
        raise ValueError(f"query: expected a head_dim up to {WIDEST} on CUDA, got {query.shape[2]}")


def padded(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))


def scalars(tokens: int, scale: float, window: int, softcap: float, dropout: float) -> tuple:
    """(inner, outer, kept, threshold, window) as the kernels take them."""
    inner, outer = (scale / softcap, softcap * LOG2E) if softcap else (scale * LOG2E, 1.0)
    threshold = min(int(dropout * 2**32), 2**32 - 1) - 2**31
    return inner, outer, 1 / (1 - dropout), threshold, min(window, tokens)


def tile(dim: int, dtype: torch.dtype, target: int) -> Tile:
    """What compiles without spills with every option; Triton has no tensor cores on sm_75."""
    if dtype is torch.float32 or target == 75:
        if dim <= 64:
            return Tile(32, 32, 4, 1)
        return Tile(32, 16, 4, 1) if dim == 128 else Tile(16, 16, 4, 1)
    if dim <= 64:
        return Tile(128, 64, 8, 3)
    return Tile(128, 32, 8, 3) if dim == 128 else Tile(64, 16, 8, 2)


def attention(
    query, key, value, cu_seqlens_q, cu_seqlens_k, seed, scale, causal, window, softcap, dropout
):
    check(query)
    tokens, heads, head_dim = query.shape
    sequences = cu_seqlens_q.shape[0] - 1
    out = query.new_empty(query.shape)
    lse = query.new_empty(heads, tokens, dtype=torch.float32)
    dim = padded(head_dim)
    m, n, warps, stages = tile(dim, query.dtype, capability(query))
    if tokens and heads and sequences:
        with on_device(query):
            _forward[(tokens // m + sequences, heads)](
                query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, seed,
                *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], tokens, sequences,
                heads // key.shape[1],
                *scalars(tokens + key.shape[0], scale, window, softcap, dropout),
                CAUSAL=causal, WINDOW=window >= 0, SOFTCAP=softcap > 0, DROPOUT=dropout > 0,
                HEAD_DIM=head_dim, M=m, N=n, D=dim, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    return out, lse


FEATURES = {
    "causal": (True, False, False, False),
    "everything": (True, True, True, True),
    "bidirectional": (False, False, False, False),
}


def options_of(feature: str) -> dict:
    names = ("CAUSAL", "WINDOW", "SOFTCAP", "DROPOUT")
    return dict(zip(names, FEATURES[feature], strict=True))


SCALARS = {
    **dict.fromkeys(("inner", "outer", "kept"), "fp32"), "threshold": "i32", "window": "i32",
    **dict.fromkeys(("tokens_q", "sequences", "groups"), "i32"),
}  # fmt: skip


STRIDES = tuple(f"{x}_{y}" for x in ("q", "k", "v", "dout") for y in ("row", "head"))


def cases() -> Iterator[tuple[torch.dtype, int, str, tuple[int, ...]]]:
    """(dtype, head_dim, feature, architectures) that stand for the others."""
    single, brain, half = NAMES
    yield brain, 128, "everything", (80, 86, 89, 90, 100, 120)
    yield brain, 128, "causal", (80,)
    yield brain, 64, "everything", (80, 86, 89, 120)
    yield brain, 256, "everything", (80, 86, 120)
    yield half, 80, "everything", (75,)
    yield half, 256, "everything", (75,)
    yield single, 64, "causal", (75,)
    yield single, 256, "everything", (75,)
    yield single, 128, "everything", (80,)
    yield single, 256, "bidirectional", (120,)


def configurations() -> Iterator[Configuration]:
    for dtype, head_dim, feature, targets in cases():
        p = f"*{NAMES[dtype]}"
        for target in targets:
            m, n, warps, stages = tile(padded(head_dim), dtype, target)
            yield Configuration(
                _forward,
                {
                    **dict.fromkeys(("q", "k", "v", "out"), p), "lse": "*fp32", "cu_q": "*i32",
                    "cu_k": "*i32", "seed": "*i64", **SCALARS,
                    **dict.fromkeys(STRIDES[:6], "i32"),
                },
                {
                    **options_of(feature), "HEAD_DIM": head_dim, "M": m, "N": n,
                    "D": padded(head_dim),
                },
                warps, stages, (target,), multiples=STRIDES, stack=8,
                label=f"{NAMES[dtype]} {head_dim} {feature}",
            )  # fmt: skip
