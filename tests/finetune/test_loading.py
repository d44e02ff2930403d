"""Where models come from, and what of a foreign folder is refused."""

import json
import shutil

import pytest
import torch
from finetune import tiny

from fastft.finetune import UserError, loading, vocabulary


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("loading") / "model")


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def edit(path, **changes) -> None:
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | changes))


class Bomb:
    """What a hostile pickle is: unpickling it calls a function."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_refused_and_never_opened(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    torch.save({"weight": Bomb(tmp_path / "ran")}, copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle"):
        loading.load_model(copy, "lm")
    (copy / "config.json").unlink()
    edit(copy / "adapter_config.json", peft_type="LORA", base_model_name_or_path="gpt2")
    (copy / "pytorch_model.bin").rename(copy / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin is a pickle"):
        loading.load_model(copy, "lm")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a\\b", 3])
def test_an_index_does_not_lead_out_of_its_folder(copy, name):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    edit(copy / "model.safetensors.index.json", **index)
    with pytest.raises(UserError, match="leads out of the folder"):
        loading.load_model(copy, "lm")


def test_an_index_names_no_pickle(copy):
    edit(copy / "model.safetensors.index.json", weight_map={"lm_head.weight": "model.bin"})
    with pytest.raises(UserError, match="no safetensors file"):
        loading.load_model(copy, "lm")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_model_name_or_path": "../model"}, "leads out of the folder"),
        ({"base_model_name_or_path": "a/../../model"}, "leads out of the folder"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "to be imported"),
        ({"peft_type": "MISS"}, "not known"),
    ],
)
def test_a_hostile_adapter_is_refused(model, copy, settings, words):
    (copy / "config.json").unlink()
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    usual = {"peft_type": "LORA", "base_model_name_or_path": str(model)}
    edit(copy / "adapter_config.json", **usual | settings)
    with pytest.raises(UserError, match=words):
        loading.load_model(copy, "lm")


def test_an_adapter_of_an_adapter_is_refused(copy, tmp_path):
    edit(copy / "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(copy))
    with pytest.raises(UserError, match="an adapter too"):
        loading.load_model(copy, "lm")


def test_code_of_a_model_is_not_run(copy, tmp_path):
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(copy / "config.json", auto_map=auto, model_type="evil")
    with pytest.raises(UserError, match="cannot load"):
        loading.load_model(copy, "lm")
    edit(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    try:
        loading.load_tokenizer(copy)
    except UserError:
        pass
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("held", [b"", b"junk", b"\xff" * 64])
def test_a_damaged_file_is_one_sentence(copy, held):
    (copy / "model.safetensors").write_bytes(held)
    with pytest.raises(UserError, match="cannot load") as raised:
        loading.load_model(copy, "lm")
    assert "\n" not in str(raised.value)


def test_damaged_settings_are_one_sentence(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot load"):
        loading.load_model(copy, "lm")
    (copy / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        loading.load_model(copy, "lm")


def test_weights_that_are_missing_are_not_made_up(copy):
    edit(copy / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match="holds no weights for model.layers.2"):
        loading.load_model(copy, "lm")


def test_dropout_labels_and_padding_reach_the_model(model, tmp_path):
    options = {"labels": ["a", "b", "c"], "dropout": 0.25, "pad_id": 2}
    loaded = loading.load_model(model, "classify", **options)
    assert loaded.config.attention_dropout == 0.25 and loaded.config.pad_token_id == 2
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    loaded.save_pretrained(tmp_path / "three")
    assert loading.known_labels(tmp_path / "three") == ["a", "b", "c"]
    assert loading.known_labels(model) is None
    # The same classes keep their head, other ones get a new one.
    again = loading.load_model(tmp_path / "three", "classify", labels=["a", "b", "c"])
    assert torch.equal(again.score.weight, loaded.score.weight)
    two = loading.load_model(tmp_path / "three", "classify", labels=["x", "y"])
    assert two.score.weight.shape == (2, 32)


def test_a_tokenizer_without_padding_pads_with_its_end(model):
    assert loading.load_tokenizer(model).pad_token == "</s>"


def test_a_folder_without_a_tokenizer_is_told(tmp_path):
    """transformers makes an empty tokenizer of it, for which every word is unknown."""
    folder = tiny.save_encoder(tmp_path / "encoder")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        loading.load_tokenizer(folder)


def test_a_padding_token_that_the_model_has_no_embedding_for_is_replaced(copy, capsys):
    before = loading.load_tokenizer(copy)
    before.add_special_tokens({"pad_token": "<pad>"})
    before.save_pretrained(copy)
    after = loading.load_tokenizer(copy)
    assert after.pad_token == after.eos_token
    assert "'<pad>' is none of the model's 65 tokens" in capsys.readouterr().err


def test_a_token_that_the_model_has_no_embedding_for_is_named(copy):
    tokenizer = loading.load_tokenizer(copy)
    rows, most = [[3, 4], [3, 65]], loading.embedded(copy)
    vocabulary.check(rows, tokenizer, most)  # as everywhere, told by the tokenizer's size
    tokenizer.add_tokens("<turn>")
    with pytest.raises(UserError, match="row 1: the token '<turn>' is none of the model's 65"):
        vocabulary.check(rows, tokenizer, most)


def test_a_padding_token_of_no_embedding_in_the_configuration_is_one_sentence(copy):
    edit(copy / "config.json", pad_token_id=65)
    with pytest.raises(UserError, match="cannot load '.*': Padding_idx"):
        loading.load_model(copy, "lm")


def test_a_folder_of_folders_is_no_model(copy):
    with pytest.raises(UserError, match="cannot load '.*': it is a folder without config.json"):
        loading.load_tokenizer(copy.parent)
