"""New data with classes that the model did not know: they are learned beside the old ones."""

import numpy as np
import pytest
import sklearn.metrics
import torch
from finetune import tiny

from fastft.finetune import (
    EvaluateConfig,
    TrainConfig,
    UserError,
    continual,
    evaluate,
    heads,
    loading,
    metrics,
    train,
)


def rows_of(classes: str, count: int = 32) -> list[dict]:
    """Texts of fifteen words for each class."""
    rows = []
    for i in range(count):
        label = classes[i % len(classes)]
        own = tiny.WORDS[15 * "abcd".index(label) :][:15]
        rows.append({"text": " ".join(own[(i + 4 * j) % 15] for j in range(4)), "label": label})
    return rows


def tagged(name: str, count: int = 24) -> list[dict]:
    """Sentences of three words, of which those of one half of all words are names."""
    own, other = (tiny.WORDS[:30], tiny.WORDS[30:])[:: 1 if name == "PER" else -1]
    tags = [f"B-{name}", "O", f"B-{name}"]
    return [{"tokens": [own[i], other[i], own[(i + 7) % 30]], "tags": tags} for i in range(count)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    tiny.save_encoder(folder / "encoder")
    for name, rows in (("old", rows_of("ab")), ("new", rows_of("cd")), ("one", rows_of("c"))):
        tiny.save_rows(folder / f"{name}.jsonl", rows)
    for name in ("PER", "LOC"):
        tiny.save_rows(folder / f"{name}.jsonl", tagged(name))
    return folder


def settings(shared, output, data, **own) -> TrainConfig:
    usual = {
        "model": str(shared / "encoder"), "task": "classify", "validation": 0.0, "steps": 40,
        "learning_rate": 5e-3, "max_length": 32, "schedule": "constant",
    }  # fmt: skip
    paths = {"output": str(output), "data": str(shared / f"{data}.jsonl")}
    return TrainConfig(**usual | paths | own)


@pytest.fixture(scope="module")
def old(shared):
    return str(train(settings(shared, shared / "old", "old")).folder)


@pytest.fixture(scope="module")
def tags(shared):
    return str(train(settings(shared, shared / "tags", "PER", task="ner")).folder)


def scores(models, shared, names, output, task="classify"):
    data = [str(shared / f"{name}.jsonl") for name in names]
    asked = EvaluateConfig(model=models, data=data, task=task, output=str(output))
    return evaluate(asked).metrics["matrix"]


def test_replayed_classes_stay_beside_new_ones(shared, old, tmp_path):
    own = {"model": old, "learning_rate": 1e-3, "steps": 120}
    plain = train(settings(shared, tmp_path / "plain", "new", **own)).folder
    assert loading.known_labels(plain) == ["c", "d"]
    own |= {"old_data": [str(shared / "old.jsonl")], "replay": 0.5}
    kept = train(settings(shared, tmp_path / "kept", "new", **own)).folder
    assert loading.known_labels(kept) == ["a", "b", "c", "d"]
    models = [old, str(plain), str(kept)]
    found = scores(models, shared, ("old", "new"), tmp_path / "scores")
    assert found[0] == [1.0, 0.0] and found[1][0] == 0.0  # what nobody learned is missed
    assert found[1][1] > 0.9 and found[2][0] > 0.9 and found[2][1] > 0.3, found
    assert (tmp_path / "scores/forgetting.png").is_file()


@pytest.mark.parametrize("way", ["ewc", "distill"])
def test_old_classes_are_kept_without_old_rows_in_a_step(shared, old, tmp_path, way):
    own = {"ewc": 100.0, "old_data": [str(shared / "old.jsonl")]} if way == "ewc" else {}
    own |= {"model": old, "steps": 6, "learning_rate": 1e-3}
    own |= {"distill": 3.0} if way == "distill" else {}
    run = train(settings(shared, tmp_path / "run", "new", **own)).folder
    assert loading.known_labels(run) == ["a", "b", "c", "d"]
    tokenizer, model = loading.load_tokenizer(run), loading.load_model(run, "classify")
    for row in rows_of("ab", 8):
        logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0, :2]
        assert "ab"[logits.argmax()] == row["label"]


def test_one_new_class_is_enough_beside_old_ones(shared, old, tmp_path):
    with pytest.raises(UserError, match="nothing to tell apart"):
        train(settings(shared, tmp_path / "none", "one", model=old))
    replayed = {"old_data": [str(shared / "old.jsonl")], "replay": 0.5}
    run = train(settings(shared, tmp_path / "run", "one", model=old, **replayed)).folder
    assert loading.known_labels(run) == ["a", "b", "c"]


def test_new_tags(shared, tags, tmp_path):
    own = {"old_data": [str(shared / "PER.jsonl")], "replay": 0.5, "task": "ner"}
    run = train(settings(shared, tmp_path / "run", "LOC", model=tags, **own)).folder
    assert loading.known_labels(run) == ["O", "B-PER", "B-LOC"]
    found = scores([tags, str(run)], shared, ("PER", "LOC"), tmp_path / "scores", "ner")
    assert found[0][0] > 0.9 and found[0][1] < 0.1 and min(found[1]) > 0.9, found


def test_a_head_that_grows_says_the_same_of_what_it_knew(old):
    ids = torch.tensor([[7, 8, 9, 20]])
    before = loading.load_model(old, "classify")
    after = loading.load_model(old, "classify", labels=["a", "b", "c", "d"])
    with torch.no_grad():
        was, now = (model(ids).logits for model in (before, after))
    assert torch.allclose(now[:, :2], was, atol=1e-6) and now.shape == (1, 4)
    assert after.config.num_labels == after.num_labels == 4
    assert not heads.grows(["a", "b"], ["b", "a", "c"]) and not heads.grows(["a"], ["a"])


def test_an_adapter_says_that_it_cannot_grow(shared, tmp_path):
    first = train(settings(shared, tmp_path / "1", "old", method="lora", steps=1)).folder
    with pytest.raises(UserError, match="an adapter for the classes a, b.* merge it first"):
        train(settings(shared, tmp_path / "2", "new", model=str(first), method="lora", distill=1.0))


@pytest.mark.parametrize("multi_label", [False, True])
def test_only_old_classes_are_distilled(multi_label):
    keeping = continual.Keeping("classify", multi_label, known=2, distill=1.0)
    keeping.teacher = lambda **given: {"logits": torch.tensor([[1.0, -1.0]])}
    labels = torch.tensor([[1.0, 0.0, 1.0]]) if multi_label else torch.tensor([2])
    logits = torch.tensor([[0.5, 0.2, 3.0]], requires_grad=True)
    keeping({"logits": logits}, {"labels": labels}).backward()
    assert logits.grad[0, 2] == 0 and (logits.grad[0, :2] != 0).all()


def test_averages_leave_out_classes_that_are_nowhere():
    """As scikit-learn does where it is told no classes: a model of many may be asked of few."""
    chances = np.array([[0.9, 0.05, 0.05], [0.2, 0.7, 0.1], [0.8, 0.1, 0.1]])
    found = metrics.classification([0, 1, 0], chances, ["a", "b", "c"])
    assert found["f1_macro"] == 1.0 and found["per_class"]["c"]["support"] == 0
    found = metrics.classification([0, 1, 1], chances, ["a", "b", "c"])
    wanted = sklearn.metrics.f1_score([0, 1, 1], [0, 1, 0], average="macro")
    assert found["f1_macro"] == pytest.approx(wanted)
    many = metrics.multi_label([[1, 0, 0]], np.array([[0.9, 0.1, 0.2]]), ["a", "b", "c"])
    assert many["f1_macro"] == 1.0


def test_unknown_classes_are_a_mistake_where_no_model_knows_them(shared, old, tmp_path):
    data = str(shared / "new.jsonl")
    with pytest.raises(UserError, match="not one of a, b"):
        evaluate(EvaluateConfig(model=[old], data=[data], output=str(tmp_path / "out")))
