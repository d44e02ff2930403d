"""quantized_linear: a linear layer for few tokens over a stored weight, its adapter unmerged.

    y = x W^T + bias + scale (x A^T) B^T

    x (rows, in), W (out, in), A (rank, in), B (out, rank)

W is what `dequantize` gives, from one of these storage layouts (`QuantizedWeight`):

    plain   values (out, in) float32, bfloat16 or float16; no scale.
    int8    values (out, in) int8 in [-127, 127], rows contiguous (as `torch._int_mm` takes them).
            W = values * scale, with scale float32 (out, 1), one per output channel,
            or bfloat16 (out, in / group), one per group of 32 or 64 inputs.
    fp8     values (out, in) e4m3 (torch.float8_e4m3fn), scale float32 (out, 1). For fp8_linear,
            which trains over it; quantized_linear refuses it.
    int4    values (out, in / 2) uint8, `in` a multiple of 32. Every run of 32 inputs is 16 bytes:
            byte j holds input j in its low nibble and input j + 16 in its high nibble, each a
            number of [-8, 7] plus 8. W = number * scale, scale bfloat16 (out, in / group) as above.

A weight with `round_inputs` has x rounded too, on the CPU, where it is int8 or int4: each run of 32
inputs to int8 numbers with one float32 scale, its largest size / 127. Products within a run are
then the processor's integer ones, exact, at the rate at which memory gives the weights; llama.cpp
multiplies its quantised weights so. The adapter sees x as it is. CUDA has no need of it: there x
stays as it is.

Scales are rounded up to their stored type before the weight is quantised, so the largest value
never clips; a channel or group of zeros has scale 1. In int4 a scale has a sign, such that the
largest value becomes -8: of 16 numbers none is left out, at the price of clipping, by at most one
step, what is nearly as large on the other side (as llama.cpp's Q4_0; on SmolLM2-135M it halves what
int4 adds to perplexity over numbers of [-7, 7]). Sums are float32. On CUDA, for x of a half type, a
weight with scales per group is rounded to that type before it is multiplied, as eager code would.

A row's result has the same bits whatever the other rows are and however many there are: a row is
summed in one fixed order, and more than 16 rows are taken in tiles of 16. So tokens decoded alone,
in a batch or as a draft's verification agree bit for bit. The references do not promise that.
There are no gradients: this is for frozen weights after training.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft.library import autocast_dtype, needs_autograd, operator, rows_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)  # which may have a scale per output channel
GROUPS = (32, 64)
RUN = 32  # inputs that 16 bytes of int4 hold
MAX_RANK = 256


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (out, in) in one of the layouts above, checked when it is made."""

    values: Tensor
    scale: Tensor | None = None
    round_inputs: bool = False

    def __post_init__(self) -> None:
        values, scale = self.values, self.scale
        if values.dim() != 2:
            raise ValueError(f"values: expected two dimensions, got {tuple(values.shape)}")
        if values.dtype not in (*FLOATS, torch.float64, *EIGHT_BITS, torch.uint8):
            raise TypeError(f"values: expected floating point, int8 or uint8, got {values.dtype}")
        if values.is_floating_point() and values.dtype not in EIGHT_BITS:
            if scale is not None:
                raise ValueError(f"scale: expected None with values of {values.dtype}")
            return
        if scale is None:
            raise ValueError(f"scale: expected a tensor with values of {values.dtype}")
        out, inputs = self.shape
        if values.dtype is torch.uint8 and inputs % RUN:
            raise ValueError(f"values: expected a multiple of 16 bytes a row, got {inputs // 2}")
        if scale.dtype is torch.float32 and values.dtype in EIGHT_BITS:
            wanted = [(out, 1)]
        elif scale.dtype is torch.bfloat16 and values.dtype is not torch.float8_e4m3fn:
            wanted = [(out, inputs // group) for group in GROUPS if inputs % group == 0]
        else:
            kinds = {torch.uint8: "bfloat16", torch.int8: "float32 or bfloat16"}
            kind = kinds.get(values.dtype, "float32")
            raise TypeError(f"scale: expected {kind}, got {scale.dtype}")
        if tuple(scale.shape) not in wanted:
            raise ValueError(
                f"scale: expected shape {' or '.join(map(str, wanted)) or 'of whole groups'} in "
                f"{scale.dtype} for a weight of {out}x{inputs}, got {tuple(scale.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        out, columns = self.values.shape
        return out, columns * 2 if self.values.dtype is torch.uint8 else columns


@dataclass(frozen=True)
class Adapter:
    """scale * B A, added to a weight without merging it in."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scale: float = 1.0


def _round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive float64 in float32 or bfloat16, never below the exact value."""
    rounded = scale.float()
    bits = rounded.view(torch.int32)
    # Of positive numbers the next larger one has the next larger bits.
    bits = bits + (rounded.double() < scale).int()
    if dtype is torch.bfloat16:
        bits = (bits + 0xFFFF) & ~0xFFFF
    return bits.view(torch.float32).to(dtype)


def quantize(weight: Tensor, bits: int = 8, group: int | None = None) -> QuantizedWeight:
    """A weight (out, in) of floating-point values, stored.

    Args: `bits` is 8 or 4; `group` is 32, 64 or None: one scale per output channel for 8 bits, and
    groups of 32 for 4 bits.
    Raises: ValueError or TypeError that names the argument; NaN and infinity are refused.
    """
    if bits not in (8, 4):
        raise ValueError(f"bits: expected 8 or 4, got {bits}")
    if group not in (None, *GROUPS):
        raise ValueError(f"group: expected None, 32 or 64, got {group}")
    if not weight.is_floating_point() or weight.dim() != 2:
        raise TypeError(
            f"weight: expected floating point (out, in), got {weight.dtype} {tuple(weight.shape)}"
        )
    if bits == 4 and group is None:
        group = RUN
    out, inputs = weight.shape
    if inputs % (group or 1):
        raise ValueError(f"group: expected a divisor of the {inputs} inputs, got {group}")
    wide = weight.detach().float()
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("weight: expected finite values, got NaN or infinity")
    wide = wide.reshape(out, inputs // group, group) if group else wide[:, None, :]
    peak = wide.abs().amax(2) if inputs else wide.new_zeros(wide.shape[:2])
    largest = 127 if bits == 8 else 8
    scale = _round_up(peak.double() / largest, torch.bfloat16 if group else torch.float32)
    if bits == 4:
        scale = torch.where(wide.amax(2) == peak, -scale, scale)
    scale = scale.masked_fill(peak == 0, 1)
    numbers = (wide / scale.float()[..., None]).round_().clamp_(-largest, 127 if bits == 8 else 7)
    numbers = numbers.to(torch.int8).reshape(out, inputs)
    if bits == 4:
        runs = (numbers + 8).to(torch.uint8).reshape(out, inputs // RUN, 2, RUN // 2)
        numbers = (runs[:, :, 0] | runs[:, :, 1] << 4).reshape(out, inputs // 2)
    return QuantizedWeight(numbers.contiguous(), scale.contiguous())


def _dequantized(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return values.to(dtype)
    out, inputs = values.shape
    if values.dtype is torch.uint8:
        runs = values.reshape(out, inputs // 16, 16)
        runs = torch.stack((runs & 15, runs >> 4), 2).to(torch.int8) - 8
        values, inputs = runs.reshape(out, inputs * 2), inputs * 2
    groups = scale.shape[1]
    numbers = values.reshape(out, groups, inputs // max(groups, 1)).to(dtype)
    return (numbers * scale.to(dtype)[..., None]).reshape(out, inputs)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (out, in) that the layout stands for, rounded once to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    return _dequantized(weight.values, weight.scale, wide).to(dtype)


def rounded(x: Tensor) -> Tensor:
    """x (rows, in) as `round_inputs` reads it. A run too small for a normal scale becomes zeros."""
    inputs = x.shape[1]
    runs = F.pad(x, (0, -inputs % RUN)).unflatten(1, (-1, RUN))
    peak = runs.abs().amax(2, keepdim=True)
    any_ = peak > 127 * torch.finfo(torch.float32).tiny
    numbers = torch.where(any_, runs * (127 / peak), 0).round()
    # NaN and infinity anywhere in a run reach every number of it.
    read: Tensor = numbers * (peak / 127) + (runs * 0).sum(2, keepdim=True)
    return read.flatten(1)[:, :inputs]


@operator(
    "quantized_linear(Tensor x, Tensor values, Tensor? scale, Tensor? bias, Tensor? a, Tensor? b,"
    " float lora_scale, bool round_inputs=False) -> Tensor"
)
def _quantized_linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    lora_scale: float,
    round_inputs: bool = False,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)
    read = rounded(rows) if round_inputs and scale is not None and x.is_cpu else rows
    y = read @ _dequantized(values, scale, wide).t()
    if bias is not None:
        y = y + bias.to(wide)
    if a is not None and b is not None:
        y = y + (rows @ a.to(wide).t()) @ b.to(wide).t() * lora_scale
    return y.to(x.dtype).contiguous()


def _check(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, lora: Adapter | None) -> None:
    out, inputs = weight.shape
    tensors = {"weight": weight.values, "scale": weight.scale, "bias": bias}
    if lora is not None:
        tensors |= {"lora.a": lora.a, "lora.b": lora.b}
        rank = lora.a.shape[0] if lora.a.dim() else 0
        if lora.a.shape[1:] != (inputs,) or lora.b.shape != (out, rank):
            raise ValueError(
                f"lora: expected a (rank, {inputs}) and b ({out}, rank), "
                f"got {tuple(lora.a.shape)} and {tuple(lora.b.shape)}"
            )
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"lora: expected a rank of 1 to {MAX_RANK}, got {rank}")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias: expected shape ({out},), got {tuple(bias.shape)}")
    floats = (*FLOATS, torch.float64) if x.dtype is torch.float64 else FLOATS
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x has, got {tensor.device}")
        if tensor.dtype not in (*floats, torch.int8, torch.uint8) or (
            name not in ("weight", "scale") and not tensor.is_floating_point()
        ):
            raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")
    if needs_autograd(x, *tensors.values()):
        raise ValueError(
            "quantized_linear computes no gradients: expected torch.no_grad(), or tensors that "
            "require none; fastft.ops.lora is for training"
        )


def quantized_linear(
    x: Tensor,  # (..., in)
    weight: QuantizedWeight | Tensor,  # (out, in)
    bias: Tensor | None = None,  # (out,)
    lora: Adapter | None = None,
) -> Tensor:
    """x W^T + bias + lora.scale * (x A^T) B^T for x (..., in): (..., out) in x's dtype.

    Made for 1 to 16 rows, where reading the weight is the work; right for any number. Bias and
    adapter may be of another floating-point type than x and the weight. Under autocast x is cast to
    autocast's dtype. Gradients are refused.
    Raises: ValueError or TypeError that names the argument.
    """
    if not x.is_floating_point() or x.dim() == 0:
        raise TypeError(f"x: expected floating point (..., in), got {x.dtype} {tuple(x.shape)}")
    if isinstance(weight, Tensor):
        weight = QuantizedWeight(weight)
    out, inputs = weight.shape
    if x.shape[-1] != inputs:
        raise ValueError(f"x: expected {inputs} inputs as the weight has, got {x.shape[-1]}")
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.dtype is not torch.float64:
        x = x.to(dtype)
    _check(x, weight, bias, lora)
    a, b, lora_scale = (None, None, 0.0) if lora is None else (lora.a, lora.b, lora.scale)
    y = _quantized_linear(
        rows_of(x),
        rows_of(weight.values),
        None if weight.scale is None else rows_of(weight.scale),
        bias,
        None if a is None else rows_of(a),
        None if b is None else rows_of(b),
        lora_scale,
        weight.round_inputs,
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out)


def frozen_linear(
    function: type[torch.autograd.Function],  # of x (rows, in), values, scale (out,), bias
    x: Tensor,  # (..., in)
    weight: QuantizedWeight,  # (out, in), a scale per output channel
    bias: Tensor | None,  # (out,)
) -> Tensor:
    """What int8_linear and fp8_linear have in common: arguments checked, x under autocast's dtype
    and as rows, the result in x's shape."""
    assert weight.scale is not None
    out, inputs = weight.shape
    if not x.is_floating_point() or x.dim() == 0:
        raise TypeError(f"x: expected floating point (..., in), got {x.dtype} {tuple(x.shape)}")
    if x.shape[-1] != inputs:
        raise ValueError(f"x: expected {inputs} inputs as the weight has, got {x.shape[-1]}")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias: expected shape ({out},), got {tuple(bias.shape)}")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias: expected floating point, got {bias.dtype}")
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.dtype is not torch.float64:
        x = x.to(dtype)
    wide = None if bias is None else bias.float()
    y: Tensor = function.apply(rows_of(x), weight.values, weight.scale[:, 0], wide)
    return y.view(*x.shape[:-1], out)
