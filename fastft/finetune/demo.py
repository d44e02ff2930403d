"""`fastft demo`: the same LoRA fine-tune as PEFT runs it and patched, and what that changed.

Both sides start from the same weights and see the same batches. They take turns, a step each, in
one process, so that whatever else the machine does hits both. Peak memory cannot be told apart in
one process, so each side also takes a step on the largest batch in a process of its own.
"""

import copy
import json
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fastft.finetune import (
    UserError,
    assets,
    data,
    demo_report,
    floor,
    fresh,
    loading,
    methods,
    vocabulary,
)
from fastft.foreign import ForeignModule

LEARNING_RATE = 5e-4
SIDES = ("eager", "patched")


@dataclass(frozen=True)
class Settings:
    """The arguments of `fastft demo`."""

    model: str = "SmolLM2-135M-Instruct"
    data: str = "alpaca"
    steps: int = 10
    batch: int = 8
    longest: int = 192
    rank: int = 8
    seed: int = 0
    threads: int | None = None
    output: str = "runs/demo"
    cache: str = str(assets.CACHE)


@dataclass
class Curve:
    """What one side's training gave, per step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """The tokenizer, the batches to train on, and what is held out to ask about."""

    tokenizer: Any
    batches: list[dict[str, Tensor]]
    held_out: list[dict[str, str]]


def local(settings: Settings) -> Settings:
    """settings with the pinned model and data fetched and replaced by their paths."""
    cache = Path(settings.cache)
    model, records = settings.model, settings.data
    if records in assets.DATASETS:
        records = str(assets.dataset(records, cache))
    if model in assets.MODELS:
        model = str(assets.model(model, cache))
    return Settings(**asdict(settings) | {"model": model, "data": records})


def load_task(settings: Settings) -> Task:
    """The same batches in every process, from `local` settings alone."""
    records = data.read_alpaca(Path(settings.data))
    tokenizer = loading.load_tokenizer(settings.model)
    rows = (data.encode(record, tokenizer).ids for record in records)
    vocabulary.check(rows, tokenizer, loading.embedded(settings.model))
    trained = settings.steps * settings.batch
    chosen = []
    for index in data.shuffled(len(records), settings.seed):
        example = data.encode(records[index], tokenizer)
        if len(example.ids) <= settings.longest:
            chosen.append((records[index], example))
        if len(chosen) == trained + settings.batch:
            break
    if len(chosen) <= trained:
        raise UserError(
            f"{settings.steps} steps of {settings.batch} examples and one held out need more than "
            f"the {len(chosen)} records of {settings.data} with at most {settings.longest} tokens"
        )
    pad = data.pad_id(tokenizer)
    examples = [example for _, example in chosen]
    batches = [
        data.collate(examples[start : start + settings.batch], pad)
        for start in range(0, trained, settings.batch)
    ]
    return Task(tokenizer, batches, [record for record, _ in chosen[trained:]])


def load_base(settings: Settings) -> ForeignModule:
    """The frozen model, in float32: what a CPU is fastest in."""
    model: ForeignModule = loading.load_model(settings.model, "lm")
    if methods.is_adapter(model):
        raise UserError(f"{settings.model}: an adapter; the demo trains its own, so merge it first")
    return model


def load_lora(settings: Settings) -> ForeignModule:
    """The model with fresh LoRA adapters; the same weights for the same seed."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=settings.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    base = load_base(settings)
    torch.manual_seed(settings.seed)
    return get_peft_model(base, config).train()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=True)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> float:
    """One optimizer step; the loss."""
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    out: float = loss.item()
    return out


def train(models: dict[str, nn.Module], batches: list[Any]) -> dict[str, Curve]:
    """Every model over the same batches, in turns, one step each."""
    from tqdm import tqdm

    curves = {side: Curve() for side in models}
    optimizers = {side: adamw(model) for side, model in models.items()}
    with tqdm(total=len(batches) * len(models), desc="training", unit="step") as bar:
        for batch in batches:
            for side, model in models.items():
                start = time.perf_counter()
                loss = train_step(model, optimizers[side], batch)
                curves[side].seconds.append(time.perf_counter() - start)
                curves[side].losses.append(loss)
                bar.set_postfix_str(f"{side} loss {loss:.4f}")
                bar.update()
    return curves


def in_fresh_process(job: str, settings: Settings, **more: Any) -> dict[str, Any]:
    """Runs fastft.finetune.demo_worker's job; its result."""
    order = {"job": job, "settings": asdict(settings), **more}
    return fresh.run("fastft.finetune.demo_worker", order)


def run(settings: Settings) -> dict[str, Any]:
    """The whole demo; prints its table and returns what metrics.json holds."""
    from fastft.patch import patch

    started = time.perf_counter()
    asked = settings
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    settings = local(settings)
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)

    rates = floor.measure()
    assets.say("loading the model twice and encoding the data")
    task = load_task(settings)
    eager = load_lora(settings)
    patched = copy.deepcopy(eager)
    print(patch(patched))
    floors = [floor.seconds(eager, batch, rates) for batch in task.batches]
    curves = train({"eager": eager, "patched": patched}, task.batches)
    adapter = output / "adapter"
    patched.save_pretrained(adapter)
    del eager, patched

    assets.say("peak memory of each side, in a process of its own")
    memory = {side: in_fresh_process("memory", settings, side=side) for side in SIDES}
    assets.say("the adapter, reloaded in a fresh process")
    answers = in_fresh_process("answer", settings, adapter=str(adapter))

    metrics: dict[str, Any] = {
        "settings": asdict(asked),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "tokens": [int(batch["attention_mask"].sum()) for batch in task.batches],
        "places": [batch["attention_mask"].numel() for batch in task.batches],
        "labelled": [int((batch["labels"] != data.IGNORED).sum()) for batch in task.batches],
        "curves": {side: asdict(curve) for side, curve in curves.items()},
        "rates": asdict(rates),
        "floor_seconds": floors,
        "memory": memory,
        "answers": answers,
    }
    metrics["summary"] = summary(metrics)
    metrics["seconds"] = time.perf_counter() - started
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1))
    demo_report.plot(metrics, output / "curves.png")
    print(demo_report.text(metrics, output))
    return metrics


def summary(metrics: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the table. The first step of each side warms up and is not timed."""
    timed = slice(1, None) if len(metrics["tokens"]) > 1 else slice(None)
    tokens = sum(metrics["tokens"][timed])
    seconds = {side: metrics["curves"][side]["seconds"][timed] for side in SIDES}
    losses = [metrics["curves"][side]["losses"] for side in SIDES]
    return {
        "tokens_per_second": {side: tokens / sum(seconds[side]) for side in SIDES},
        "floor_tokens_per_second": tokens / sum(metrics["floor_seconds"][timed]),
        "ratio": median(a / b for a, b in zip(seconds["eager"], seconds["patched"], strict=True)),
        "loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
    }
