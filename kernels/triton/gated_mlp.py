"""gated_mlp: one program reads a piece of one row of gate and up, and of dh, and writes it once.

Rows may lie at any distance, each tensor at its own. Where all are dense they are one long row, so
that widths of any size are read in full blocks.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .common import ARCHITECTURES, BFLOAT16, NAMES, Configuration, on_device, rows_of

BLOCK = 1024
WARPS = 4


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x)."""
    if ACTIVATION == "gelu":
        p = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = p + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 is the sigmoid of 2u, which loses no digits where tanh is near -1.
        square = x * x
        p = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        slope = p + x * p * (1.0 - p) * (1.5957691216057308 * (1.0 + 0.134145 * square))
    else:
        p = tl.sigmoid(x)
        slope = p * (1.0 + x * (1.0 - p))
    return x * p, slope


@triton.jit
def _forward(
    gate, up, h, gate_stride, up_stride, width, pieces,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // pieces).to(tl.int64)
    start = (tl.program_id(0) % pieces).to(tl.int64) * BLOCK
    columns = tl.arange(0, BLOCK)
    inside = columns < width - start
    value = tl.load(gate + row * gate_stride + start + columns, mask=inside, other=0.0)
    factor = tl.load(up + row * up_stride + start + columns, mask=inside, other=0.0)
    act, _ = _activated(value.to(tl.float32), ACTIVATION)
    out = (act * factor.to(tl.float32)).to(h.dtype.element_ty)
    tl.store(h + row * width + start + columns, out, mask=inside)


@triton.jit
def _backward(
    dh, gate, up, h, dgate, dup, dh_stride, gate_stride, up_stride, width, pieces,
    ACTIVATION: tl.constexpr, WITH_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // pieces).to(tl.int64)
    start = (tl.program_id(0) % pieces).to(tl.int64) * BLOCK
    columns = tl.arange(0, BLOCK)
    inside = columns < width - start
    grad = tl.load(dh + row * dh_stride + start + columns, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(gate + row * gate_stride + start + columns, mask=inside, other=0.0)
    factor = tl.load(up + row * up_stride + start + columns, mask=inside, other=0.0)
    factor = factor.to(tl.float32)
    act, slope = _activated(value.to(tl.float32), ACTIVATION)
    place = row * width + start + columns
    if WITH_H:
        tl.store(h + place, (act * factor).to(h.dtype.element_ty), mask=inside)
    tl.store(dgate + place, (grad * factor * slope).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + place, (grad * act).to(dup.dtype.element_ty), mask=inside)


def _layout(*tensors):
    """The tensors by rows, or dense ones as one row; then their width and how many programs."""
    if all(t.is_contiguous() for t in tensors):
        tensors = [t.view(1, -1) for t in tensors]
    else:
        tensors = [rows_of(t) for t in tensors]
    rows, width = tensors[0].shape
    pieces = triton.cdiv(width, BLOCK)
    return tensors, [t.stride(0) for t in tensors], width, pieces, rows * pieces


def gated_mlp(gate, up, activation):
    h = gate.new_empty(gate.shape)
    if h.numel():
        tensors, strides, width, pieces, programs = _layout(gate, up)
        with on_device(gate):
            _forward[(programs,)](
                *tensors, h, *strides, width, pieces,
                ACTIVATION=activation, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return h


def gated_mlp_backward(dh, gate, up, activation, with_h):
    h = gate.new_empty(gate.shape if with_h else 0)
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    if gate.numel():
        tensors, strides, width, pieces, programs = _layout(dh, gate, up)
        with on_device(gate):
            _backward[(programs,)](
                *tensors, h, dgate, dup, *strides, width, pieces,
                ACTIVATION=activation, WITH_H=with_h, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return h, dgate, dup


MULTIPLES = ("dh_stride", "gate_stride", "up_stride", "width")


def configurations() -> Iterator[Configuration]:
    for dtype, name in NAMES.items():
        for activation in ("silu", "gelu", "gelu_tanh"):
            architectures = BFLOAT16 if dtype is torch.bfloat16 else ARCHITECTURES
            if activation != "silu" or dtype is torch.float32:
                architectures = architectures[:: len(architectures) - 1]
            yield from _configurations(f"*{name}", activation, architectures)


def _configurations(p, activation, architectures):
    label = f"{p[1:]} {activation}"
    strides = {"gate_stride": "i64", "up_stride": "i64", "width": "i64", "pieces": "i32"}
    yield Configuration(
        _forward,
        {"gate": p, "up": p, "h": p, **strides},
        {"ACTIVATION": activation, "BLOCK": BLOCK},
        WARPS, architectures=architectures[-1:], registers=64, multiples=MULTIPLES, label=label,
    )  # fmt: skip
    yield Configuration(
        _backward,
        {
            **dict.fromkeys(("dh", "gate", "up", "h", "dgate", "dup"), p), "dh_stride": "i64",
            **strides,
        },
        {"ACTIVATION": activation, "WITH_H": True, "BLOCK": BLOCK},
        WARPS, architectures=architectures, registers=128, multiples=MULTIPLES, label=label,
    )  # fmt: skip
