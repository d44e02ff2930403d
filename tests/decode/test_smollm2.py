"""The promises of decoding on a real model: minutes each, so marked slow."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastft
from bench.decode_prompts import FIFTY, chat
from fastft.finetune import assets

NEW = 128
TIE = 1e-4


@pytest.fixture(scope="module")
def folder():
    return assets.model("SmolLM2-135M-Instruct")


@pytest.fixture(scope="module")
def prompts(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [chat(tokenizer, text) for text in FIFTY]


def load(folder, weights: str):
    dtype = torch.bfloat16 if weights == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if weights == "int8":
        fastft.patch(model, decode_weights="int8")
    return model


def decode(model, prompts: list[list[int]], speculation=None) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = fastft.generate(
        model,
        {"input_ids": ids, "attention_mask": mask},
        max_new_tokens=NEW,
        do_sample=False,
        speculation=speculation,
    )
    assert out.stats.path == "decoder_layer"
    return [trim(row[width:].tolist(), model) for row in out.sequences]


def trim(tokens: list[int], model) -> list[int]:
    """Up to the end of the text, without the padding behind it."""
    end = model.generation_config.eos_token_id
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@pytest.mark.slow
def test_tokens_of_transformers(folder, prompts):
    """Fifty prompts, float32, greedy: a difference only where the two best logits nearly tie."""
    model, ties = load(folder, "float32"), []
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        theirs = trim(out[0, len(prompt) :].tolist(), model)
        (ours,) = decode(model, [prompt])
        if ours == theirs:
            continue
        at = next(j for j, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + theirs[:at]])).logits[0, -1]
        gap = float(logits.topk(2).values.diff().abs())
        ties.append((i, at, gap))
        assert gap < TIE, f"prompt {i}, token {at}: the best two logits are {gap:.2g} apart"
    print(
        f"\n{len(prompts) - len(ties)} of {len(prompts)} equal; ties (prompt, token, gap): {ties}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_bits_of_a_row_alone(folder, prompts, weights):
    """Alone, in batches of ten, and with drafts in both, bit for bit."""
    model = load(folder, weights)
    alone = [decode(model, [prompt])[0] for prompt in prompts]
    for size, speculation in ((10, None), (1, "prompt_lookup"), (10, "prompt_lookup")):
        for begin in range(0, len(prompts), size):
            rows = decode(model, prompts[begin : begin + size], speculation)
            assert rows == alone[begin : begin + size], (size, speculation, begin)
