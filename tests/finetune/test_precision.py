"""fastft train in mixed precision, with gradient checkpointing, learns what float32 does."""

import json

import pytest

from fastft.finetune import train


@pytest.mark.parametrize(
    ("task", "method"), [("classify", "full"), ("ner", "lora"), ("lm", "full"), ("sft", "lora")]
)
def test_mixed_precision_learns_what_float32_does(config, tmp_path, task, method):
    seen = {}
    for precision in ("float32", "bf16"):
        own = {"precision": precision, "output": str(tmp_path / precision)}
        run = config(task, method=method, learning_rate=1e-2, gradient_checkpointing=True, **own)
        log = json.loads((train(run).folder / "log.json").read_text())
        seen[precision] = [entry["loss"] for entry in log if "loss" in entry]
    exact, mixed = seen["float32"], seen["bf16"]
    assert mixed != exact  # it was another precision
    gained = exact[0] - exact[-1]
    assert gained > 0.02
    assert max(abs(a - b) for a, b in zip(exact, mixed, strict=True)) < 0.3 * gained + 0.02
