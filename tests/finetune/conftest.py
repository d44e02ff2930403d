"""Short runs of `fastft train` on tiny models, shared by the tests of its parts."""

import pytest
from finetune import tiny

from fastft.finetune import TrainConfig

TASKS = {
    "classify": ("encoder", tiny.labelled),
    "ner": ("encoder", tiny.tagged),
    "lm": ("decoder", tiny.texts),
    "sft": ("decoder", None),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    tiny.save_encoder(folder / "encoder")
    tiny.save_model(folder / "decoder")
    for task, (_, rows) in TASKS.items():
        if rows is not None:
            tiny.save_rows(folder / f"{task}.jsonl", rows())
    tiny.save_data(folder / "sft.json")
    return folder


@pytest.fixture
def config(shared, tmp_path):
    """config(task, **settings): a short run whose every step sees all of the data."""

    def make(task: str, **settings) -> TrainConfig:
        data = next(shared.glob(f"{task}.json*"))
        usual = {
            "model": str(shared / TASKS[task][0]),
            "data": str(data),
            "output": str(tmp_path / "run"),
            "validation": 0.0,
            "steps": 12,
            "batch_size": 32,
            "max_length": 32,
            "logging_steps": 1,
            "bottleneck": 8,
            "virtual_tokens": 4,
            "top_layers": 1,
        }
        return TrainConfig(task=task, **usual | settings)

    return make
