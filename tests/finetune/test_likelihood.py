"""Label likelihoods on a shared cache are those of each whole text computed alone."""

import random

import decoders
import pytest
import torch
from torch import nn

import fastft
from fastft.finetune import UserError, likelihood

ANSWERS = [" 5", " 6 7", " 6 8 9"]


def encode(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def prompts(count: int = 9, shared: int = 7) -> list[str]:
    """Of several lengths, beginning alike: near each other, and one far from the others."""
    draw = random.Random(0)
    common = [draw.randrange(10, 97) for _ in range(shared)]
    lengths = [draw.choice([1, 2, 3, 9]) for _ in range(count - 1)] + [35]
    rows = [common + [draw.randrange(10, 97) for _ in range(n)] for n in lengths]
    return [" ".join(map(str, row)) for row in rows]


@torch.no_grad()
def alone(model, prompt: str, answer: str) -> float:
    ids, start = encode(prompt + answer), len(encode(prompt))
    logs = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :].log_softmax(-1)
    return sum(logs[i - 1, ids[i]].item() for i in range(start, len(ids)))


def assert_as_alone(model, asked: list[str], **options) -> None:
    found = likelihood.score(model, encode, asked, [ANSWERS] * len(asked), **options)
    truth = [[alone(model, prompt, answer) for answer in ANSWERS] for prompt in asked]
    torch.testing.assert_close(found, torch.tensor(truth, dtype=torch.float64), atol=2e-5, rtol=0)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])  # mistral's window is 6 tokens
def test_is_that_of_each_text_alone(kind, patched):
    model = decoders.tiny(kind)
    if patched:
        fastft.patch(model)
    assert_as_alone(model, prompts(), batch_size=7)


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_whatever_is_shared(shared, batch_size):
    # One token, or none, before what differs: there is no trunk, or no tail of a prompt.
    assert_as_alone(decoders.tiny(), prompts(5, shared), batch_size=batch_size)
    assert_as_alone(decoders.tiny(), ["4 5"] * 3, batch_size=batch_size)


@pytest.mark.parametrize("kind", ["LoraConfig", "PromptTuningConfig", "PrefixTuningConfig"])
def test_with_adapters(kind):
    import peft

    options = {"r": 4, "init_lora_weights": False} if kind == "LoraConfig" else {}
    if not options:
        options = {"num_virtual_tokens": 4}
    torch.manual_seed(0)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(decoders.tiny(), config).eval()
    assert_as_alone(model, prompts(6))


def test_what_begins_alike_is_computed_once():
    model, seen = decoders.tiny(), 0

    def count(module, args, kwargs):
        nonlocal seen
        seen += kwargs["input_ids"].numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    asked = [f"{' '.join(['4'] * 40)} {i}" for i in range(10, 20)]
    likelihood.score(model, encode, asked, [ANSWERS] * 10)
    # The trunk, and three short labels of each prompt.
    assert seen <= 40 + 10 * 3 * 3


def test_a_token_that_spans_prompt_and_label_counts_with_the_label():
    def merging(text: str) -> list[int]:
        """'4 5' is one token, 45."""
        return encode(text.replace("4 5", "45"))

    model = decoders.tiny()
    found = likelihood.score(model, merging, ["3 4"], [[" 5", " 6"]])[0]
    # Both are scored from behind the 3, the last token that stands in all of the texts.
    assert found[0].item() == pytest.approx(alone(model, "3", " 45"), abs=1e-5)
    assert found[1].item() == pytest.approx(alone(model, "3", " 4 6"), abs=1e-5)


def test_calibration_divides_by_the_content_free_mean():
    scores = torch.tensor([[0.6, 0.4], [0.9, 0.1]], dtype=torch.float64).log()
    free = torch.tensor([[0.8, 0.2], [0.7, 0.05]], dtype=torch.float64).log()
    weighed = torch.tensor([[0.6 / 0.75, 0.4 / 0.125], [0.9 / 0.75, 0.1 / 0.125]])
    expected = (weighed / weighed.sum(1, keepdim=True)).double()
    torch.testing.assert_close(likelihood.calibrate(scores, free).exp(), expected)
    # An answer that is likely with nothing asked is taken for what it is.
    assert likelihood.calibrate(scores, free).argmax(1).tolist() == [1, 0]
    each = torch.stack([free, free.flip(1)])
    assert likelihood.calibrate(scores, each)[0].exp().allclose(expected[0])


def test_what_cannot_be_scored():
    model = decoders.tiny()
    with pytest.raises(UserError, match="the label '' has no token"):
        likelihood.score(model, encode, ["4"], [["", " 5"]])
    with pytest.raises(UserError, match="no token before the label"):
        likelihood.score(model, encode, [""], [ANSWERS])
    with pytest.raises(UserError, match="301 tokens, the model takes 256"):
        likelihood.score(model, encode, [" ".join(["4"] * 300)], [[" 5"]])

    class Forgetful(nn.Linear):
        config = None

        def forward(self, **kwargs):
            return type("Output", (), {"logits": torch.zeros(1, 2, 3)})

    with pytest.raises(UserError, match="Forgetful keeps no key-value cache"):
        likelihood.score(Forgetful(1, 1), encode, ["4 5"], [ANSWERS])
    assert likelihood.score(model, encode, [], []).shape == (0, 0)
