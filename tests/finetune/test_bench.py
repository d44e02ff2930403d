"""`fastft bench` on tiny models: what it times, what it compares first, and what it refuses."""

import json

import pytest
import torch

from fastft import cli
from fastft.finetune import BenchConfig, UserError, bench, bench_works
from fastft.patch.swap import swap_of


@pytest.fixture
def asked(shared):
    def make(task: str = "sft", **settings) -> BenchConfig:
        usual = {
            "model": str(shared / ("decoder" if task in ("lm", "sft") else "encoder")),
            "data": str(next(shared.glob(f"{task}.json*"))),
            "batch_size": 3,
            "max_length": 48,
            "new_tokens": 6,
            "rounds": 2,
            "memory": False,
        }
        return BenchConfig(task=task, **usual | settings)

    return make


@pytest.mark.parametrize(
    ("task", "settings", "works"),
    [
        ("sft", {}, {"train", "decode"}),
        ("lm", {"method": "full", "work": ["predict", "decode"]}, {"predict", "decode"}),
        ("classify", {"method": "adapter"}, {"train", "predict"}),
        ("ner", {"method": "full", "work": ["train"]}, {"train"}),
        ("sft", {"precision": "bf16", "base_weights": "int8"}, {"train", "decode"}),
        ("sft", {"base_weights": "fp8", "work": ["train"]}, {"train"}),
        ("sft", {"decode_weights": "int8", "work": ["decode"]}, {"decode"}),
    ],
)
@pytest.mark.usefixtures("fp8_anywhere")
def test_both_sides_are_timed(asked, capsys, task, settings, works):
    config = asked(task, **settings)
    found = bench(config).metrics
    assert found["works"].keys() == works
    for held in found["works"].values():
        eager, patched = held["seconds"]["eager"], held["seconds"]["patched"]
        assert len(eager) == len(patched) == 2 and min(eager + patched) > 0
        ratios = [a / b for a, b in zip(eager, patched, strict=True)]
        assert held["ratio"] == pytest.approx(sum(ratios) / 2)  # the median of two
    shown = capsys.readouterr().out
    assert all(work in shown for work in works) and "largest relative difference of loss" in shown


def test_the_sides_are_the_same_model_on_the_same_work(asked):
    """Taught on one batch, both sides have learned the same; only one of them is patched."""
    config = asked(max_length=48)
    material = bench_works.load(config)
    models, report = bench_works.sides(material, config)
    assert "norm" in report
    swapped = {side: any(map(swap_of, model.modules())) for side, model in models.items()}
    assert swapped == {"eager": False, "patched": True}
    eager, patched = (dict(model.named_parameters()) for model in models.values())
    before = {name: weight.detach().clone() for name, weight in eager.items()}
    bench_works.in_turns(models, material, config, "train")
    moved = [name for name, weight in eager.items() if not torch.equal(weight, before[name])]
    assert moved and all("lora" in name for name in moved)
    for name in moved:
        learned = eager[name] - before[name]
        assert (patched[name] - eager[name]).norm() < 0.02 * learned.norm(), name


def test_nothing_is_timed_where_results_differ(asked, monkeypatch):
    from fastft.patch import Verification

    wrong = Verification(loss=0.5, logits=0.1)
    monkeypatch.setattr(bench_works, "verify", lambda model, batch: wrong)
    monkeypatch.setattr(bench_works, "in_turns", lambda *_: pytest.fail("timed"))
    with pytest.raises(UserError, match="loss by 5.0e-01, where 0.001 is accepted"):
        bench(asked())


def test_an_answer_that_is_not_the_likeliest_is_found(asked, monkeypatch):
    real = bench_works.generate

    def worse(model, inputs):
        out = real(model, inputs)
        out.sequences[0, -2] = (out.sequences[0, -2] + 1) % model.config.vocab_size
        return out

    monkeypatch.setattr(bench_works, "generate", worse)
    with pytest.raises(UserError, match="tokens by"):
        bench(asked())


def test_the_command_writes_a_file_with_the_memory_of_each_side(asked, tmp_path, capsys):
    config, file = asked(), tmp_path / "found.json"
    order = ["bench", "--model", config.model, "--data", config.data, "--work", "train"]
    order += ["--rounds", "1", "--max-length", "48", "--output", str(file)]
    assert cli.main(order) == 0
    memory = json.loads(file.read_text())["works"]["train"]["memory"]
    assert memory.keys() == {"eager", "patched"}
    assert all(side["peak"] >= side["before"] > 2**20 for side in memory.values())
    assert cli.main(order) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "settings", "words"),
    [
        ("classify", {"work": ["decode"]}, "decode is for language models"),
        ("ner", {"packing": True}, "packing: only for"),
        ("classify", {"decode_weights": "int8"}, "decode_weights: only for"),
        ("classify", {"label_column": "lable"}, "did you mean 'label'"),
        ("sft", {"new_tokens": 5000}, "more than the model's"),
        ("sft", {"model": "./nowhere"}, "no such folder"),
    ],
)
def test_mistakes_are_one_sentence(asked, task, settings, words):
    with pytest.raises(UserError, match=words) as raised:
        bench(asked(task, **settings))
    assert "\n" not in str(raised.value)


def test_an_fp8_base_is_refused_where_no_device_has_it(asked):
    with pytest.raises(UserError, match="^base_weights: 'fp8' needs a CUDA device"):
        bench(asked("sft", base_weights="fp8"))
    with pytest.raises(UserError, match="decode_weights: fastft does not decode over an fp8 base"):
        asked("sft", base_weights="fp8", decode_weights="int8")
