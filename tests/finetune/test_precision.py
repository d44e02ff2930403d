"""fastft train in mixed precision, and with gradient checkpointing, learns what float32 does."""

import pytest
from finetune.tiny import losses
from transformers.models.bert.modeling_bert import BertIntermediate

from fastft.finetune import train


@pytest.mark.parametrize(
    ("task", "method"), [("classify", "full"), ("ner", "lora"), ("lm", "full"), ("sft", "lora")]
)
def test_mixed_precision_learns_what_float32_does(config, tmp_path, task, method):
    seen = {}
    for precision in ("float32", "bf16"):
        own = {"precision": precision, "output": str(tmp_path / precision)}
        run = config(task, method=method, learning_rate=1e-2, gradient_checkpointing=True, **own)
        seen[precision] = losses(train(run).folder)
    exact, mixed = seen["float32"], seen["bf16"]
    assert mixed != exact  # it was another precision
    gained = exact[0] - exact[-1]
    assert gained > 0.02
    assert max(abs(a - b) for a, b in zip(exact, mixed, strict=True)) < 0.3 * gained + 0.02


def test_checkpointing_computes_layers_twice_and_learns_the_same(config, tmp_path, monkeypatch):
    calls, forward = [], BertIntermediate.forward

    def counted(self, *args, **options):
        calls.append(self)
        return forward(self, *args, **options)

    monkeypatch.setattr(BertIntermediate, "forward", counted)
    seen, counts = [], []
    for on in (False, True):
        own = {"gradient_checkpointing": on, "output": str(tmp_path / str(on)), "patch": False}
        seen.append(losses(train(config("classify", steps=3, **own)).folder))
        counts.append(len(calls))
        calls.clear()
    assert counts == [6, 12]  # in two layers, three steps
    assert seen[0] == pytest.approx(seen[1], abs=1e-6)
