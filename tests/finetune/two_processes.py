"""What test_distributed.py runs under torchrun, and by itself in one process.

torchrun --nproc-per-node 2 tests/finetune/two_processes.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from finetune import tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastft.finetune import TrainConfig, examples, running, tasks, train
from fastft.finetune.data import IGNORED

ROWS, STEPS = 8, 3  # of every step, over all processes
CASES = [("sft", "full"), ("sft", "lora"), ("classify", "full"), ("classify", "lora")]


def config(folder: Path, task: str, method: str, processes: int) -> TrainConfig:
    kind, data = {"sft": ("decoder", "sft.json"), "classify": ("encoder", "rows.jsonl")}[task]
    return TrainConfig(
        model=str(folder / kind),
        data=str(folder / data),
        task=task,
        method=method,
        output=str(folder / f"{task}-{method}-{processes}"),
        validation=0.0,
        steps=STEPS,
        batch_size=ROWS // processes,
        packing=False,
        learning_rate=1e-2,
        dropout=0.0,
        max_length=32,
        logging_steps=1,
    )


def by_trainer(folder: Path, task: str, method: str, processes: int) -> list[float]:
    """The losses of `fastft train`: DDP, where there are processes."""
    return tiny.losses(train(config(folder, task, method, processes)).folder)


def by_hand(folder: Path, method: str, rank: int, processes: int) -> list[float]:
    """The losses of a loop of one's own over a patched model: FSDP2, where there are processes."""
    settings = config(folder, "sft", method, processes)
    prepared = running.prepare(settings, examples.read(settings))
    model, rows = prepared.model.train(), list(prepared.datasets["train"])
    collate = tasks.of("sft").collator(prepared.tokenizer, prepared.config)
    if processes > 1:
        mesh = init_device_mesh("cpu", (processes,))
        base = model.get_base_model() if method == "lora" else model
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        whole = [rows[(step * ROWS + i) % len(rows)] for i in range(ROWS)]
        items = sum(label != IGNORED for row in whole for label in row["labels"][1:])
        loss = model(**collate(whole[rank::processes]), num_items_in_batch=items).loss
        (loss * processes).backward()  # FSDP takes the mean over processes
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


def all_cases(folder: Path, rank: int, processes: int) -> dict[str, list[float]]:
    found = {
        f"trainer {task} {method}": by_trainer(folder, task, method, processes)
        for task, method in CASES
    }
    for method in ("full", "lora"):
        found[f"fully_shard {method}"] = by_hand(folder, method, rank, processes)
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    seen = all_cases(place, dist.get_rank(), dist.get_world_size())
    if dist.get_rank() == 0:
        (place / "losses.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
