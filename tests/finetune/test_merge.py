"""merge: what is written gives the adapter's logits, or is not written."""

import json

import encoders
import models
import pytest
import torch
from finetune import tiny
from finetune.methods_settings import settings

from fastft import cli
from fastft.finetune import UserError, methods
from fastft.finetune.merge import MergeConfig, merge

HEADS = {"classify": "SequenceClassification", "ner": "TokenClassification"}


def base(folder, name, task):
    """A model with its tokenizer in a folder, loaded from there."""
    model = models.causal_lm(name) if task == "lm" else encoders.encoder(name, HEADS[task])
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return type(model).from_pretrained(folder)


def adapter(tmp_path, name, task, method, called="adapter", scale=0.1):
    """A trained adapter's folder beside its base model's, and the model it was saved from."""
    folder = tmp_path / called
    torch.manual_seed(len(called))
    model = methods.apply(base(tmp_path / "base", name, task), settings(method), task).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn_like(parameter)
    methods.save(model, folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder, model


CASES = [
    ("bert", "classify", "lora"),
    ("bert", "ner", "ia3"),
    ("bert", "classify", "ia3"),
    ("roberta", "classify", "ia3"),
    ("gpt2", "lm", "lora"),
    ("gpt2", "classify", "dora"),
    ("gpt2", "lm", "ia3"),
    ("llama", "lm", "dora"),
    ("llama", "ner", "lora"),
    ("llama", "lm", "ia3"),
]


@pytest.mark.parametrize("name, task, method", CASES)
def test_plain_transformers_gives_the_same_logits(tmp_path, name, task, method, capsys):
    folder, model = adapter(tmp_path, name, task, method)
    found = merge(MergeConfig(adapter=[str(folder)], output=str(tmp_path / "merged")))
    merged = type(model.get_base_model()).from_pretrained(tmp_path / "merged").eval()
    ids = torch.randint(3, 60, (1, 12))
    torch.testing.assert_close(
        merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )
    assert found.difference["adapter"] < 1e-5 < 1e-3 < found.effect["adapter"]
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "metrics.json"} <= names
    assert not [n for n in names if "adapter" in n or n.endswith((".bin", ".pt"))]
    assert "adapter changes them by" in capsys.readouterr().out
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("wrong", ["nothing", "sign", "scale"])
def test_a_wrong_merge_is_not_written(tmp_path, wrong, monkeypatch):
    from peft.tuners.lora import Linear

    folder, _ = adapter(tmp_path, "llama", "lm", "lora")
    right = Linear.get_delta_weight
    factor = {"nothing": 0.0, "sign": -1.0, "scale": 1.05}[wrong]
    monkeypatch.setattr(Linear, "get_delta_weight", lambda *args: factor * right(*args))
    with pytest.raises(UserError, match="other logits than the adapter.*nothing was written"):
        merge(MergeConfig(adapter=[str(folder)], output=str(tmp_path / "merged")))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "base"]


def test_half_types_and_what_they_cannot_hold(tmp_path):
    folder, _ = adapter(tmp_path, "llama", "lm", "lora")
    asked = {"adapter": [str(folder)], "dtype": "bfloat16"}
    found = merge(MergeConfig(**asked, output=str(tmp_path / "merged")))
    assert 1e-5 < found.difference["adapter"] < found.effect["adapter"] / 2
    with pytest.raises(UserError, match="1.0e-06 is accepted"):
        merge(MergeConfig(**asked, output=str(tmp_path / "other"), tolerance=1e-6))
    faint, _ = adapter(tmp_path, "llama", "lm", "ia3", "faint", scale=1e-3)
    asked["adapter"] = [str(faint)]
    with pytest.raises(UserError, match="bfloat16 is too coarse"):
        merge(MergeConfig(**asked, output=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


REFUSED = [
    ("prompt", "lm", "virtual tokens are inputs"),
    ("prefix", "lm", "is an input"),
    ("adapter", "lm", "not linear"),
]


@pytest.mark.parametrize("method, task, reason", REFUSED)
def test_what_cannot_be_merged_is_refused_with_the_reason(tmp_path, method, task, reason):
    folder, _ = adapter(tmp_path, "gpt2", task, method)
    with pytest.raises(UserError, match=f"cannot be merged: .*{reason}"):
        merge(MergeConfig(adapter=[str(folder)], output=str(tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_several_adapters_in_one_folder(tmp_path, method):
    import peft

    made = [adapter(tmp_path, "llama", "lm", method, name) for name in ("first", "second")]
    out = tmp_path / "all"
    found = merge(MergeConfig(adapter=[str(folder) for folder, _ in made], output=str(out)))
    assert set(found.difference) == {"first", "second"} and max(found.difference.values()) < 1e-6
    model = type(made[0][1].get_base_model()).from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(model, out / "first", adapter_name="first").eval()
    model.load_adapter(out / "second", "second")
    ids = torch.randint(3, 60, (1, 12))
    for name, (_, alone) in zip(("first", "second"), made, strict=True):
        model.set_adapter(name)
        torch.testing.assert_close(model(input_ids=ids).logits, alone(input_ids=ids).logits)
    with pytest.raises(UserError, match="holds the adapters first, second"):
        merge(MergeConfig(adapter=[str(out)], output=str(tmp_path / "merged")))
    if method == "lora":
        merge(MergeConfig(adapter=[str(out / "second")], output=str(tmp_path / "merged")))


def test_collected_by_other_names_and_what_does_not_go_together(tmp_path):
    one, _ = adapter(tmp_path, "llama", "lm", "lora", "one")
    other, _ = adapter(tmp_path, "llama", "lm", "ia3", "other")
    with pytest.raises(UserError, match="same peft_type in all, got LORA, IA3"):
        merge(MergeConfig(adapter=[str(one), str(other)], output=str(tmp_path / "all")))
    with pytest.raises(UserError, match="names: expected different ones"):
        merge(MergeConfig(adapter=[str(one), str(one)], output=str(tmp_path / "all")))
    pair = {"adapter": [str(one), str(one)], "output": str(tmp_path / "all")}
    merge(MergeConfig(**pair, names=["a", "b"]))
    assert {f.name for f in (tmp_path / "all").iterdir()} == {"a", "b", "metrics.json"}
    for names, message in [(["a"], "one for each of 2"), (["..", "b"], "is no folder's name")]:
        with pytest.raises(UserError, match=message):
            MergeConfig(**pair, names=names)


def test_nothing_is_overwritten_and_a_damaged_adapter_is_one_sentence(tmp_path, capsys):
    folder, _ = adapter(tmp_path, "llama", "lm", "lora")
    command = ["merge", "--adapter", str(folder), "--output"]
    assert cli.main([*command, str(tmp_path / "base")]) == 2
    assert "exists already" in capsys.readouterr().err
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert cli.main([*command, str(tmp_path / "merged")]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("fastft merge: ") and str(folder) in message
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "XLORA"}))
    assert cli.main([*command, str(tmp_path / "merged")]) == 2
    assert "adapters of type XLORA are not known" in capsys.readouterr().err
    assert cli.main([*command[:2], str(tmp_path / "base"), "--output", str(tmp_path / "m")]) == 2
    assert "no adapter here" in capsys.readouterr().err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "base"]
