"""gated_mlp: act(gate) * up, the middle of a gated MLP, in one pass.

    h = act(gate) * up        gate, up, h: (..., intermediate)

    silu       act(x) = x s                     act'(x) = s (1 + x (1 - s)),  s = 1 / (1 + e^-x)
    gelu       act(x) = x P(x)                  act'(x) = P(x) + x e^(-x^2/2) / sqrt(2 pi),
                                                P(x) = (1 + erf(x / sqrt 2)) / 2
    gelu_tanh  act(x) = x (1 + t) / 2           act'(x) = (1 + t) / 2 + x (1 - t^2) u' / 2,
                                                t = tanh u,  u = sqrt(2 / pi) (x + 0.044715 x^3)

    dup = dh act(gate)        dgate = dh up act'(gate)

(SwiGLU and GEGLU, arXiv 2002.05202.) Computed in float32 and rounded once. Only gate and up are
kept for the backward, which recomputes the activation and can give h again in the same pass.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastft.library import (
    distinct,
    first_derivatives_only,
    implement_in_triton,
    needs_autograd,
    operator,
)

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")  # in the order the kernels number them


def _activation(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """act(x) and act'(x)."""
    if name == "silu":
        s = torch.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    if name == "gelu":
        p = 0.5 + 0.5 * torch.erf(x * math.sqrt(0.5))
        return x * p, p + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    scale = math.sqrt(2 / math.pi)
    t = torch.tanh(scale * x * (1 + 0.044715 * x * x))
    inner = scale * (1 + 3 * 0.044715 * x * x)
    return x * (0.5 + 0.5 * t), 0.5 + 0.5 * t + 0.5 * x * (1 - t * t) * inner


def _wide(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [t.to(dtype) for t in tensors]


@operator("gated_mlp(Tensor gate, Tensor up, str activation) -> Tensor")
def _gated_mlp(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    wide_gate, wide_up = _wide(gate, up)
    h = gate.new_empty(gate.shape)
    return h.copy_(_activation(wide_gate, activation)[0] * wide_up)


# With `with_h`, h comes out of the same pass, for a caller that did not keep it; else it is empty.
@operator(
    "gated_mlp_backward(Tensor dh, Tensor gate, Tensor up, str activation, bool with_h)"
    " -> (Tensor h, Tensor dgate, Tensor dup)"
)
def _gated_mlp_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, with_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide_dh, wide_gate, wide_up = _wide(dh, gate, up)
    act, slope = _activation(wide_gate, activation)
    h = gate.new_empty(gate.shape).copy_(act * wide_up) if with_h else gate.new_empty(0)
    dgate = gate.new_empty(gate.shape).copy_(wide_dh * wide_up * slope)
    return h, dgate, gate.new_empty(gate.shape).copy_(wide_dh * act)


# Where the activation and the product as two of PyTorch's operators take less time, by activation,
# dtype and whether a gradient is needed: sizes in elements, measured on one core with AVX-512. SiLU
# starts sooner: 0.7 of our time at 4,096 elements, a tie at the end of the range. PyTorch's exact
# GELU takes fewer instructions, 0.7 to 1 of our time, until what it writes leaves the caches.
_HALVES = (torch.bfloat16, torch.float16)
_EAGER_SIZES = {
    **{("silu", torch.float32, grad): range(1 << 15) for grad in (False, True)},
    **{("silu", dtype, grad): range(1 << 16) for dtype in _HALVES for grad in (False, True)},
    **{
        ("gelu", dtype, grad): range(1 << 15, 1 << 20)
        for dtype in _HALVES
        for grad in (False, True)
    },
    ("gelu", torch.float32, False): range(1 << 15, 1 << 20),
}
_EAGER: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}

implement_in_triton("gated_mlp", _gated_mlp, _gated_mlp_backward)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        # gate, up: (..., intermediate), rows at any distance
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _gated_mlp(gate, up, activation)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        gate_grad, up_grad, _ = ctx.needs_input_grad
        if not gate_grad:
            # act(gate) * dh is all that up needs, and it is the forward's own formula.
            return None, _gated_mlp(gate, dh, ctx.activation), None
        _, dgate, dup = _gated_mlp_backward(dh, gate, up, ctx.activation, False)
        return dgate, dup if up_grad else None, None


def gated_mlp(
    gate: Tensor,  # (..., intermediate)
    up: Tensor,  # (..., intermediate)
    activation: str = "silu",
) -> Tensor:
    """h = act(gate) * up, with act "silu", "gelu" (exact, by erf) or "gelu_tanh".

    Args: gate and up share one shape and dtype (float32, bfloat16, float16, float64); the two
    halves of one tensor, as `chunk(2, -1)` gives them, are read where they lie.
    Returns: h, contiguous, with their shape and dtype.
    Raises: ValueError or TypeError that names the argument.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if not gate.is_floating_point():
        raise TypeError(f"gate: expected a floating-point tensor, got {gate.dtype}")
    if up.dtype != gate.dtype:
        raise TypeError(f"up: expected {gate.dtype} as gate has, got {up.dtype}")
    if gate.dim() == 0:
        raise ValueError("gate: expected at least one dimension, (..., intermediate), got a scalar")
    if up.shape != gate.shape:
        raise ValueError(
            f"up: expected shape {tuple(gate.shape)} as gate has, got {tuple(up.shape)}"
        )
    grad = needs_autograd(gate, up)
    if gate.is_cpu and not torch.compiler.is_compiling():
        if gate.numel() in _EAGER_SIZES.get((activation, gate.dtype, grad), ()):
            return (_EAGER[activation](gate) * up).contiguous()
    if grad:
        out: Tensor = _GatedMlp.apply(*distinct(gate, up), activation)
        return out
    # Decoding makes thousands of small calls, which the autograd Function would slow twofold.
    return _gated_mlp(gate, up, activation)
