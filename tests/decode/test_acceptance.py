"""Acceptance of drafts, held to the exact joint distribution of what plain sampling gives."""

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastft.decode.acceptance import accept_sampled

VOCABULARY, LENGTH, DRAFTED, DRAWS, START = 6, 3, 2, 50_000, 1


def markov(seed: int, banned: range = range(0)) -> Tensor:
    """Scores of the next token after each token, (VOCABULARY, VOCABULARY)."""
    scores = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    scores[:, list(banned)] = -torch.inf
    return 1.5 * scores


def processed(history: Tensor, scores: Tensor, processors) -> Tensor:
    """history: (rows, length); scores: those of the Markov chain, for the last token of history."""
    return LogitsProcessorList(processors)(history, scores[history[:, -1]])


def exact(target: Tensor, processors) -> Tensor:
    """(VOCABULARY**LENGTH,) probabilities of the sequences after START, step by step."""
    probability = torch.ones(1, dtype=torch.float64)
    history = torch.full((1, 1), START)
    for _ in range(LENGTH):
        step = processed(history, target, processors).double().softmax(1)
        probability = (probability[:, None] * step).flatten()
        history = torch.cat(
            (
                history.repeat_interleave(VOCABULARY, 0),
                torch.arange(VOCABULARY).repeat(len(history))[:, None],
            ),
            1,
        )
    return probability


def drawn(target: Tensor, draft: Tensor | None, processors, accept) -> Tensor:
    """DRAWS sequences of LENGTH tokens, (DRAWS, LENGTH), each made of rounds of speculation.

    draft: scores of the drafting chain; None drafts what a table says, for certain.
    """
    generator = torch.Generator().manual_seed(11)
    # Rows advance by different steps. START in front changes no penalty: each row began with it.
    history = torch.full((DRAWS, LENGTH + DRAFTED), START)
    lengths = torch.zeros(DRAWS, dtype=torch.long)  # tokens after START
    sequences = torch.full((DRAWS, LENGTH + DRAFTED + 1), -1)
    while lengths.min() < LENGTH:
        grown, scores, q = history, [processed(history, target, processors)], []
        for _ in range(DRAFTED):
            if draft is None:
                token = (grown[:, -1] * 5 + 2) % VOCABULARY
            else:
                q.append(processed(grown, draft, processors).softmax(1))
                token = torch.multinomial(q[-1], 1, generator=generator)[:, 0]
            grown = torch.cat((grown, token[:, None]), 1)
            scores.append(processed(grown, target, processors))
        tokens = grown[:, -DRAFTED:]
        accepted, token = accept(
            torch.stack(scores, 1), tokens, torch.stack(q, 1) if q else None, generator
        )
        emitted = torch.cat((tokens, token[:, None]), 1)
        emitted[torch.arange(DRAWS), accepted] = token
        for position in range(DRAFTED + 1):
            new = emitted[:, position]
            rows = ((accepted >= position) & (lengths < LENGTH)).nonzero()[:, 0]
            sequences[rows, lengths[rows]] = new[rows]
            history[rows] = torch.cat((history[rows, 1:], new[rows, None]), 1)
            lengths[rows] += 1
    return sequences[:, :LENGTH]


def p_value(sequences: Tensor, probability: Tensor) -> float:
    """Of chi-square goodness of fit; cells with fewer than 5 expected draws are taken together."""
    powers = VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)
    observed = torch.bincount((sequences * powers).sum(1), minlength=VOCABULARY**LENGTH).double()
    if observed[probability == 0].any():
        return 0.0  # what cannot come has come
    expected = probability * len(sequences)
    rare = expected < 5
    rare[expected.masked_fill(rare, torch.inf).argmin()] = True  # so that the rest is at least 5

    def cells(counts):
        return torch.cat((counts[~rare], counts[rare].sum()[None]))

    statistic = ((cells(observed) - cells(expected)) ** 2 / cells(expected)).sum()
    freedom = torch.tensor((len(cells(expected)) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


DRAFTS = {
    "one-hot": None,
    "sampled": markov(2),
    "the target's own": markov(1),
    "partly disjoint": markov(3, range(3)),
}
PROCESSORS = {
    "none": [],
    "temperature": [TemperatureLogitsWarper(0.6)],
    "top-k": [TopKLogitsWarper(3)],
    "top-p": [TopPLogitsWarper(0.8)],
    "min-p": [MinPLogitsWarper(0.15)],
    "repetition": [RepetitionPenaltyLogitsProcessor(1.7), TemperatureLogitsWarper(1.2)],
}


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_next_tokens_are_distributed_as_without_a_draft(draft, processors):
    target, processors = markov(1), PROCESSORS[processors]
    sequences = drawn(target, DRAFTS[draft], processors, accept_sampled)
    assert p_value(sequences, exact(target, processors)) > 1e-4


@pytest.mark.parametrize("inside", [True, False])
def test_drafts_that_the_target_never_gives(inside):
    # Disjoint supports: with `inside` the target has only what the draft never proposes.
    target, draft = markov(1, range(3)), markov(2, range(3 if inside else 0, 6 if inside else 3))
    if inside:
        target, draft = draft, target
    sequences = drawn(target, draft, [], accept_sampled)
    assert p_value(sequences, exact(target, [])) > 1e-4


def accept_always(scores, draft, q, generator):
    last = scores[:, -1].softmax(1)
    return torch.full((len(draft),), DRAFTED), torch.multinomial(last, 1, generator=generator)[:, 0]


def resample_from_p(scores, draft, q, generator):
    accepted, _ = accept_sampled(scores, draft, q, generator)
    p = scores[torch.arange(len(draft)), accepted].softmax(1)
    return accepted, torch.multinomial(p, 1, generator=generator)[:, 0]


@pytest.mark.parametrize("wrong", [accept_always, resample_from_p])
@pytest.mark.parametrize("draft", ["one-hot", "sampled", "partly disjoint"])
def test_wrong_rules_are_found_out(wrong, draft):
    target = markov(1)
    assert p_value(drawn(target, DRAFTS[draft], [], wrong), exact(target, [])) < 1e-9


def accept_one(scores, draft, q=None, generator=None) -> tuple[int, int]:
    """accept_sampled for one row: scores (n + 1, vocabulary), draft (n,), q (n, vocabulary)."""
    q = None if q is None else q[None]
    accepted, token = accept_sampled(scores[None], draft[None], q, generator)
    return int(accepted), int(token)


def test_torch_own_generator_is_used_without_one():
    scores, draft = torch.zeros(3, 50), torch.tensor([4, 5])
    torch.manual_seed(3)
    first = [accept_one(scores, draft) for _ in range(5)]
    torch.manual_seed(3)
    assert first == [accept_one(scores, draft) for _ in range(5)]
    assert len(set(first)) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_certain_tokens_in_every_dtype(dtype):
    scores = torch.full((3, 7), -torch.inf, dtype=dtype)
    scores[[0, 1, 2], [2, 5, 1]] = 3.0
    for q in (None, torch.full((2, 7), 1 / 7)):
        assert accept_one(scores, torch.tensor([2, 5]), q) == (2, 1)
        assert accept_one(scores, torch.tensor([2, 4]), q) == (1, 5)
        assert accept_one(scores, torch.tensor([0, 5]), q) == (0, 2)
    assert accept_one(scores[:1], torch.empty(0, dtype=torch.long)) == (0, 2)
    assert accept_one(scores[:1], torch.empty(0, dtype=torch.long), torch.empty(0, 7)) == (0, 2)


def test_a_token_the_draft_could_not_have_drawn_is_rejected():
    scores, q = torch.zeros(2, 4), torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    for seed in range(50):
        accepted, token = accept_one(
            scores, torch.tensor([0]), q, torch.Generator().manual_seed(seed)
        )
        assert accepted == 0 and token != 1


def test_no_residual_mass_samples_the_target():
    # q = p but for the drafted token, whose q is 0: rejected, and p - q leaves its own mass only.
    scores = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    got = {accept_one(scores, torch.tensor([0]), torch.tensor([[0.0, 0.5]])) for _ in range(20)}
    assert got == {(0, 0)}
    # No mass at all, as rounding could have it.
    q = torch.tensor([[0.0, 1.0]])
    scores = torch.tensor([[-torch.inf, 0.0], [0.0, 0.0]])
    assert accept_one(scores, torch.tensor([0]), q) == (0, 1)


def test_nan_is_told_where_it_decides():
    scores = torch.full((3, 4), -torch.inf)
    scores[:, 2] = 0.0
    broken = scores.clone()
    broken[1, 0] = torch.nan
    assert accept_one(broken, torch.tensor([2, 2])) == (1, -1)
    # A grammar's processor may have nothing to say after a token it forbids.
    assert accept_one(broken, torch.tensor([1, 2])) == (0, 2)


def test_no_allowed_token_and_nan_in_q_are_told():
    nothing = torch.full((1, 4), -torch.inf)
    assert accept_one(nothing, torch.empty(0, dtype=torch.long)) == (0, -1)
    unknown = torch.full((1, 4), torch.nan)
    assert accept_one(torch.zeros(2, 4), torch.tensor([0]), unknown) == (0, -2)
