"""decoder_layer: one layer of a causal language model over a KV cache, for a few new tokens.

    h = norm(x)        q, k, v = h Wq^T, h Wk^T, h Wv^T      k, v go into the cache, q and k rotated
    x = x + attention(q, cache) Wo^T
    h = norm(x)        x = x + (act(h Wg^T) * h Wu^T) Wd^T   or   x + act(h Wu^T) Wd^T

with RMSNorm or LayerNorm, a norm of the queries' and keys' heads (Qwen3) or none, biases or none,
weights stored as `quantized_linear` takes them, and for each linear layer a low-rank adapter,
unmerged; rows of one batch may take different ones.

The new tokens of all rows lie one after the other: those of row b are cu_seqlens[b] to
cu_seqlens[b + 1], none where a row is finished. lengths[b] counts the slots of the cache in use
with them. So a prompt, a step of decoding and a draft that is verified are one computation, without
padding. On the CPU a token's result has the same bits whatever is computed beside it: that holds
for every operator this one is made of (`quantized_linear`, `decode_attention`).
Activations are float32 on the CPU whatever the weights are; there are no gradients.
The reference, which also serves CUDA by the kernels of the operators it is made of, reads nothing
on the host and its shapes do not depend on values, so that a CUDA graph can hold it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft.library import extension, kernel_only, operator
from fastft.ops.decode_attention import MAX_QUERIES, serving
from fastft.ops.gated_mlp import ACTIVATIONS, _gated_mlp
from fastft.ops.norm import _layer_norm, _rms_norm
from fastft.ops.quantized_linear import Adapter, QuantizedWeight, _quantized_linear
from fastft.ops.rotary import _rotary

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class Linear:
    """A linear layer, and the adapters that rows choose from."""

    weight: QuantizedWeight
    bias: Tensor | None = None  # (out,)
    adapters: tuple[Adapter | None, ...] = ()


@dataclass(frozen=True)
class NormWeight:
    weight: Tensor | None  # (hidden,)
    bias: Tensor | None = None


@dataclass(frozen=True)
class DecoderLayer:
    """Everything but the tokens. `linears` in order: query, key, value, or all three in one;
    output; gate and up, or both in one, or without a gate one; down."""

    linears: tuple[Linear, ...]
    attention_norm: NormWeight
    mlp_norm: NormWeight
    heads: int
    activation: str
    gated: bool
    center: bool  # LayerNorm rather than RMSNorm
    eps: float
    scale: float
    offset: float = 0.0  # added to the norms' weights
    query_norm: NormWeight = NormWeight(None)
    key_norm: NormWeight = NormWeight(None)
    window: int = -1
    softcap: float = 0.0
    arguments: tuple[Any, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Made once: in a step of decoding, gathering them would cost as much as some kernels.
        norms = [
            self.attention_norm.weight,
            self.attention_norm.bias,
            self.mlp_norm.weight,
            self.mlp_norm.bias,
            self.query_norm.weight,
            self.key_norm.weight,
        ]
        linears: list[Tensor | None] = []
        adapters: list[Tensor | None] = []
        scales: list[float] = []
        for linear in self.linears:
            linears += [linear.weight.values, linear.weight.scale, linear.bias]
        for j in range(len(self.linears[0].adapters)):
            for linear in self.linears:
                adapter = linear.adapters[j]
                adapters += [None, None] if adapter is None else [adapter.a, adapter.b]
                scales.append(0.0 if adapter is None else float(adapter.scale))
        stored = {x.weight.round_inputs for x in self.linears if x.weight.scale is not None}
        if len(stored) > 1:
            raise ValueError("linears: expected round_inputs of all stored weights or of none")
        rounds = stored == {True}
        object.__setattr__(self, "arguments", (norms, linears, adapters, scales, rounds))

    @cached_property
    def plan(self) -> Tensor:
        """What the CPU's kernels read: addresses of its tensors, which must live as long."""
        norms, linears, adapters, scales, rounds = self.arguments
        out: Tensor = _decoder_plan(
            linears, norms, adapters, scales, rounds, self.heads,
            ACTIVATIONS.index(self.activation), self.gated, self.center, self.eps, self.offset,
            self.scale, self.window, self.softcap,
        )  # fmt: skip
        return out


@dataclass(frozen=True)
class Tokens:
    """Which new tokens stand where; one for all layers of a step."""

    cu_seqlens: Tensor  # (batch + 1,) int32
    lengths: Tensor  # (batch,) int32: slots of the cache in use, the new tokens' included
    queries: int  # the most new tokens of a row
    cos: Tensor | None = None  # (tokens, rotary dimensions), of x's dtype
    sin: Tensor | None = None
    adapter_of: Tensor | None = None  # (batch,) int32, -1 for none; None: all take the one there is


def _linears(
    x: Tensor,
    row: Tensor,
    linears: list[Any],  # of three each, Tensor or None: values, scale, bias
    adapters: list[Any],  # of two each: a and b, or None and None
    scales: list[float],
    adapter_of: Tensor | None,
    round_inputs: bool,
    first: int,
    count: int,
) -> Tensor:
    """Linear layers [first, first + count), their results side by side."""
    total, outs = len(linears) // 3, []
    for i in range(first, first + count):
        values, scale, bias = linears[3 * i : 3 * i + 3]
        values = values if values.stride(1) == 1 or x.is_cpu else values.contiguous()
        chosen: list[Any] = [(adapters[2 * j], adapters[2 * j + 1], scales[j])
                  for j in range(i, len(scales), total)]  # fmt: skip
        if adapter_of is None:
            a, b, lora_scale = chosen[0] if chosen else (None, None, 0.0)
            outs.append(_quantized_linear(x, values, scale, bias, a, b, lora_scale, round_inputs))
            continue
        y = _quantized_linear(x, values, scale, bias, None, None, 0.0, round_inputs)
        for j, (a, b, lora_scale) in enumerate(chosen):
            if a is not None:
                added = (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t() * lora_scale
                y = y + added * (adapter_of[row] == j)[:, None]
        outs.append(y)
    return torch.cat(outs, 1) if count > 1 else outs[0]


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
    seen: Tensor,
    queries: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """q (tokens, heads, head_dim) at `place` of (batch * queries); at most MAX_QUERIES a call."""
    padded = q.new_zeros(len(seen) * queries, *q.shape[1:])
    padded = padded.index_copy_(0, place, q).view(len(seen), queries, *q.shape[1:])
    outs = []
    for begin in range(0, queries, MAX_QUERIES):
        part = padded[:, begin : begin + MAX_QUERIES].to(keys.dtype)
        lengths = (seen - (queries - begin - part.shape[1])).clamp(min=0)
        attention = serving(part)
        outs.append(attention(part, keys, values, lengths, scale, window, softcap))
    return torch.cat(outs, 1).flatten(0, 1)[place].to(q.dtype)


@operator(
    "decoder_layer(Tensor x, Tensor(a!) keys, Tensor(b!) values, Tensor cu_seqlens, Tensor lengths,"
    " int queries, Tensor? cos, Tensor? sin, Tensor?[] norms, Tensor?[] linears,"
    " Tensor?[] adapters, float[] adapter_scales, Tensor? adapter_of, bool round_inputs, int heads,"
    " int activation, bool gated, bool center, float eps, float offset, float scale, int window,"
    " float softcap) -> Tensor"
)
def _decoder_layer(
    x: Tensor, keys: Tensor, values: Tensor, cu_seqlens: Tensor, lengths: Tensor, queries: int,
    cos: Tensor | None, sin: Tensor | None, norms: list[Tensor | None],
    linears: list[Tensor | None], adapters: list[Tensor | None], adapter_scales: list[float],
    adapter_of: Tensor | None, round_inputs: bool, heads: int, activation: int, gated: bool,
    center: bool, eps: float, offset: float, scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    if len(x) == 0:
        return x.clone()
    token = torch.arange(len(x), device=x.device)
    row = torch.bucketize(token, cu_seqlens[1:].long(), right=True)
    behind = cu_seqlens[1:].long()[row] - token  # tokens of the row from this one on
    dim, kv_heads = keys.shape[3], keys.shape[1]

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if center:
            if offset and weight is not None:
                weight = weight.to(torch.promote_types(x.dtype, torch.float32)) + offset
            return _layer_norm(rows, None, weight, bias, eps)[0].view_as(x)
        return _rms_norm(rows, None, weight, eps, offset)[0].view_as(x)

    def apply(x: Tensor, first: int, count: int) -> Tensor:
        return _linears(
            x, row, linears, adapters, adapter_scales, adapter_of, round_inputs, first, count
        )

    inputs = 1 if len(linears) == 12 else 3
    last = len(linears) // 3 - 1
    qkv = apply(norm(x, norms[0], norms[1]), 0, inputs)
    q, k, v = (
        part.unflatten(1, (-1, dim))
        for part in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    )
    q = q if norms[4] is None else norm(q, norms[4], None)
    k = k if norms[5] is None else norm(k, norms[5], None)
    if cos is not None and sin is not None:
        q, k = (y[0] for y in _rotary(q[None], k[None], cos[None], sin[None], 2))
    slot = lengths.long()[row] - behind
    keys[row, :, slot] = k.to(keys.dtype)
    values[row, :, slot] = v.to(values.dtype)
    seen = torch.where(cu_seqlens[1:] > cu_seqlens[:-1], lengths, 0)
    place = (row + 1) * queries - behind
    attended = _attend(q, keys, values, place, seen, queries, scale, window, softcap)
    x = x + apply(attended.flatten(1), inputs, 1)
    h = apply(norm(x, norms[2], norms[3]), inputs + 1, last - inputs - 1)
    name = ACTIVATIONS[activation]
    if gated:
        gate, up = h.chunk(2, 1)
        h = _gated_mlp(gate, up, name)
    else:
        h = _PLAIN[name](h)
    return x + apply(h, last, 1)


# A layer's weights checked once, and several layers in one call: a step of decoding has little to
# do in each, and to hand over forty tensors of a layer takes as long as some of its kernels.
_decoder_plan = kernel_only(
    "decoder_plan(Tensor?[] linears, Tensor?[] norms, Tensor?[] adapters, float[] adapter_scales,"
    " bool round_inputs, int heads, int activation, bool gated, bool center, float eps,"
    " float offset, float scale, int window, float softcap) -> Tensor"
)
_decoder_layers = kernel_only(
    "decoder_layers(Tensor x, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor cu_seqlens,"
    " Tensor lengths, int queries, Tensor? cos, Tensor? sin, Tensor? adapter_of, Tensor[] plans)"
    " -> Tensor"
)


def decoder_layers(
    x: Tensor,  # (tokens, hidden)
    layers: Sequence[DecoderLayer],
    keys: Sequence[Tensor],  # each (batch, kv_heads, capacity, head_dim), written
    values: Sequence[Tensor],
    tokens: Tokens,
) -> Tensor:
    """The layers one after the other, as `decoder_layer` computes each: (tokens, hidden).

    On the CPU's kernels this is one call, with the same bits. A layer's `plan` keeps the addresses
    of its tensors: weights written in place are seen, and none of the tensors may be `set_` anew.
    Raises: RuntimeError that names the argument.
    """
    if extension is not None and x.is_cpu and x.dtype is torch.float32 and layers:
        out: Tensor = _decoder_layers(
            x, keys, values, tokens.cu_seqlens, tokens.lengths, tokens.queries, tokens.cos,
            tokens.sin, tokens.adapter_of, [layer.plan for layer in layers],
        )  # fmt: skip
        return out
    for layer, own_keys, own_values in zip(layers, keys, values, strict=True):
        x = decoder_layer(x, layer, own_keys, own_values, tokens)
    return x


def decoder_layer(
    x: Tensor,  # (tokens, hidden)
    layer: DecoderLayer,
    keys: Tensor,  # (batch, kv_heads, capacity, head_dim), written
    values: Tensor,  # (batch, kv_heads, capacity, head_dim), written
    tokens: Tokens,
) -> Tensor:
    """One layer for the new tokens: (tokens, hidden). Their keys and values are put into the cache.

    Dtypes: x float32 on the CPU (what a type loses, the cache and the weights lose); on CUDA x's
    dtype is that of its kernels' operands. Called under no_grad. The CPU's kernel checks that all
    sizes belong together and every slot exists.
    Raises: RuntimeError that names the argument.
    """
    norms, linears, adapters, scales, rounds = layer.arguments
    return _decoder_layer(
        x, keys, values, tokens.cu_seqlens, tokens.lengths, tokens.queries, tokens.cos, tokens.sin,
        norms, linears, adapters, scales, tokens.adapter_of, rounds, layer.heads,
        ACTIVATIONS.index(layer.activation), layer.gated, layer.center, layer.eps, layer.offset,
        layer.scale, layer.window, layer.softcap,
    )  # fmt: skip
