"""fastft train on tiny models: every task, every method, and everything a run can go through."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import yaml
from finetune import tiny
from finetune.tiny import losses

from fastft.finetune import UserError, checkpoints, loading, methods, train, trainer
from fastft.finetune.run_folder import RunFolder


def weights(folder) -> dict:
    from safetensors.torch import load_file

    return load_file(next(folder.glob("model/*.safetensors")))


# Every method by every task, without the command, is tested in test_methods.py. A prompt before a
# random frozen encoder says too little of the text in the place that is classified.
RUNS = [("classify", method) for method in methods.METHODS if method not in ("qlora", "prompt")]
RUNS += [(task, method) for task in ("ner", "lm", "sft") for method in ("full", "lora")]
RUNS += [("sft", "prompt"), ("lm", "adapter")]


@pytest.mark.parametrize(("task", "method"), RUNS)
def test_runs_improve_and_are_kept(config, task, method):
    # A prompt before a random frozen model can do little.
    rate, least = (0.3, 0.005) if (task, method) == ("sft", "prompt") else (1e-2, 0.02)
    result = train(config(task, method=method, learning_rate=rate))
    seen = losses(result.folder)
    assert len(seen) == 12 and seen[-1] < seen[0] - least, seen
    trainable = result.metrics["parameters"]["trainable"]
    assert (trainable == result.metrics["parameters"]["all"]) == (method == "full")
    names = {"classify": ["bad", "good"], "ner": ["O", "B-PER"]}.get(task)
    assert loading.known_labels(result.folder) == names
    # What was kept computes what was trained: the loss goes on where it ended.
    tokenizer = loading.load_tokenizer(result.folder)
    model = loading.load_model(result.folder, task, pad_id=tokenizer.pad_token_id)
    assert not list(result.folder.glob("checkpoints"))
    loss = held_loss(config(task, method=method), model, tokenizer)
    assert loss < seen[0] and abs(loss - seen[-1]) < 0.5 * (seen[0] - seen[-1]) + 0.05


def held_loss(config, model, tokenizer) -> float:
    from fastft.finetune import examples, tasks

    names = trainer.class_names(model) if config.task in ("classify", "ner") else None
    rows = examples.encode(examples.read(config), tokenizer, config, names)["train"]
    batch = tasks.of(config.task).collator(tokenizer, config)(list(rows))
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


def test_a_finished_run_holds_what_it_was(config, shared):
    result = train(config("classify", validation=0.25, learning_rate=1e-2, evaluate_every=4))
    folder = result.folder
    held = {path.name for path in folder.iterdir()}
    assert held >= {
        "settings.yaml", "run.json", "metrics.json", "log.json", "patch.txt", "curves.png",
        "confusion.png", "model",
    }  # fmt: skip
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result.metrics))
    assert metrics["rows"] == {"train": 18, "validation": 6}
    assert metrics["validation"]["confusion"] and metrics["validation"]["f1_macro"] > 0.9
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    assert settings["task"] == "classify" and settings["steps"] == 12
    record = json.loads((folder / "run.json").read_text())
    assert len(record["data"][str(shared / "classify.jsonl")]) == 64
    assert record["versions"]["torch"] and record["seed"] == 0
    assert "attention" in (folder / "patch.txt").read_text()
    # Plain transformers goes on from it.
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(result.model)
    assert model.config.id2label == {0: "bad", 1: "good"}


def test_patched_and_not_are_the_same_run(config, tmp_path):
    seen = {}
    for patched in (True, False):
        run = config(
            "classify", patch=patched, output=str(tmp_path / str(patched)), steps=3, dropout=0
        )
        seen[patched] = losses(train(run).folder)
    assert seen[True] == pytest.approx(seen[False], abs=2e-5)


@pytest.mark.parametrize("task", ["classify", "sft"])
def test_a_base_of_eight_bits_trains_an_ordinary_adapter(config, tmp_path, task, base):
    seen = {}
    for kind in ("none", base):
        # At a larger rate roundings that fall the other way grow from step to step.
        own = config(task, method="lora", learning_rate=3e-3, output=str(tmp_path / kind))
        result = train(replace(own, base_weights=kind))
        seen[kind] = losses(result.folder)
    assert seen[base] != seen["none"]
    assert seen[base] == pytest.approx(seen["none"], rel=0.03)
    assert f"{base}_linear" in (result.folder / "patch.txt").read_text()
    assert all("lora_" in name or "modules_to_save" in name or "classifier" in name
               or "pooler" in name for name in weights(result.folder))  # fmt: skip
    with pytest.raises(UserError, match="base_weights"):
        config(task, method="full", base_weights=base)


def test_an_fp8_base_is_refused_where_no_device_has_it(config):
    asked = config("classify", method="lora", base_weights="fp8")
    with pytest.raises(UserError, match="^base_weights: 'fp8' needs a CUDA device"):
        train(asked)


@pytest.mark.parametrize("task", ["classify", "ner", "lm"])
def test_accumulated_batches_are_one_batch(config, tmp_path, task):
    usual = {"steps": 3, "dropout": 0.0, "patch": False}  # fastft's own heads count rightly
    whole = train(config(task, batch_size=24, **usual))
    parts = {"batch_size": 6, "gradient_accumulation": 4, "output": str(tmp_path / "parts")}
    parts = train(config(task, **usual, **parts))
    assert losses(parts.folder) == pytest.approx(losses(whole.folder), abs=1e-4)


class Stop(Exception):
    pass


@pytest.mark.parametrize(("task", "method"), [("classify", "full"), ("sft", "lora")])
def test_resuming_gives_the_uninterrupted_weights(config, tmp_path, monkeypatch, task, method):
    usual = {
        "method": method, "steps": 6, "batch_size": 2, "evaluate_every": 2, "dropout": 0.1,
        "validation": 0.25, "lora_dropout": 0.1, "packing": False,
    }  # fmt: skip
    whole = train(config(task, **usual))
    broken = config(task, **usual, output=str(tmp_path / "broken"))
    from transformers import Trainer

    step, count = Trainer.training_step, []

    def fails(self, *args, **options):
        count.append(0)
        if len(count) == 4:
            raise Stop
        return step(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", fails)
        with pytest.raises(Stop):
            train(broken)
    assert RunFolder(broken.output).last_checkpoint().name == "checkpoint-2"
    with pytest.raises(UserError, match="steps = 6, not 7"):
        train(replace(broken, resume=True, steps=7))
    again = train(replace(broken, resume=True))
    for name, weight in weights(whole.folder).items():
        assert torch.equal(weight, weights(again.folder)[name]), name
    assert losses(again.folder) == losses(whole.folder)
    with pytest.raises(UserError, match="finished"):
        train(replace(broken, resume=True))


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: a process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interruption_keeps_the_step(config, monkeypatch, capsys, interruptible):
    from transformers import Trainer

    step, count = Trainer.training_step, []

    def interrupted(self, *args, **options):
        count.append(0)
        if len(count) == 2:  # of 3 in an epoch
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **options)

    run = config("classify", batch_size=8, evaluate_every=10)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    folder = RunFolder(run.output)
    assert folder.last_checkpoint().name == "checkpoint-2" and not folder.finished
    assert f"fastft train {folder.settings} --resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(UserError, match="no trained model yet"):
        loading.load_model(run.output, "classify")
    result = train(replace(run, resume=True))
    assert len(losses(result.folder)) == 12


def test_early_stopping_ends_with_the_best(config, monkeypatch):
    """A rate that wrecks the model after it was good: the good one is what is kept."""
    run = config(
        "classify", validation=0.25, evaluate_every=2, steps=40, early_stopping=2,
        learning_rate=1e-2, schedule="constant", warmup=0,
    )  # fmt: skip
    scores, measured = iter([0.5, 0.9, 0.4, 0.3, 0.2, 0.1]), trainer.numbers

    def scored(metrics):
        return measured(metrics) | {"f1_macro": next(scores)}

    kept = {}
    keep = checkpoints._Interrupted.on_step_end

    def remember(self, args, state, control, model=None, **more):
        kept[state.global_step] = model.classifier.weight.detach().clone()
        return keep(self, args, state, control, **more)

    monkeypatch.setattr(trainer, "numbers", scored)
    monkeypatch.setattr(checkpoints._Interrupted, "on_step_end", remember)
    monkeypatch.setattr(trainer, "measure", lambda *a: {})
    monkeypatch.setattr("fastft.finetune.running.summary", lambda *a: "")
    result = train(run)
    assert result.metrics["steps"] == 8 and result.metrics["best_step"] == 4
    assert torch.equal(weights(result.folder)["classifier.weight"], kept[4])
    assert not torch.equal(kept[4], kept[8])


def test_a_dry_run_writes_nothing(config, capsys):
    for task in ("classify", "ner", "sft"):
        run = config(task, dry_run=True)
        result = train(run)
        shown = capsys.readouterr().out
        assert not result.folder.exists() and result.model is None
        assert f"task: {task}" in shown and "learning_rate: 5.0e-05" in shown
        assert shown.count("\nexample ") == 3 or task == "sft"
        assert "> " in shown and "minutes" in shown and "MB, activations" in shown
        held, counted = result.metrics["memory_bytes"], result.metrics["parameters"]
        assert held["weights"] == 4 * counted["all"] and held["activations"] > 1000
        assert result.metrics["steps"] == 12
    assert "> word" in shown and "  <s> user" in shown  # the answer is learned, what is asked not


def test_folds_and_seeds_have_mean_and_deviation(config, tmp_path):
    result = train(config("classify", folds=3, steps=1))
    assert [run.folder.name for run in result.runs] == ["fold-1", "fold-2", "fold-3"]
    values = [run.metrics["validation"]["accuracy"] for run in result.runs]
    spread = json.loads((result.folder / "metrics.json").read_text())["validation"]["accuracy"]
    assert spread["mean"] == pytest.approx(sum(values) / 3)
    assert spread["deviation"] == pytest.approx(torch.tensor(values).double().std().item())
    for run in result.runs:
        assert run.metrics["rows"] == {"train": 16, "validation": 8}
        held = [row["support"] for row in run.metrics["validation"]["per_class"].values()]
        assert held == [4, 4]

    seeds = config("classify", seeds=[3, 5], steps=1, output=str(tmp_path / "seeds"))
    result = train(seeds)
    first, second = (weights(run.folder)["classifier.weight"] for run in result.runs)
    assert not torch.equal(first, second)
    # One that was lost is run again, the other is not; the same seed gives the same weights.
    os.unlink(result.folder / "metrics.json")
    shutil.rmtree(result.folder / "seed-5")
    before = (result.folder / "seed-3" / "metrics.json").stat().st_mtime_ns
    again = train(replace(seeds, resume=True))
    assert torch.equal(weights(again.runs[1].folder)["classifier.weight"], second)
    assert (result.folder / "seed-3" / "metrics.json").stat().st_mtime_ns == before


def test_training_goes_on_from_an_adapter(config, tmp_path):
    first = train(config("classify", method="lora", steps=3))
    more = config(
        "classify", method="lora", model=str(first.folder), steps=3, output=str(tmp_path / "2")
    )
    second = train(more)
    assert losses(second.folder)[0] < losses(first.folder)[0]
    changed = [
        n for n, w in weights(first.folder).items() if not w.equal(weights(second.folder)[n])
    ]
    assert any("lora_B" in name for name in changed)
    with pytest.raises(UserError, match="is an adapter|an adapter; the method lora"):
        train(replace(more, method="full", output=str(tmp_path / "3")))


def test_several_labels(config, tmp_path):
    rows = [
        {
            "text": f"word{i % 5} word{30 + i % 3}",
            "label": ["a"] * (i % 5 < 2) + ["b"] * (i % 3 < 1),
        }
        for i in range(30)
    ]
    data = tiny.save_rows(tmp_path / "several.jsonl", rows)
    result = train(
        config(
            "classify",
            data=str(data),
            multi_label=True,
            learning_rate=2e-2,
            validation=0.3,
            evaluate_every=6,
            class_weights="balanced",
        )  # fmt: skip
    )
    assert losses(result.folder)[-1] < 0.5 * losses(result.folder)[0]
    assert result.metrics["validation"]["f1_micro"] > 0.9
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(result.model).problem_type
    assert kind == "multi_label_classification"
