"""quantized_linear for the few rows of decoding, against eager over the unpacked weight.

The weights of a model do not fit the caches, so every call takes another copy, in turns.
"""

import pytest
import torch
from torch.nn.functional import linear

from fastft.finetune import floor
from fastft.ops.quantized_linear import Adapter, QuantizedWeight, quantize, quantized_linear

RANK, SCALE = 8, 2.0
CACHES = 96 << 20  # bytes that the copies in float32 fill together
STORED = {
    "fp32": QuantizedWeight,
    "int8": quantize,
    "int4": lambda weight: quantize(weight, 4, 32),
}
ONCE = {}


def rates():
    """Bytes read and operations in a second, measured once a session."""
    if "rates" not in ONCE:
        ONCE["rates"] = floor.measure()
    return ONCE["rates"]


def seconds(weights, rows):
    """To read the weights, or to multiply in float32: the longer of the two."""
    total = 0
    for weight in weights:
        size = sum(
            t.numel() * t.element_size() for t in (weight.values, weight.scale) if t is not None
        )
        total += max(
            size / rates().bytes, 2 * rows * weight.shape[0] * weight.shape[1] / rates().operations
        )
    return total


def copies(inputs, outputs):
    return [
        torch.randn(outputs, inputs) * 0.03 for _ in range(max(1, CACHES // (4 * inputs * outputs)))
    ]


def within(tolerance):
    def check(results):
        for ours, theirs in zip(results["fastft"], results["eager"], strict=True):
            assert (ours - theirs).norm() <= tolerance * theirs.norm()

    return check


TOLERANCE = {"fp32": 1e-6, "int8": 0.02, "int4": 0.15}
AIM = {"fp32": 1.0, "int8": 2.5, "int4": 3.5}


@pytest.mark.parametrize("inputs, outputs", [(576, 1536), (2048, 2048), (4096, 4096)])
@pytest.mark.parametrize("rows", [1, 4, 8, 16])
@pytest.mark.parametrize("layout", STORED)
def bench_quantized_linear(versus, layout, rows, inputs, outputs):
    plain = copies(inputs, outputs)
    stored = [STORED[layout](weight) for weight in plain]
    x = torch.randn(rows, inputs)
    with torch.no_grad():
        versus(
            f"linear {layout}, {rows}x{inputs}->{outputs}, {len(plain)} calls",
            {
                "eager": lambda: [linear(x, weight) for weight in plain],
                "fastft": lambda: [quantized_linear(x, weight) for weight in stored],
            },
            at_least=AIM[layout] if rows == 1 or layout == "fp32" else None,
            floor=seconds(stored, rows),
            check=within(TOLERANCE[layout]),
            rounds=15,
        )


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("layout", STORED)
def bench_with_adapter(versus, layout, rows):
    inputs = outputs = 2048
    plain = copies(inputs, outputs)
    stored = [STORED[layout](weight) for weight in plain]
    x = torch.randn(rows, inputs)
    lora = Adapter(torch.randn(RANK, inputs) * 0.03, torch.randn(outputs, RANK) * 0.1, SCALE)

    def eager(weight):
        """peft.tuners.lora.Linear.forward."""
        return linear(x, weight) + linear(linear(x, lora.a), lora.b) * SCALE

    with torch.no_grad():
        versus(
            f"linear {layout} and LoRA r{RANK}, {rows}x{inputs}->{outputs}, {len(plain)} calls",
            {
                "eager": lambda: [eager(weight) for weight in plain],
                "fastft": lambda: [quantized_linear(x, weight, None, lora) for weight in stored],
            },
            floor=seconds(stored, rows),
            check=within(TOLERANCE[layout]),
            rounds=15,
        )
