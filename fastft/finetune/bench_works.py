"""What `fastft bench` times: a step of training, a prediction, a decoded answer.

`python -m fastft.finetune.bench_works ORDER` does one of them once, on one side, for its peak
memory; ORDER is JSON, and so is the last line of stdout.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from fastft.decode.generate import generate
from fastft.decode.peak_memory import peak
from fastft.finetune import (
    UserError,
    data,
    demo,
    examples,
    loading,
    reading,
    running,
    tasks,
)
from fastft.finetune.bench import SIDES, BenchConfig
from fastft.finetune.train import TrainConfig
from fastft.foreign import ForeignModule
from fastft.patch import patch, verify

# Rows that are read for each that is used: some are too long, packed ones hold several.
_SPARE = 4
_LONGEST = 256  # tokens of a row, where nothing else is asked for


@dataclass(frozen=True)
class Material:
    """The model as it came, with what the method adds, and what it is given.

    batches: one more than rounds, as the first warms up. prompts: one for each, ids (1, length),
    where the model decodes.
    """

    model: nn.Module
    batches: list[dict[str, Tensor]]
    prompts: list[Tensor]


def load(config: BenchConfig) -> Material:
    """The same in every process. Raises: UserError."""
    running.check_base(config.base_weights, _device())
    rows = reading.splits(config.data)["train"]
    count = min(len(rows), _SPARE * (config.rounds + 1) * config.batch_size)
    rows = rows.select(data.shuffled(len(rows), config.seed)[:count])
    prepared = running.prepare(_train_config(config), {"train": rows})
    encoded, model = prepared.datasets["train"], prepared.model.to(_device())
    collate = tasks.of(config.task).collator(prepared.tokenizer, prepared.config)
    turns, size = config.rounds + 1, config.batch_size
    batches = []
    for start in islice(cycle(range(0, len(encoded), size)), turns):
        part = [encoded[i] for i in range(start, min(start + size, len(encoded)))]
        batches.append({name: held.to(_device()) for name, held in collate(part).items()})
    prompts = []
    if "decode" in config.works:
        chosen = islice(cycle(range(len(encoded))), turns)
        prompts = [torch.tensor([_prompt(encoded[i])], device=_device()) for i in chosen]
        _check_lengths(model, prompts, config.new_tokens)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=config.new_tokens,
            pad_token_id=data.pad_id(prepared.tokenizer),  # and no end: answers of one length
        )
        for module in model.modules():  # PEFT's model has one beside that of the model inside
            if hasattr(module, "generation_config"):
                module.generation_config = settings
    return Material(model, batches, prompts)


def _train_config(config: BenchConfig) -> TrainConfig:
    names = {item.name for item in fields(TrainConfig)} & {item.name for item in fields(config)}
    same = {name: getattr(config, name) for name in names - {"output", "base_weights"}}
    asked = TrainConfig(**same, validation=0.0, patch=False)
    if asked.max_length is None:
        tokenizer = running.load_tokenizer(asked)
        most = examples.limit(asked, tokenizer, loading.load_config(asked.model))
        asked.max_length = min(most, _LONGEST)
    return asked


def compare(material: Material, config: BenchConfig) -> dict[str, float]:
    """How far the patched model's results lie from eager's, relative.

    Loss, logits and gradients of a batch; of an answer, how far below eager's likeliest token its
    tokens are by eager's own logits. Raises: UserError where their type does not explain it.
    """
    found = verify(material.model, material.batches[0])
    name, gradient = found.worst_gradient
    apart = {"loss": found.loss, "logits": found.logits, "gradients": gradient}
    if material.prompts:
        apart["tokens"] = _below(material.model, material.prompts[0])
    worst = max(apart, key=apart.__getitem__)
    if not found.ok or apart[worst] > found.tolerance:
        said = found.remarks or [
            f"{worst} by {apart[worst]:.1e}, where {found.tolerance:g} is accepted"
        ]
        raise UserError(f"results differ once patched, and nothing was timed: {said[0]}")
    return {f"largest relative difference of {name}": value for name, value in apart.items()}


def sides(material: Material, config: BenchConfig) -> tuple[dict[str, nn.Module], str]:
    """Both sides' models, and patch's report."""
    patched = deepcopy(material.model)
    return {"eager": material.model, "patched": patched}, _patch(patched, config)


def in_turns(
    models: dict[str, nn.Module], material: Material, config: BenchConfig, work: str
) -> dict[str, Any]:
    """seconds: of each side's turns, without the first; ratio: the median of eager's over ours."""
    works = {side: _works(model, side, material, config)[work] for side, model in models.items()}
    seconds: dict[str, list[float]] = {side: [] for side in models}
    for turn in range(config.rounds + 1):
        for side, run in works.items():
            _wait()
            started = time.perf_counter()
            run(turn)
            _wait()
            seconds[side].append(time.perf_counter() - started)
    seconds = {side: taken[1:] for side, taken in seconds.items()}
    pairs = zip(*(seconds[side] for side in SIDES), strict=True)
    return {"seconds": seconds, "ratio": statistics.median(a / b for a, b in pairs)}


def _works(
    model: ForeignModule, side: str, material: Material, config: BenchConfig
) -> dict[str, Callable[[int], None]]:
    """What a side does in turn i."""
    half = torch.autocast(_device().type, torch.bfloat16, enabled=config.precision == "bf16")
    optimizer = demo.adamw(model)

    def train(i: int) -> None:
        model.train()
        with half:
            loss = model(**material.batches[i]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def predict(i: int) -> None:
        given = {name: held for name, held in material.batches[i].items() if name != "labels"}
        with half:
            model.eval()(**given)

    def decode(i: int) -> None:
        if side == "patched":
            generate(model.eval(), _unpadded(material.prompts[i]))
        else:
            model.eval().generate(**_unpadded(material.prompts[i]))

    return {"train": train, "predict": predict, "decode": decode}


def _patch(model: nn.Module, config: BenchConfig) -> str:
    base, stored = (
        None if kind == "none" else kind for kind in (config.base_weights, config.decode_weights)
    )
    return str(patch(model, base_weights=base, decode_weights=stored))


def _prompt(row: dict[str, Any]) -> list[int]:
    """What comes before the first learned token; where all are learned, the first half."""
    ids, labels = row["input_ids"], row["labels"]
    first = next((i for i, label in enumerate(labels) if label != data.IGNORED), 0)
    out: list[int] = ids[: first or max(1, len(ids) // 2)]
    return out


def _check_lengths(model: nn.Module, prompts: list[Tensor], more: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    longest = max(ids.shape[1] for ids in prompts)
    if most is not None and longest + more > most:
        raise UserError(
            f"new_tokens: {more} behind a prompt of {longest} are more than the model's {most}; "
            "lower it or max_length"
        )


@torch.no_grad()
def _below(model: nn.Module, ids: Tensor) -> float:
    """The most that a decoded token's logit is below the largest, relative to the largest."""
    answered = generate(model.eval(), _unpadded(ids)).sequences
    new = answered[:, ids.shape[1] :]
    logits = model(**_unpadded(answered)).logits
    logits = logits[:, -new.shape[1] - 1 : -1].double()  # of virtual tokens come first
    chosen = logits.gather(-1, new[..., None])[..., 0]
    return float((logits.amax(-1) - chosen).max() / logits.abs().max())


def _unpadded(ids: Tensor) -> dict[str, Tensor]:
    # Without a mask, tokens that happen to be the padding token would be left out.
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _device() -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _peak(config: BenchConfig, work: str, side: str) -> dict[str, Any]:
    """Bytes: the process's peak after one turn on the largest batch, and before it."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    material = load(config)
    if side == "patched":
        _patch(material.model, config)
    sizes = [batch["input_ids"].numel() for batch in material.batches]
    before = peak(_device())
    _works(material.model, side, material, config)[work](sizes.index(max(sizes)))
    return {"peak": peak(_device()), "before": before}


def main(order: dict[str, Any]) -> None:
    found = _peak(BenchConfig(**order["settings"]), order["work"], order["side"])
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
