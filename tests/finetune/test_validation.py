"""What a run measures on its validation data: means of items, and which checkpoint they choose."""

import json

import pytest
from finetune import tiny

from fastft.finetune import EvaluateConfig, evaluate, train


@pytest.fixture
def chats(tmp_path):
    """Answers of one word and of twenty, in this order, so that batches differ in their tokens."""
    folder = tmp_path / "chats"
    folder.mkdir()
    answers = [" ".join(tiny.WORDS[: 1 if i < 4 else 20]) for i in range(6)]
    rows = [{"instruction": tiny.WORDS[i], "output": text} for i, text in enumerate(answers)]
    for split in ("train", "validation"):
        tiny.save_rows(folder / f"{split}.jsonl", rows)
    return str(folder)


@pytest.mark.parametrize(("packing", "smoothing"), [(None, 0.0), (False, 0.0), (False, 0.1)])
def test_perplexity_is_of_tokens_and_of_labels_as_they_are(
    config, chats, tmp_path, packing, smoothing
):
    run = train(
        config(
            "sft", data=chats, packing=packing, batch_size=2, steps=3, learning_rate=1e-2,
            label_smoothing=smoothing,
        )
    )  # fmt: skip
    own, out = str(run.folder), str(tmp_path / "scores")
    asked = EvaluateConfig(model=[own], data=[chats], split="validation", output=out)
    scores = evaluate(asked).scores[own][chats]
    found = run.metrics["validation"]
    assert found == pytest.approx({n: scores[n] for n in ("loss", "perplexity")}, rel=1e-5)
    logged = tiny.losses(run.folder, "eval_loss")
    assert logged[-1] == pytest.approx(found["loss"], rel=1e-5)


def test_the_loss_of_tags_is_of_tags(config, tmp_path):
    rows = [{"tokens": ["word1"], "tags": ["O"]}] * 4
    rows += [{"tokens": tiny.WORDS[:20], "tags": ["B-PER"] * 20}] * 2
    data = tmp_path / "tagged"
    data.mkdir()
    for split in ("train", "validation"):
        tiny.save_rows(data / f"{split}.jsonl", rows)
    parts = {"data": str(data), "steps": 1, "learning_rate": 1e-9, "dropout": 0.0}
    seen = [
        train(config("ner", batch_size=size, output=str(tmp_path / str(size)), **parts))
        for size in (2, 6)
    ]
    small, whole = (run.metrics["validation"]["loss"] for run in seen)
    assert small == pytest.approx(whole, rel=1e-4)


def test_the_last_checkpoint_is_kept_where_the_best_is_not_wanted(config, tmp_path):
    usual = {
        "validation": 0.25, "evaluate_every": 1, "steps": 20, "learning_rate": 0.3,
        "schedule": "constant", "warmup": 0, "early_stopping": 2,
    }  # fmt: skip
    best = train(config("classify", **usual))
    last = train(config("classify", best=False, output=str(tmp_path / "last"), **usual))
    assert best.metrics["steps"] == last.metrics["steps"] < 20
    logged = [e for e in json.loads((last.folder / "log.json").read_text()) if "eval_loss" in e]
    assert last.metrics["validation"]["loss"] == pytest.approx(logged[-1]["eval_loss"])
    chosen = {e["step"]: e["eval_loss"] for e in logged}[best.metrics["best_step"]]
    assert best.metrics["validation"]["loss"] == pytest.approx(chosen)
    assert chosen != pytest.approx(logged[-1]["eval_loss"])
