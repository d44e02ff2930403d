"""load: eight bits as patch makes them, the checkpoint for the originals, what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_base_weights import batch, gradients, llama, with_lora
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import fastft
from fastft.ops.quantized_layer import quantized_layers


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def test_is_what_patch_makes_of_the_loaded_model(base, folder):
    loaded, given = with_lora(fastft.load(folder, base_weights=base)), with_lora(llama())
    for model in (loaded, given):
        report = fastft.patch(model, base_weights=base)
        assert report.count(f"{base}_linear") == 14 and report.count("lora") == 14
    layers = zip(quantized_layers(loaded), quantized_layers(given), strict=True)
    assert all(torch.equal(a.values, b.values) and torch.equal(a.scale, b.scale) for a, b in layers)
    inputs = batch()
    (loss, grads), (wanted, truth) = gradients(loaded, inputs), gradients(given, inputs)
    assert torch.equal(loss, wanted)
    trained = {n for n in truth if "lora_" in n}
    assert trained == set(grads) and all(torch.equal(grads[n], truth[n]) for n in trained)
    assert not any(p.is_meta for p in loaded.parameters())
    assert not any(b.is_meta for b in loaded.buffers())


def test_the_checkpoint_keeps_the_originals(base, folder):
    model = with_lora(fastft.load(folder, base_weights=base))
    fastft.patch(model)
    found = fastft.verify(model, batch())
    assert found.ok and found.base.perplexity[0] != found.base.perplexity[1]
    assert "as they were" in " ".join(fastft.unpatch(model))
    weights = dict(llama().named_parameters())
    for name, parameter in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, weights[name.replace(".base_layer", "")]), name
    assert not quantized_layers(model.merge_and_unload())


def test_numbers_loaded_since_are_not_those_of_the_checkpoint(base, folder):
    model = fastft.load(folder, base_weights=base)
    model.load_state_dict(model.state_dict())
    (remark,) = fastft.unpatch(model)
    assert "as eight bits gave them" in remark and not quantized_layers(model)


@pytest.mark.parametrize("model_type", ["evil", "llama"])
def test_code_of_the_folder_is_not_run(folder, tmp_path, monkeypatch, model_type):
    """Not even where somebody at the terminal would say yes."""
    monkeypatch.setattr("builtins.input", lambda text: "y")
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(ran)!r}, 'w')\nclass Config: pass\nModel = Config\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    if model_type == "evil":
        with pytest.raises(ValueError, match="trust_remote_code"):
            fastft.load(folder)
    else:
        assert quantized_layers(fastft.load(folder))  # the class that transformers has
    assert not ran.exists()


def test_tied_embeddings_biases_and_types(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")  # Conv1D layers stay
    model = fastft.load(tmp_path / "gpt2", dtype=torch.bfloat16)
    assert model.lm_head.weight is model.transformer.wte.weight and not quantized_layers(model)
    assert model.dtype is torch.bfloat16
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=60,
    )  # fmt: skip
    bert = BertForSequenceClassification(config).eval()
    bert.save_pretrained(tmp_path / "bert")
    model = fastft.load(tmp_path / "bert", BertForSequenceClassification)
    ids = torch.randint(2, 60, (4, 9))
    torch.testing.assert_close(model(ids).logits, bert(ids).logits, rtol=0.02, atol=0.02)


def test_what_is_refused(folder):
    with pytest.raises(ValueError, match="base_weights"):
        fastft.load(folder, base_weights="int3")
    with pytest.raises(FileNotFoundError, match="no folder"):
        fastft.load(folder.parent / "nothing")
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        fastft.load(folder.parent, config=llama().config)
    file = sorted(folder.glob("*.safetensors"))[0]
    held = load_file(file)
    name = next(iter(held))
    save_file({**held, name: held[name][:-1].contiguous()}, file)
    with pytest.raises(ValueError, match=f"{name}.*expected"):
        fastft.load(folder)
    del held[name]
    save_file(held, file)
    with pytest.raises(ValueError, match=f"no weight of {name.removesuffix('.weight')}"):
        fastft.load(folder)
