"""What cannot be decoded is refused with the argument's name, or comes out right."""

import pytest
import torch
from decoders import PAD, VOCABULARY, padded, prompt, tiny
from torch import nn

import fastft
from fastft.decode.exit_head import ExitHead


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


IDS = {
    "float": (torch.ones(1, 4), TypeError, "inputs: expected token ids"),
    "bool": (torch.ones(1, 4, dtype=torch.bool), TypeError, "inputs: expected token ids"),
    "list": ([[1, 2]], TypeError, "inputs: expected token ids .*list"),
    "text": ("hello", TypeError, "inputs: expected token ids .*str"),
    "one dimension": (torch.ones(4, dtype=torch.long), TypeError, r"inputs: .*\(4,\)"),
    "no token": (torch.ones(2, 0, dtype=torch.long), ValueError, "inputs: expected at least one"),
    "no row": (torch.ones(0, 3, dtype=torch.long), ValueError, "inputs: expected at least one"),
    "too large": (torch.tensor([[5, VOCABULARY]]), ValueError, f"inputs: .*got {VOCABULARY}"),
    "negative": (torch.tensor([[5, -100]]), ValueError, "inputs: .*got -100"),
}


@pytest.mark.parametrize("wrong", IDS)
def test_ids(llama, wrong):
    ids, error, words = IDS[wrong]
    for call in (
        lambda: fastft.generate(llama, ids, max_new_tokens=3),
        lambda: fastft.generate(llama, {"input_ids": ids}, max_new_tokens=3),
        lambda: fastft.generate(llama, input_ids=ids, max_new_tokens=3),
    ):
        with pytest.raises(error, match=words):
            call()


def test_masks(llama):
    x = padded([5, 3])
    x["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="inputs: .* row 1 has none"):
        fastft.generate(llama, x, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"attention_mask: expected .*\(2, 5\), got \(2, 4\)"):
        fastft.generate(
            llama, x["input_ids"], attention_mask=torch.ones(2, 4).long(), max_new_tokens=3
        )


def test_numbers_of_new_tokens(llama):
    ids = prompt(2, 5)
    for speculation in (None, "prompt_lookup", llama):
        out = fastft.generate(llama, ids, max_new_tokens=0, speculation=speculation)
        assert torch.equal(out.sequences, ids) and out.stats.new_tokens == 0
        one = fastft.generate(llama, ids, max_new_tokens=1, speculation=speculation)
        assert torch.equal(one.sequences, llama.generate(ids, max_new_tokens=1))
    for wrong in (-1, 2.5):
        with pytest.raises((ValueError, TypeError), match="max_new_tokens"):
            fastft.generate(llama, ids, max_new_tokens=wrong)
    with pytest.raises(ValueError, match="max_length"):
        fastft.generate(llama, ids, max_length=3)


def test_positions():
    model = tiny("gpt2", n_positions=16)
    with pytest.raises(ValueError, match="max_new_tokens: 17 tokens .* 16 positions"):
        fastft.generate(model, prompt(1, 17), max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens: 10 tokens .* 8 new ones"):
        fastft.generate(model, prompt(1, 10), max_new_tokens=8, eos_token_id=None)
    full = fastft.generate(model, prompt(1, 10), max_new_tokens=7, eos_token_id=None)
    assert full.sequences.shape == (1, 17)  # the last one needs no position
    eos = int(full.sequences[0, 13])
    ended = fastft.generate(model, prompt(1, 10), max_new_tokens=50, eos_token_id=eos)
    assert ended.sequences[0].tolist() == full.sequences[0, : ended.sequences.shape[1]].tolist()
    unused = next(i for i in range(3, VOCABULARY) if i not in full.sequences[0])
    for speculation in (None, "prompt_lookup", model):
        with pytest.raises(ValueError, match="max_new_tokens: row 0 has not ended"):
            fastft.generate(
                model, prompt(1, 10), max_new_tokens=50, eos_token_id=unused,
                speculation=speculation,
            )  # fmt: skip


def test_speculation(llama):
    ids = prompt(1, 5)
    for wrong, error, words in (
        ("medusa", ValueError, "speculation: expected 'prompt_lookup'.*'medusa'"),
        (3, TypeError, "speculation: .*int"),
        (True, TypeError, "speculation: .*bool"),
        (nn.Linear(2, 2), TypeError, "speculation: .*Linear"),
        (tiny(vocab_size=50), ValueError, f"speculation: .*{VOCABULARY}, got 50"),
        (ExitHead(32, 3), ValueError, "speculation: an exit behind layer 3 of a model of 3"),
        (ExitHead(16, 1), ValueError, "speculation: .*hidden size of 16"),
    ):
        with pytest.raises(error, match=words):
            fastft.generate(llama, ids, max_new_tokens=3, speculation=wrong)
    with pytest.raises(ValueError, match="speculation: expected"):  # before it is handed over
        fastft.generate(llama, ids, num_beams=2, speculation="medusa")
    full = tiny("gemma2", layer_types=["full_attention"] * 3)
    with pytest.raises(ValueError, match="speculation: an ExitHead needs"):
        fastft.generate(full, ids, max_new_tokens=3, speculation=ExitHead(32, 1))


def test_seeds(llama):
    ids = prompt(1, 5)
    for wrong, error, words in (
        ("x", TypeError, "seed: expected an int or None, got 'x'"),
        (1.5, TypeError, "seed: .*1.5"),
        (True, TypeError, "seed: .*True"),
        (2**64, ValueError, "seed: expected -2.*18446744073709551616"),
    ):
        for call in (fastft.generate, fastft.stream):
            with pytest.raises(error, match=words):
                call(llama, ids, max_new_tokens=3, do_sample=True, seed=wrong)
        with pytest.raises(error, match=words):  # before it is handed over
            fastft.generate(llama, ids, num_beams=2, max_new_tokens=3, seed=wrong)


def test_models_and_arguments(llama):
    for wrong in (None, "gpt2", nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="model: expected a transformers model"):
            fastft.generate(wrong, prompt(1, 3))
        with pytest.raises(TypeError, match="model: expected a transformers model"):
            fastft.stream(wrong, prompt(1, 3))
    with pytest.raises(ValueError, match="max_new_tokenz"):
        fastft.generate(llama, prompt(1, 3), max_new_tokenz=3)
    with pytest.raises(ValueError, match="tokenizer"):
        fastft.generate(llama, prompt(1, 3), stop_strings=["a"])


def test_pad_tokens_of_a_prompt_without_a_mask_are_padding(llama):
    """As transformers takes them."""
    ids = prompt(2, 4)
    ids[0, :2] = PAD
    out = fastft.generate(llama, ids, max_new_tokens=4)
    assert torch.equal(out.sequences, llama.generate(ids, max_new_tokens=4))
