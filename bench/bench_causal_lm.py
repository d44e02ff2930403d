"""A LoRA step of SmolLM2-135M in float32, PEFT eager against patched: forward, backward, AdamW.

LoRA of rank 8 on all linear layers with B nonzero. Two works: 4 x 128 tokens, nothing padded and
everything labelled; and real instruction data, 8 records padded to the longest, prompts not
labelled. Both first hold loss and gradients against eager's. The floor counts matrix products.
"""

import copy
from pathlib import Path

import pytest
import torch

from fastft.finetune import data, floor
from fastft.finetune.assets import CACHE
from fastft.finetune.demo import Settings, adamw, load_lora, load_task, local, train_step
from fastft.patch import patch

# How far loss and gradients may lie from float64's, relative.
LOSS, GRADIENT = 1e-6, 1e-4
BATCHES = 3


@pytest.fixture(scope="module")
def models():
    """eager, and the same weights patched."""
    settings = local(Settings(cache=Path(CACHE), batch=8, steps=BATCHES, rank=8))
    eager = load_lora(settings)
    for name, parameter in eager.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    patched = copy.deepcopy(eager)
    patch(patched)
    return settings, eager, patched


def step(model, batch, loss):
    """The loss and the gradients of one step, in float64 for comparing."""
    value = loss(model, batch)
    value.backward()
    grads = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return value.item(), grads


def own_loss(model, batch):
    return model(**batch).loss


def exact_loss(model, batch):
    """From the logits: transformers would turn them into float32 first."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)


def assert_exact(eager, patched, batch):
    """Loss and every gradient against float64."""
    truth, truth_grads = step(copy.deepcopy(eager).double(), batch, exact_loss)
    for name, model in (("eager", eager), ("fastft", patched)):
        value, grads = step(model, batch, own_loss)
        loss = abs(value - truth) / truth
        worst = max((grads[n] - g).norm() / g.norm() for n, g in truth_grads.items())
        print(f"{name}: loss {loss:.1e}, gradients at most {worst:.1e} from float64")
    assert loss <= LOSS and worst <= GRADIENT and grads.keys() == truth_grads.keys()


def run(versus, work, eager, patched, batches, at_least):
    # The works before have trained the two apart.
    patched.load_state_dict(eager.state_dict())
    assert_exact(eager, patched, batches[0])
    rates = floor.measure()
    sides = {}
    for name, model in (("eager", eager), ("fastft", patched)):
        optimizer = adamw(model)

        def steps(model=model, optimizer=optimizer):
            return [train_step(model, optimizer, batch) for batch in batches]

        sides[name] = steps
    seconds = sum(floor.seconds(patched, batch, rates) for batch in batches)
    versus(work, sides, at_least=at_least, floor=seconds, memory=True, rounds=7)


def bench_unpadded_step(versus, models):
    _, eager, patched = models
    ids = torch.randint(0, eager.config.vocab_size, (4, 128))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    run(versus, "SmolLM2-135M LoRA r8 step, 4x128, all labelled", eager, patched, [batch], 1.35)


def bench_instruction_steps(versus, models):
    settings, eager, patched = models
    batches = load_task(settings).batches
    real = sum(int(b["attention_mask"].sum()) for b in batches)
    print(f"{BATCHES} batches: {real} real tokens of {sum(b['labels'].numel() for b in batches)},")
    print(f"{sum(int((b['labels'] != data.IGNORED).sum()) for b in batches)} labelled")
    run(
        versus, f"SmolLM2-135M LoRA r8, {BATCHES} alpaca batches of 8", eager, patched, batches, 2.0
    )
