"""rotary: queries and keys turned in one launch; a program turns some heads of one token.

Every tensor is read and written by its own distances between batches, heads and tokens. The cosines
and sines of a token are read once for the heads a program holds.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .common import ARCHITECTURES, BFLOAT16, NAMES, Configuration, next_power_of_2, on_device

# Elements of one half of the heads that one program turns.
TILE = 1024
WARPS = 4


@triton.jit
def _turn(
    x, y, x_head, y_head, cos, sin, first, heads, half, head_dim,
    TRANSPOSED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, HALF)
    inside = columns < half
    c1 = tl.load(cos + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + half + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + half + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if TRANSPOSED:
        s1, s2 = -s2, -s1
    head = first + tl.arange(0, HEADS)
    there = (head < heads)[:, None]
    x += head.to(tl.int64)[:, None] * x_head
    y += head.to(tl.int64)[:, None] * y_head
    mask = there & inside[None, :]
    x1 = tl.load(x + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + half + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    tl.store(y + columns[None, :], y1.to(y.dtype.element_ty), mask=mask)
    tl.store(y + half + columns[None, :], y2.to(y.dtype.element_ty), mask=mask)
    if TAIL:
        rest = 2 * half + tl.arange(0, TAIL)[None, :]
        mask = there & (rest < head_dim)
        tl.store(y + rest, tl.load(x + rest, mask=mask, other=0.0), mask=mask)


@triton.jit
def _rotate(
    q, k, q_out, k_out, cos, sin,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
    cos_batch, cos_token, sin_batch, sin_token,
    tokens, q_heads, k_heads, half, head_dim,
    TRANSPOSED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    cos += batch * cos_batch + token * cos_token
    sin += batch * sin_batch + token * sin_token
    first = tl.program_id(1) * HEADS
    q_programs = tl.cdiv(q_heads, HEADS) * HEADS
    if first < q_programs:
        _turn(
            q + batch * q_batch + token * q_token,
            q_out + batch * q_out_batch + token * q_out_token,
            q_head, q_out_head, cos, sin, first, q_heads, half, head_dim,
            TRANSPOSED, HEADS, HALF, TAIL,
        )  # fmt: skip
    else:
        _turn(
            k + batch * k_batch + token * k_token,
            k_out + batch * k_out_batch + token * k_out_token,
            k_head, k_out_head, cos, sin, first - q_programs, k_heads, half, head_dim,
            TRANSPOSED, HEADS, HALF, TAIL,
        )  # fmt: skip


def _side_by_side(x):
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _empty(x, swapped):
    if swapped:
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
    return x.new_empty(x.shape)


def _strides(x, head_axis):
    """Elements between batches, heads and tokens."""
    return x.stride(0), x.stride(head_axis), x.stride(3 - head_axis)


def _angles(x):
    """Elements between batches, 0 where they share one table, and between tokens."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)


def _blocks(heads: int, half: int, tail: int) -> tuple[int, int, int]:
    """HEADS, HALF and TAIL; heads of a program such that a tile of them is about TILE elements."""
    columns = next_power_of_2(half)
    rest = next_power_of_2(tail) if tail else 0
    together = max(1, TILE // max(columns, rest))
    return min(next_power_of_2(heads), together), columns, rest


def _launch(q, k, cos, sin, head_axis, swapped, transposed):
    """q and k turned; k may be None. swapped: the memory order of the results."""
    out = [None if x is None else _empty(x, s) for x, s in zip((q, k), swapped, strict=True)]
    q, cos, sin = _side_by_side(q), _side_by_side(cos), _side_by_side(sin)
    batch, tokens, head_dim = q.shape[0], q.shape[3 - head_axis], q.shape[3]
    q_heads, k_heads = q.shape[head_axis], 0 if k is None else k.shape[head_axis]
    half = cos.shape[2] // 2
    heads, columns, tail = _blocks(max(q_heads, k_heads), half, head_dim - 2 * half)
    programs = triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads)
    if k is not None:
        k = _side_by_side(k)
    if batch * tokens * programs * head_dim:
        q_strides, q_out_strides = _strides(q, head_axis), _strides(out[0], head_axis)
        k_strides, k_out_strides = (
            ((0, 0, 0), (0, 0, 0))
            if k is None
            else (_strides(k, head_axis), _strides(out[1], head_axis))
        )
        with on_device(q):
            _rotate[(batch * tokens, programs)](
                q, q if k is None else k, out[0], out[0] if k is None else out[1], cos, sin,
                *q_strides, *k_strides, *q_out_strides, *k_out_strides,
                *_angles(cos), *_angles(sin), tokens, q_heads, k_heads, half, head_dim,
                TRANSPOSED=transposed, HEADS=heads, HALF=columns, TAIL=tail, num_warps=WARPS,
            )  # fmt: skip
    return out


def _swapped(x):
    return x.stride(1) < x.stride(2)


def rotary(q, k, cos, sin, unsqueeze_dim):
    order = _swapped(q), _swapped(k)
    return tuple(_launch(q, k, cos, sin, unsqueeze_dim, order, False))


def rotary_backward(dq, dk, cos, sin, unsqueeze_dim, swapped):
    q_grad, k_grad = _launch(dq, dk, cos, sin, unsqueeze_dim, (swapped, swapped), True)
    return q_grad, dq.new_empty(0) if k_grad is None else k_grad


def configurations() -> Iterator[Configuration]:
    """Llama's heads in every type; Gemma's long, Phi's partly turned and GPT-NeoX's in half."""
    for dtype, name in NAMES.items():
        architectures = BFLOAT16 if dtype is torch.bfloat16 else ARCHITECTURES
        for transposed in (False, True):
            ends = architectures[:: len(architectures) - 1]
            yield _configuration(name, 32, 64, 0, transposed, ends if transposed else architectures)
        for heads, half, tail in ((8, 128, 0), (32, 32, 16), (12, 12, 72), (1, 64, 0)):
            yield _configuration(name, heads, half, tail, False, ends)


def _configuration(name, heads, half, tail, transposed, architectures):
    p = f"*{name}"
    strides = [
        f"{x}_{to}"
        for x in ("q", "k", "q_out", "k_out")
        for to in ("batch", "head", "token")
    ] + ["cos_batch", "cos_token", "sin_batch", "sin_token"]  # fmt: skip
    numbers = ("tokens", "q_heads", "k_heads", "half", "head_dim")
    block = dict(zip(("HEADS", "HALF", "TAIL"), _blocks(heads, half, tail), strict=True))
    return Configuration(
        _rotate,
        {
            **dict.fromkeys(("q", "k", "q_out", "k_out", "cos", "sin"), p),
            **dict.fromkeys(strides, "i64"),
            **dict.fromkeys(numbers, "i32"),
        },
        {"TRANSPOSED": transposed, **block},
        WARPS, architectures=architectures, registers=96,
        multiples=(*strides, "head_dim", *(("half",) if half % 16 == 0 else ())),
        label=f"{name} {heads} heads of {2 * half} and {tail}",
    )  # fmt: skip
