"""The tutorials run as they stand, with and without the added line, on a tiny model."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import transformers

WORDS = (
    "a the film is good bad great awful John lives in Paris and works for Acme . ,".lower().split()
)
REVIEWS = [("the film is good", 1), ("the film is bad", 0), ("great film", 1), ("awful", 0)] * 6
SENTENCES = [
    (["John", "lives", "in", "Paris", "."], ["B-PER", "O", "O", "B-LOC", "O"]),
    (["Acme", "works", "for", "John"], ["B-ORG", "O", "O", "B-PER"]),
] * 10
DATA = {
    "sentiment": (REVIEWS, REVIEWS[:5]),
    "entities": (SENTENCES, SENTENCES[:5]),
    "trainer": (REVIEWS, REVIEWS[:5]),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny BERT, without dropout, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(vocabulary)})
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", DATA)
def test_runs_the_same_with_the_added_line(name, tiny, tmp_path, monkeypatch, capsys):
    path = Path(__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"tutorial_{name}", path)
    tutorial = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tutorial)
    monkeypatch.chdir(tmp_path)
    results, losses = [], []
    for line in ([], ["--eager"]):
        capsys.readouterr()
        results.append(tutorial.main(["--epochs", "2", *line], tiny, DATA[name]))
        shown = capsys.readouterr().out
        assert ("eager" if line else "fastft") in shown.splitlines()[-1]
        assert ("left out of training batches" in shown) == (not line)
        losses.append([float(x) for x in re.findall(r"loss'?:? '?(\d+\.\d+)", shown)])
    assert results[0] == results[1]
    assert losses[0] and losses[0] == pytest.approx(losses[1], abs=2e-3)
