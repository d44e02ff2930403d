"""What base_weights of each kind cost in perplexity and in the gradients of adapters.

fp8 by its reference, which the CPU computes: its sums are more exact than those of a GPU, which
keeps them in its tensor cores, and its results are not rounded to bfloat16.
"""

from pathlib import Path
from unittest import mock

import torch

import fastft
from bench.int8_outliers import LENGTH, TOKENS, alpaca_rows, perplexity
from bench.workflows import SMOLLM, table
from fastft.ops.quantized_layer import KINDS, computing

RANK, ROWS = 8, 2


def _adapted():
    """With adapters whose B is not zero, so that every gradient is to be seen."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from fastft.finetune.loading import locate

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(locate(SMOLLM), dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return model


def section(work: Path) -> str:
    rows = alpaca_rows()[4:]
    with torch.no_grad():
        before = perplexity(_adapted(), rows)
    told = [
        ("base", "perplexity, weights alone", "perplexity", "cosine of gradients", "the smallest"),
        ("float32", "", f"{before:.4f}", "", ""),
    ]

    def changed(now: float) -> str:
        return f"{now:.4f}, {100 * (now / before - 1):+.2f} %"

    for kind in KINDS:
        model = _adapted()
        with mock.patch("fastft.ops.fp8_linear.why_not", lambda device: None):
            fastft.patch(model, base_weights=kind, originals=work / kind)
        with torch.no_grad():
            now = perplexity(model, rows)
            with computing(model, "numbers"):
                alone = perplexity(model, rows)
        batch = rows[:ROWS]
        cost = fastft.verify(model, {"input_ids": batch, "labels": batch}).base
        cosines = cost.cosines.values()
        mean, least = sum(cosines) / len(cosines), min(cosines)
        told.append((kind, changed(alone), changed(now), f"{mean:.4f}", f"{least:.4f}"))
        print(told[-1], flush=True)
    return (
        f"{SMOLLM} with LoRA of rank {RANK}, {TOKENS} tokens of alpaca in rows of {LENGTH}; "
        f"gradients of the adapters on {ROWS} rows, against those over the float32 weights. fp8 by "
        f"its reference on the CPU.\n\n{table(told)}"
    )
