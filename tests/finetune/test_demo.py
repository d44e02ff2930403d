"""The demo end to end on a tiny model, and its parts."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from finetune import tiny

from fastft.finetune import UserError, data, demo, demo_report, floor


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return demo.Settings(
        model=str(tiny.save_model(folder / "model")),
        data=str(tiny.save_data(folder / "data.json")),
        steps=2,
        batch=3,
        rank=2,
        output=str(folder / "run"),
        cache=str(folder / "cache"),
    )


def test_end_to_end(settings, capsys):
    metrics = demo.run(settings)
    shown = capsys.readouterr().out
    output = demo.Path(settings.output)
    assert json.loads((output / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "adapter" / "adapter_model.safetensors").exists()
    for word in ("tokens/s", "peak memory", "largest difference", "before", "after", "floor"):
        assert word in shown
    assert metrics["summary"]["loss_difference"] < 1e-4
    assert metrics["answers"]["before"]["loss"] != metrics["answers"]["after"]["loss"]
    for side in metrics["memory"].values():
        assert side["peak"] >= side["before_training"] > 2**20


def test_the_saved_adapter_is_the_trained_one(settings):
    """The fresh process must see the loss that the trained model has here."""
    task, model = demo.load_task(settings), demo.load_lora(settings)
    demo.train({"eager": model}, task.batches)
    batch = data.collate([data.encode(r, task.tokenizer) for r in task.held_out], 2)
    with torch.inference_mode():
        here = model.eval()(**batch).loss.item()
    folder = demo.Path(settings.output).with_name("adapter")
    model.save_pretrained(folder)
    there = demo.in_fresh_process("answer", settings, adapter=str(folder))
    assert there["after"]["loss"] == pytest.approx(here, rel=1e-5)
    assert there["before"]["loss"] != pytest.approx(here, rel=1e-5)


def test_both_sides_get_the_same_weights_and_batches(settings):
    first, second = demo.load_lora(settings), demo.load_lora(settings)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        demo.load_task(settings).batches, demo.load_task(settings).batches, strict=True
    ):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_held_out_records_are_not_trained_on(settings):
    task = demo.load_task(settings)
    decode = task.tokenizer.batch_decode
    texts = [text for batch in task.batches for text in decode(batch["input_ids"])]
    trained = {text.removeprefix("<s> user ").partition(" </s>")[0] for text in texts}
    asked = {record["instruction"] for record in task.held_out}
    known = {record["instruction"] for record in data.read_alpaca(settings.data)}
    assert len(trained) == 6 and len(asked) == 3 and trained | asked <= known
    assert trained.isdisjoint(asked)


def test_a_token_that_the_model_has_no_embedding_for(settings, tmp_path):
    """As padding it is replaced, in a text it is a mistake."""
    asked = replace(settings, model=str(shutil.copytree(settings.model, tmp_path / "model")))
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<turn>"})
    tokenizer.save_pretrained(asked.model)
    assert all(batch["input_ids"].max() < 65 for batch in demo.load_task(asked).batches)
    tokenizer.chat_template = f"<turn> {tiny.TEMPLATE}"
    tokenizer.save_pretrained(asked.model)
    with pytest.raises(UserError, match="row 0: the token '<turn>' is none of the model's 65"):
        demo.load_task(asked)


def test_too_little_data_is_told(settings):
    with pytest.raises(UserError, match="100 steps of 3 examples"):
        demo.load_task(replace(settings, steps=100))
    with pytest.raises(UserError, match="at most 1 tokens"):
        demo.load_task(replace(settings, longest=1))


def test_an_adapter_is_no_model_to_add_one_to(settings, tmp_path):
    demo.load_lora(settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="adapter: an adapter; .* merge it first"):
        demo.load_lora(replace(settings, model=str(tmp_path / "adapter")))


def test_a_name_that_is_nowhere_is_told(settings, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot load 'nobody/nothing'"):
        demo.load_base(demo.Settings(model="nobody/nothing"))


def test_the_floor_counts_the_products(settings):
    """Against PyTorch's own counter, on a batch where nothing is padded and all is labelled."""
    from torch.utils.flop_counter import FlopCounterMode

    model = demo.load_lora(settings)
    ids = torch.randint(5, 60, (2, 16))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    counted = counter.get_total_flops()
    # The counter leaves out the CPU's attention; the floor, what the first layer need not pass on.
    assert 0.8 * counted < floor.operations(model, batch) <= counted


def test_the_floor_leaves_out_padding_and_ignored_labels(settings):
    model = demo.load_lora(settings)
    ids = torch.randint(5, 60, (2, 16))
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    half = {"input_ids": ids[:1], "attention_mask": torch.ones(1, 16).long(), "labels": ids[:1]}
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1], labels[1] = 0, -100
    padded = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    assert floor.operations(model, padded) == floor.operations(model, half)
    assert floor.operations(model, full) == 2 * floor.operations(model, half)


def test_the_table_says_what_the_metrics_hold(tmp_path):
    side = {"losses": [2.0, 1.5], "seconds": [9.0, 2.0]}
    quick = {"losses": [2.0, 1.25], "seconds": [9.0, 1.0]}
    answer = {"loss": 1.0, "text": "yes"}
    metrics = {
        "tokens": [10, 100],
        "places": [20, 200],
        "labelled": [5, 50],
        "curves": {"eager": side, "patched": quick},
        "floor_seconds": [1.0, 0.5],
        "rates": {"operations": 2e11, "bytes": 1e10},
        "memory": {
            "eager": {"peak": 4 << 20, "before_training": 2 << 20},
            "patched": {"peak": 3 << 20, "before_training": 2 << 20},
        },
        "answers": {"question": "so?", "before": answer, "after": answer},
        "torch": "2.13.0",
        "machine": "x86_64",
        "seconds": 3,
    }
    metrics["summary"] = demo.summary(metrics)
    assert metrics["summary"]["ratio"] == 2.0
    assert metrics["summary"]["loss_difference"] == 0.25
    rows = [line.split() for line in demo_report.text(metrics, tmp_path).splitlines()]
    assert ["tokens/s", "50", "100", "2.00x", "(median", "of", "steps)"] in rows
    assert ["peak", "memory", "4", "MiB", "3", "MiB", "1.33x"] in rows
    assert rows[3][-4:] == ["25%", "50%", "200", "tokens/s"]


def test_interrupting_ends_with_130_and_one_line(settings):
    import signal
    import time

    command = [sys.executable, "-m", "fastft", "demo", "--model", settings.model]
    command += ["--data", settings.data, "--steps", "3", "--batch", "3"]
    command += ["--output", settings.output + "-interrupted"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stderr:
        if "loading the model" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # CPython ends by the signal itself where the interrupted code was an exec'd string: a shell
    # shows 130 for both.
    assert process.returncode in (130, -signal.SIGINT), errors[-3000:]
    assert errors.strip().splitlines()[-1] == "fastft: stopped" and "Traceback" not in errors
