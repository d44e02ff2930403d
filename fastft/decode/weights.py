"""Weights of eight or four bits for decoding, beside the model's own, which stay as they are.

A decode step is as fast as its weights are read, so fewer bytes are more tokens: int8 has one scale
per output channel, int4 one per 32 or 64 inputs (fastft/ops/quantized_linear.py). On the CPU their
inputs are rounded to int8 as well, so that the products are integer ones; the kinds ending in
_weight_only leave the inputs as they are, and take longer. The copies serve decoding alone;
training, and any other forward, sees the weights they were made of. A copy is made anew when its
weight has changed since. Layers of an int8 base (base_weights) are read as they are: nothing is
stored twice. Over an fp8 base fastft does not decode.
"""

import math
import mmap
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from fastft.decode.linears import DECODE_WEIGHT, weight_of
from fastft.foreign import ForeignModule
from fastft.ops.quantized_layer import QuantizedLinear, kind_of, quantized_layers
from fastft.ops.quantized_linear import QuantizedWeight, quantize

# bits, inputs per scale, whether inputs are rounded
KINDS = {
    "int8": (8, None, True),
    "int4": (4, 32, True),
    "int4_g64": (4, 64, True),
    "int8_weight_only": (8, None, False),
    "int4_weight_only": (4, 32, False),
}
_INT8 = {True: "int8", False: "int8_weight_only"}  # by whether inputs are rounded
_PROBES = 64  # values by which a changed weight is noticed


@dataclass
class DecodeWeight:
    """A quantised copy of one weight, and values by which to tell whether it still is one."""

    kind: str
    stored: QuantizedWeight
    probe: Tensor | None = None  # of a QuantizedLinear, whose numbers these are: none

    @staticmethod
    def of(weight: Tensor, kind: str) -> "DecodeWeight":
        bits, group, rounds = KINDS[kind]
        if weight.shape[1] % (group or 1):
            kind = _INT8[rounds]
            bits, group, rounds = KINDS[kind]
        stored = replace(quantize(weight, bits, group), round_inputs=rounds)
        return DecodeWeight(kind, stored, _probe(weight))

    def current(self, weight: Tensor) -> QuantizedWeight:
        """The copy of the weight (out, in) as it is now.

        Optimizers change every value and move no version counter, so a few values are compared:
        a weight of which only others were written by hand needs `fastft.patch` again.
        """
        probe = _probe(weight)
        if self.probe is None or not torch.equal(probe, self.probe):
            fresh = DecodeWeight.of(weight, self.kind).stored
            self.stored.values.copy_(fresh.values)
            if self.stored.scale is not None and fresh.scale is not None:
                self.stored.scale.copy_(fresh.scale)
            self.probe = probe
        return self.stored


def _in_large_pages(copies: list[DecodeWeight]) -> None:
    """Moves int8 and int4 values on the CPU into one memory of 2 MB pages, where there are any.

    Each token reads every page of every weight: with pages of 4 KB their look-ups took a sixth of a
    decode step here.
    """
    copies = [c for c in copies if c.stored.values.device.type == "cpu"]
    if not copies or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    page, line = 2**21, 64
    sizes = [-(-c.stored.values.numel() // line) * line for c in copies]
    memory = mmap.mmap(-1, sum(sizes) + page)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without them: the memory serves all the same
        pass
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % page
    for copy, size in zip(copies, sizes, strict=True):
        values = copy.stored.values
        moved = whole[begin : begin + values.numel()].view(values.dtype).view(values.shape)
        copy.stored = replace(copy.stored, values=moved.copy_(values))
        begin += size


@lru_cache
def _probed(shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = shape
    at = torch.arange(_PROBES, device=device)
    # Spread over both dimensions: a step of rows or columns alone would miss a changed block.
    return at * max(rows // _PROBES, 1) % rows, at * 31 % columns


def _probe(weight: Tensor) -> Tensor:
    return weight[_probed(weight.shape, weight.device)]


def check_kind(model: nn.Module, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"decode_weights: expected one of {list(KINDS)} or None, got {kind!r}")
    base = kind_of(model)
    if base == "fp8":
        raise ValueError(
            "decode_weights: expected None with base_weights='fp8', from whose layers fastft does "
            f"not decode, got {kind!r}"
        )
    if base == "int8" and kind not in _INT8.values():
        raise ValueError(
            f"decode_weights: expected {' or '.join(_INT8.values())} with base_weights='int8', "
            f"whose layers are decoded from as they are, got {kind!r}"
        )


def store(model: ForeignModule, kind: str) -> dict[tuple[str, str], int]:
    """Gives every linear layer of a causal language model a copy; (class, kind) -> how many.

    A layer whose inputs are no whole groups gets int8, and so does the head: in int4 it would
    cost SmolLM2-135M more perplexity than all other layers together.

    Raises: ValueError for another kind than KINDS, or than int8's over an int8 base, or over fp8.
    """
    check_kind(model, kind)
    base = quantized_layers(model)
    counts: dict[tuple[str, str], int] = {}
    # Adapters are small, and their factors would lose most.
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "lora_B")]
    factors = {part for m in layers for own in (m.lora_A, m.lora_B) for part in own.modules()}
    head = model.get_output_embeddings()
    for module in model.modules():
        weight = None if module in factors else weight_of(module)
        if isinstance(module, QuantizedLinear):
            numbers = replace(module.stored, round_inputs=KINDS[kind][2])
            vars(module)[DECODE_WEIGHT] = DecodeWeight(kind, numbers)
            key = type(module).__name__, kind
            counts[key] = counts.get(key, 0) + 1
        if weight is None:
            continue
        own = _INT8[KINDS[kind][2]] if module is head else kind
        vars(module)[DECODE_WEIGHT] = held = DecodeWeight.of(weight, own)
        key = type(module).__name__, held.kind
        counts[key] = counts.get(key, 0) + 1
    _in_large_pages([vars(m)[DECODE_WEIGHT] for m in model.modules() if DECODE_WEIGHT in vars(m)])
    for module in base:  # the layer's own numbers have moved
        module.values = vars(module)[DECODE_WEIGHT].stored.values
    return counts


def perplexity(model: nn.Module, ids: Tensor, mask: Tensor | None, stored: bool) -> float:
    """e^(mean loss of the next token) through the decode step, with or without the copies.

    Raises: linears.Unfit where the step does not cover the model.
    """
    from fastft.decode.step import FusedStep

    with torch.no_grad():
        step = FusedStep(model, stored=stored)
        mask = torch.ones_like(ids) if mask is None else mask
        rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
        total, count = 0.0, 0
        for row in rows:
            if len(row) < 2:
                continue
            cache = step.new_cache(1, len(row))
            logits = step(cache, [row[:-1]], keep=len(row))
            target = torch.tensor(row[1:], device=logits.device)
            total += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
            count += len(target)
    return math.exp(total / count) if count else math.nan
