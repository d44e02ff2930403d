"""lora_mlp: gate, up, activation and down of a gated MLP with adapters, as one unit.

    h = act(gate(x)) * up(x)        y = down(h)        each a LoraLinear of fastft.ops.lora

Saved for backward: x, gate(x), up(x) and the adapters' narrow products. h is not saved: the pass
that makes the gradients of gate and up writes it again.
"""

from typing import Any

import torch
from torch import Tensor

from fastft.library import distinct, first_derivatives_only, rows_of
from fastft.ops.gated_mlp import ACTIVATIONS, _gated_mlp, _gated_mlp_backward
from fastft.ops.lora import LoraLinear, _Group, _lora, _Saved, _unflatten, prepare


class _LoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inner: _Group,
        outer: _Group,
        activation: str,
        p: float,
        x: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        # x: (tokens, hidden); inner: gate and up, outer: down
        first, last = tensors[:12], tensors[12:]
        weights, weight_scales, biases, a, b, masks = _unflatten(first, 2)
        (gate, up), xas = _lora(
            x, weights, weight_scales, biases, a, b, masks,
            inner.scales, inner.keep_scales, inner.transposed,
        )  # fmt: skip
        h = _gated_mlp(gate, up, activation)
        weight, scale, bias, last_a, last_b, _ = last
        mask = torch.empty_like(h, dtype=torch.bool).bernoulli_(1.0 - p) if p else None
        (y,), (ha,) = _lora(
            h, [weight], [scale], [bias], [last_a], [last_b], [mask],
            outer.scales, outer.keep_scales, outer.transposed,
        )  # fmt: skip
        ctx.inner, ctx.outer, ctx.activation = inner, outer, activation
        ctx.save_for_backward(
            x, gate, up, *weights, *weight_scales, *a, *b, *masks, *xas,
            weight, scale, last_a, last_b, mask, ha,
        )  # fmt: skip
        return y

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, *tensors = ctx.saved_tensors
        inner, outer = _Saved.of(ctx.inner, tensors[:12]), _Saved.of(ctx.outer, tensors[12:])
        need = ctx.needs_input_grad[4:]
        dy = rows_of(dy)
        dh, us = outer.input_grad([dy], True)
        down_needs = need[13:]
        h, dgate, dup = _gated_mlp_backward(dh, gate, up, ctx.activation, any(down_needs))
        down_grads = outer.tensor_grads(h, [dy], us, down_needs)
        dx, us = inner.input_grad([dgate, dup], need[0])
        grads = inner.tensor_grads(x, [dgate, dup], us, need[1:13])
        return None, None, None, None, dx if need[0] else None, *grads, *down_grads


def lora_mlp(
    x: Tensor,  # (..., hidden)
    gate: LoraLinear,
    up: LoraLinear,
    down: LoraLinear,
    activation: str = "silu",
) -> Tensor:
    """down(act(gate(x)) * up(x)): (..., hidden). activation: "silu", "gelu" or "gelu_tanh".

    Autocast, dtypes and errors as for `fastft.ops.lora.lora_shared`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if gate.weight.shape != up.weight.shape:
        raise ValueError(
            f"up.weight: expected {tuple(gate.weight.shape)} as gate has, "
            f"got {tuple(up.weight.shape)}"
        )
    rows, first = prepare(x, (gate, up))
    intermediate = gate.weight.shape[1 if gate.transposed else 0]
    # Only down's tensors are wanted here: the mask of its dropout is drawn over h, later.
    undropped = LoraLinear(down.weight, down.bias, down.a, down.b, down.scale, 0.0, down.transposed)
    _, last = prepare(rows.new_empty(0, intermediate), (undropped,))
    p = down.dropout if down.a is not None else 0.0
    y = _LoraMlp.apply(
        _Group.of((gate, up)), _Group.of((down,)), activation, p, *distinct(rows, *first, *last)
    )
    out: Tensor = y.view(*x.shape[:-1], y.shape[-1])
    return out
