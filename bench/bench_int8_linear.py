"""A LoRA step of SmolLM2-135M over frozen int8 weights, against PEFT eager and float32 patched.

4 x 128 tokens, all labelled, LoRA of rank 8 on all linear layers: forward, backward, AdamW. Also
what the integer product takes beside the float32 one of the library that PyTorch calls.
"""

import copy
from pathlib import Path

import pytest
import torch

from fastft.finetune.assets import CACHE
from fastft.finetune.demo import Settings, adamw, load_lora, local, train_step
from fastft.ops.int8_linear import int8_product
from fastft.ops.quantized_layer import quantized_layers
from fastft.ops.quantized_linear import quantize
from fastft.ops.round_rows import _round_rows
from fastft.patch import patch


def held(model, everything: bool) -> int:
    """Bytes of the frozen linear layers, or of all that is not an adapter."""
    total = 0
    for name, parameter in model.named_parameters():
        if "lora_" not in name and (everything or name.endswith("base_layer.weight")):
            total += parameter.numel() * parameter.element_size()
    for layer in quantized_layers(model):
        total += sum(b.numel() * b.element_size() for b in layer.buffers())
    return total


def bench_lora_step(versus):
    settings = local(Settings(cache=Path(CACHE), rank=8))
    eager = load_lora(settings)
    for name, parameter in eager.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    models = {"eager": eager, "fastft float32": copy.deepcopy(eager)}
    models["fastft"] = copy.deepcopy(eager)
    patch(models["fastft float32"])
    patch(models["fastft"], base_weights="int8")
    for what, everything in (("frozen linears", False), ("the whole model", True)):
        ratio = held(eager, everything) / held(models["fastft"], everything)
        print(f"\n{what}: {ratio:.2f} times smaller in int8")
    ids = torch.randint(0, eager.config.vocab_size, (4, 128))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    sides = {}
    for name, model in models.items():
        optimizer = adamw(model)

        def step(model=model, optimizer=optimizer):
            return torch.tensor(train_step(model, optimizer, batch))

        sides[name] = step

    def agree(losses):
        for name, loss in losses.items():
            assert abs(loss - losses["eager"]) < 0.02 * losses["eager"], name

    versus(
        "SmolLM2-135M LoRA r8 step, int8 base, 4x128", sides, at_least=2.2, check=agree, rounds=7
    )


@pytest.mark.parametrize("inner, out", [(576, 1536), (1536, 576), (576, 576)])
def bench_product(versus, inner, out):
    x, weight = torch.randn(512, inner), torch.randn(out, inner) * 0.05
    stored = quantize(weight)
    rows, scale = _round_rows(x, None)
    versus(
        f"integer product 512 x {inner} -> {out}",
        {
            "float32": lambda: x @ weight.t(),
            "fastft": lambda: int8_product(rows, scale, stored.values, stored.scale[:, 0]),
        },
        rounds=15,
    )
