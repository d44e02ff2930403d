"""lora, forward and backward, at SmolLM2-135M's linear layers, rank 8, against PEFT's formula."""

import pytest
import torch
from torch.nn.functional import linear, silu

from fastft.finetune import floor
from fastft.ops.lora import LoraLinear, lora, lora_shared
from fastft.ops.lora_mlp import lora_mlp

TOKENS, RANK, SCALE = 512, 8, 2.0


def layer(inputs, outputs):
    weight = torch.randn(outputs, inputs) * 0.03
    a = (torch.randn(RANK, inputs) * 0.03).requires_grad_()
    b = (torch.randn(outputs, RANK) * 0.1).requires_grad_()
    return LoraLinear(weight, None, a, b, SCALE)


def eager(x, each):
    """peft.tuners.lora.Linear.forward."""
    return linear(x, each.weight) + linear(linear(x, each.a), each.b) * SCALE


def seconds(*layers):
    """Base products forward and to the input's gradient; the adapters' three each way."""
    total = 0
    for each in layers:
        total += 4 * TOKENS * each.weight.numel() + 6 * TOKENS * RANK * sum(each.weight.shape)
    return total / floor.measure().operations


def close(results):
    for ours, theirs in zip(results["fastft"], results["eager"], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("inputs, outputs", [(576, 1536), (1536, 576), (576, 576), (576, 192)])
def bench_lora(versus, inputs, outputs):
    each = layer(inputs, outputs)
    x = torch.randn(TOKENS, inputs, requires_grad=True)
    dy = torch.randn(TOKENS, outputs)
    sides = {
        "eager": lambda: torch.autograd.grad(eager(x, each), (x, each.a, each.b), dy),
        "fastft": lambda: torch.autograd.grad(lora(x, each), (x, each.a, each.b), dy),
    }
    work = f"lora {TOKENS}x{inputs}->{outputs} r{RANK} fp32 fwd+bwd"
    versus(work, sides, at_least=1.5, floor=seconds(each), check=close, rounds=31)


@pytest.mark.parametrize("tokens", [128, 512])
def bench_query_key_value(versus, tokens):
    """Three calls, as patched attention makes them, against the one that shares their input."""
    linears = layer(576, 576), layer(576, 192), layer(576, 192)
    x = torch.randn(tokens, 576, requires_grad=True)
    dys = [torch.randn(tokens, each.weight.shape[0]) for each in linears]
    leaves = (x, *(t for each in linears for t in (each.a, each.b)))

    def grads(ys):
        return torch.autograd.grad(list(ys), leaves, dys)

    sides = {
        "eager": lambda: grads(eager(x, each) for each in linears),
        "three calls": lambda: grads(lora(x, each) for each in linears),
        "fastft": lambda: grads(lora_shared(x, linears)),
    }
    versus(f"lora q, k, v {tokens} tokens r{RANK} fp32 fwd+bwd", sides, check=close, rounds=31)


def bench_lora_mlp(versus):
    gate, up, down = layer(576, 1536), layer(576, 1536), layer(1536, 576)
    x = torch.randn(TOKENS, 576, requires_grad=True)
    dy = torch.randn(TOKENS, 576)
    leaves = (x, *(t for each in (gate, up, down) for t in (each.a, each.b)))

    def theirs():
        return eager(silu(eager(x, gate)) * eager(x, up), down)

    sides = {
        "eager": lambda: torch.autograd.grad(theirs(), leaves, dy),
        "fastft": lambda: torch.autograd.grad(lora_mlp(x, gate, up, down), leaves, dy),
    }
    work = f"lora_mlp {TOKENS}x576x1536 r{RANK} fp32 fwd+bwd"
    floor_seconds = seconds(gate, up, down)
    versus(work, sides, floor=floor_seconds, check=close, memory=True, rounds=31)
