"""What a user of fastft train may get wrong: one sentence, exit code 2, nothing left behind."""

import errno
import io
import json
import os
from dataclasses import replace

import pytest
import torch
from finetune import tiny

from fastft import cli
from fastft.finetune import GenerateConfig, MergeConfig, UserError, run_folder, train
from fastft.finetune.run_folder import readable


def gpt2(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 65}
    GPT2LMHeadModel(GPT2Config(**settings)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def wrong(shared, tmp_path) -> dict[str, tuple[dict, str]]:
    """What a user may get wrong: the settings, and words of the sentence."""

    def rows(name, held):
        return str(tiny.save_rows(tmp_path / name, held))

    good, bad = {"text": "word1", "label": "good"}, {"text": "word2", "label": "bad"}
    return {
        "no file": ({"data": str(tmp_path / "none.csv")}, "no such file"),
        "no column": ({"text_column": "txt"}, "no column 'txt'; did you mean 'text'"),
        "no label column": ({"label_column": "lable"}, "did you mean 'label'"),
        "one class": ({"data": rows("one.jsonl", [good] * 5)}, "nothing to tell apart"),
        "no label": ({"data": rows("x.jsonl", [good, {"text": "a"}, bad])}, "row 1: no label"),
        "no text": (
            {"data": rows("t.jsonl", [good, bad | {"text": None}])},
            "row 1: expected a text to classify, got None",
        ),
        "unseen label": (
            {"validation_data": rows("v.jsonl", [good, good | {"label": "fine"}])},
            "validation: row 1: the label 'fine' is not one of bad, good",
        ),
        "lists of labels": (
            {"data": rows("l.jsonl", [{"text": "a", "label": ["x", "y"]}] * 3)}, "multi_label",
        ),
        "too long": ({"max_length": 65}, "more than the model's 64"),
        "no validation": ({"early_stopping": 1}, "no validation data to stop by"),
        "few rows": ({"folds": 13}, "the label 'bad' has 12 rows"),
        "no model": ({"model": str(tmp_path / "nothing")}, "no such folder"),
        "a file": ({"model": str(shared / "classify.jsonl")}, "a file"),
        "no such method here": ({"task": "ner", "method": "prompt"}, "does not fit"),
        "no such reporter": ({"report_to": ["tensorbord"]}, "report_to: expected none"),
        "no DeepSpeed file": ({"deepspeed": str(tmp_path / "none.json")}, "no such file"),
        "nothing for eight bits": (
            {"model": str(gpt2(tmp_path / "gpt2")), "task": "lm", "method": "lora",
             "base_weights": "int8"},
            "its frozen layers are Conv1D",
        ),
        "numbers as tags": (
            {"data": rows("n.jsonl", [{"tokens": ["word1", "word2"], "tags": [0, 1]}]),
             "task": "ner"},
            "the tags are numbers (0, 1, …)",
        ),
        "measures": (
            {"data": rows("m.jsonl", [good | {"label": 0.5}, bad | {"label": 1.5}])},
            "row 0: the label 0.5 is a measure",
        ),
        "many labels": (
            {"data": rows("d.jsonl", [{"text": "word1", "label": f"l{i:02}"} for i in range(40)]),
             "validation_data": rows("w.jsonl", [good])},
            "is not one of l00, l01, l02, l03, l04, l05, l06, l07, l08, l09, l10, l11 and 28 more",
        ),
        "questions and answers": (
            {"task": "sft", "model": str(shared / "decoder"),
             "data": rows("q.jsonl", [{"question": "word1", "answer": "word2"}] * 3)},
            "); rename them",
        ),
        "half on the CPU": ({"precision": "fp16"}, "needs a GPU"),
        "labels in no list": (
            {"multi_label": True, "data": rows("i.jsonl", [good | {"label": 1}] * 2)},
            "row 0: expected labels in a list, got 1",
        ),
        "folds and validation data": (
            {"folds": 2, "validation_data": rows("f.jsonl", [good, bad])},
            "every fold validates on its own part",
        ),
        "one row": (
            {"data": rows("s.jsonl", [good]), "validation": 0.5}, "one row cannot be split",
        ),
    }  # fmt: skip


def test_mistakes_are_one_sentence_and_leave_nothing(config, shared, tmp_path, capsys):
    for name, (settings, words) in wrong(shared, tmp_path).items():
        if name == "half on the CPU" and torch.accelerator.is_available():
            continue
        run = config("classify", **{k: v for k, v in settings.items() if k != "task"})
        run = replace(run, task=settings.get("task", "classify"))
        with pytest.raises(UserError) as raised:
            train(run)
        assert words in str(raised.value), name
        assert "\n" not in str(raised.value), name
        assert not (tmp_path / "run").exists(), name


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_not_every_library_takes(config, seed):
    asked = [
        lambda: config("classify", seed=seed),
        lambda: config("classify", seeds=[1, seed]),
        lambda: GenerateConfig(model="m", seed=seed),
        lambda: MergeConfig(adapter=["a"], output="o", seed=seed),
    ]
    for make in asked:
        with pytest.raises(UserError, match=f"^seeds?: expected at .*, got {seed}$"):
            make()


def test_a_run_is_not_written_over(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        train(config("classify"))
    with pytest.raises(UserError, match="no run to resume"):
        train(config("classify", resume=True))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_run_does_not_go_on_with_other_data(config, tmp_path):
    data = tiny.save_rows(tmp_path / "rows.jsonl", tiny.labelled())
    run = config("classify", data=str(data))
    run_folder.start(run, [data])
    tiny.save_rows(data, tiny.labelled(20))
    with pytest.raises(UserError, match="rows.jsonl has changed since the run was started"):
        train(replace(run, resume=True))


def test_the_command(shared, tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"model: {shared / 'encoder'}\ndata: {shared / 'classify.jsonl'}\n"
        "task: classify\nsteps: 2\n"
    )
    output = tmp_path / "out"
    assert cli.main(["train", str(settings), "--output", str(output), "--seed", "4"]) == 0
    assert json.loads((output / "metrics.json").read_text())["seed"] == 4
    shown = capsys.readouterr().out
    assert "f1_macro" in shown and "2 steps" in shown
    assert cli.main(["train", str(settings), "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err


class Full(io.RawIOBase):
    """A file on a full disk."""

    def writable(self):
        return True

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def by_name():
    # As torch's writer says it of a file that it opened itself.
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


@pytest.mark.parametrize(
    "write",
    [
        lambda: Full().write(b"a"),
        lambda: torch.save(torch.zeros(9), Full()),
        lambda: torch.save(torch.zeros(10**6), Full()),
        by_name,
    ],
)
def test_a_full_disk_is_one_sentence(write):
    """Each writer has an exception of its own for it."""
    with pytest.raises(UserError, match="^here: .*(No space left|disk full)") as raised:
        with readable("here"):
            write()
    assert "\n" not in str(raised.value)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="mine"):
        with readable("here"):
            raise RuntimeError("mine")
