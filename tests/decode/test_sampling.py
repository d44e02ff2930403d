"""Sampling with drafts: new tokens are distributed as the model and the processors say."""

import itertools

import pytest
import torch
from decoders import tiny
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

import fastft
from fastft.decode import acceptance, loop
from fastft.decode.exit_head import ExitHead

pytestmark = pytest.mark.usefixtures("every_draft")

SIZE, NEW = 9, 3
# Whatever comes behind 5 has come before, so that prompt lookup always has a draft.
PROMPT = [token for x in range(SIZE) for token in (5, x, (2 * x + 1) % SIZE)] + [5]
SHAPE = {"num_hidden_layers": 2, "vocab_size": SIZE, "eos_token_id": None, "pad_token_id": 0}
ASKED = {
    "temperature": ({"temperature": 1.6}, [TemperatureLogitsWarper(1.6)]),
    "top_k": ({"top_k": 4, "temperature": 2.0},
              [TemperatureLogitsWarper(2.0), TopKLogitsWarper(4)]),
    "top_p": ({"top_p": 0.8, "temperature": 2.0},
              [TemperatureLogitsWarper(2.0), TopPLogitsWarper(0.8)]),
    "min_p": ({"min_p": 0.15, "temperature": 2.0},
              [TemperatureLogitsWarper(2.0), MinPLogitsWarper(0.15)]),
    "penalty": ({"repetition_penalty": 1.8, "temperature": 1.5},
                [RepetitionPenaltyLogitsProcessor(1.8), TemperatureLogitsWarper(1.5)]),
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    target = tiny("llama", **SHAPE)
    other = tiny("llama", seed=2, **SHAPE)
    whole = {"layer_types": ["full_attention"] * 2, "final_logit_softcapping": None}
    return target, {
        "prompt_lookup": "prompt_lookup", "draft": other, "itself": target,
        "exit": ExitHead(32, 1, rank=4), "modules": tiny("gemma2", **SHAPE, **whole),
    }  # fmt: skip


def exact(model, processors) -> torch.Tensor:
    """(SIZE,) * NEW probabilities of the first new tokens."""
    processors, chances = LogitsProcessorList(processors), torch.ones(1, dtype=torch.float64)
    for n in range(NEW):
        rows = [[*PROMPT, *more] for more in itertools.product(range(SIZE), repeat=n)]
        ids = torch.tensor(rows)
        with torch.no_grad():
            scores = processors(ids, model(input_ids=ids).logits[:, -1].float())
        chances = (chances[:, None] * scores.double().softmax(-1)).flatten()
    return chances.view((SIZE,) * NEW)


def draws(model, count, asked, speculation, rows=250) -> torch.Tensor:
    """How often each of the (SIZE,) * NEW continuations came, and whether drafts were tried."""
    counts = torch.zeros((SIZE,) * NEW, dtype=torch.float64)
    drafted = 0
    ids = torch.tensor([PROMPT])  # whose zeros would without a mask be taken for padding
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for i in range(count // rows):
        kwargs = {"do_sample": True, "top_k": 0, "num_return_sequences": rows, "seed": i, **asked}
        out = fastft.generate(model, x, max_new_tokens=NEW, speculation=speculation, **kwargs)
        new = out.sequences[:, len(PROMPT) :]
        counts.index_put_(new.unbind(1), torch.ones(rows, dtype=torch.float64), accumulate=True)
        drafted += sum(out.stats.drafted)
    assert drafted > count // 10 or speculation is None
    return counts


def deviation(counts, chances) -> float:
    """chi-square in standard deviations from what it should be; rare continuations are one cell."""
    expected, counts = (chances * counts.sum()).flatten(), counts.flatten()
    assert not counts[expected == 0].any()
    often = expected >= 10
    rare = (counts[~often].sum() - expected[~often].sum()) ** 2 / expected[~often].sum().clamp(1.0)
    total = ((counts - expected)[often] ** 2 / expected[often]).sum() + rare
    freedom = int(often.sum())
    assert freedom >= 5
    return float((total - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("kind", ["prompt_lookup", "draft", "itself", "exit", "modules"])
def test_distribution(models, kind, asked):
    target, drafts = models
    kwargs, processors = ASKED[asked]
    # Processors that read tokens are asked row by row, which takes its time.
    counts = draws(target, 1000 if asked == "penalty" else 2250, kwargs, drafts[kind])
    assert deviation(counts, exact(target, processors)) < 4


@pytest.mark.parametrize("kind", ["prompt_lookup", "draft", "exit"])
def test_a_wrong_acceptance_would_be_seen(models, kind, monkeypatch):
    """Of drafts accepted too often."""
    target, drafts = models

    def wrong(scores, draft, q, generator):
        q = torch.full_like(scores[:, :-1], 0.5) if q is None else 0.5 * q
        return acceptance.accept_sampled(scores, draft, q, generator)

    kwargs, processors = ASKED["temperature"]
    monkeypatch.setattr(loop, "accept_sampled", wrong)
    assert deviation(draws(target, 2000, kwargs, drafts[kind]), exact(target, processors)) > 8


def test_drafts_are_drawn_with_the_processors(models):
    """A model that drafts for itself draws from what it will be asked, so all is accepted."""
    target = models[0]
    out = fastft.generate(
        target, torch.tensor([PROMPT]), max_new_tokens=40, do_sample=True, top_k=3, seed=0,
        suppress_tokens=[4, 5], repetition_penalty=1.3, temperature=2.0, speculation=target,
    )  # fmt: skip
    assert out.stats.acceptance == 1 and sum(out.stats.drafted) > 20
