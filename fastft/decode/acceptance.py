"""Lossless acceptance of drafts: what comes out is distributed as if nothing had been drafted.

A draft x_1 … x_n was drawn with probabilities q_1 … q_n; one pass of the target gives
p_1 … p_{n+1}, p_i being the distribution of the token after x_1 … x_{i-1}. Token x_i is accepted
with probability min(1, p_i(x_i) / q_i(x_i)). At the first rejection the next token comes from

    max(0, p_i - q_i) / sum max(0, p_i - q_i)

and after n acceptances from p_{n+1}. A draft that was not drawn but guessed has q_i one-hot at x_i:
accepted with probability p_i(x_i), else the next token comes from p_i without x_i. Sources:
Leviathan et al. 2023 (arXiv 2211.17192, algorithm 1) and Chen et al. 2023 (arXiv 2302.01318).

p is the softmax of scores after temperature, top-k, penalties and the like. A q that went through
the same processors is accepted more often, but the result is exact with any q.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def _check(scores: Tensor, draft: Tensor, q: Tensor | None) -> None:
    if draft.dim() != 1 or draft.is_floating_point():
        found = f"{tuple(draft.shape)} of {draft.dtype}"
        raise ValueError(f"draft: expected token ids of shape (n,), got {found}")
    n = len(draft)
    if scores.dim() != 2 or len(scores) != n + 1:
        got = tuple(scores.shape)
        raise ValueError(f"scores: expected ({n + 1}, vocabulary) for {n} drafted, got {got}")
    if q is not None and q.shape != (n, scores.shape[1]):
        raise ValueError(f"q: expected {(n, scores.shape[1])}, got {tuple(q.shape)}")


def accept_greedy(scores: Tensor, draft: Tensor) -> tuple[int, int]:
    """How many drafted tokens are those of greedy decoding, and the token after them.

    scores: (n + 1, vocabulary) processed logits, at the last token and at each of the n drafted;
    draft: (n,) token ids. Ties go where torch.argmax takes them. ValueError for shapes that do not
    fit, and for NaN in a row that decides; what follows a rejected token decides nothing.
    """
    _check(scores, draft, None)
    best = scores.argmax(1)  # (n + 1,); where there is NaN, that is taken for the largest
    broken = scores.gather(1, best[:, None])[:, 0].isnan()
    # -1 is no token, so the first broken row also ends the acceptance. One read of the device.
    best, guess = torch.stack((best.masked_fill(broken, -1), F.pad(draft, (0, 1)))).tolist()
    accepted = 0
    while accepted < len(draft) and best[accepted] == guess[accepted]:
        accepted += 1
    if best[accepted] < 0:
        raise ValueError(f"scores: expected numbers, got NaN in row {accepted}")
    return accepted, best[accepted]


def accept_sampled(
    scores: Tensor,
    draft: Tensor,
    q: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[int, int]:
    """How many drafted tokens are accepted, and the token sampled after them.

    scores: (n + 1, vocabulary) processed logits, of any floating dtype; -inf is a token that
    cannot come. draft: (n,) token ids below vocabulary. q: (n, vocabulary) probabilities the draft
    was drawn with, None for a draft that is a fixed guess. generator: on the device of scores,
    torch's own without. The rule is at the head of this file. ValueError for shapes that do not
    fit, and for NaN or a row without a finite maximum where they decide.
    """
    _check(scores, draft, q)
    accepted, token = accept_sampled_rows(
        scores[None], draft[None], None if q is None else q[None], generator
    )
    accepted, token = torch.cat((accepted, token)).tolist()  # one read of the device
    if token < 0:
        name, what = ("scores", "a finite maximum") if token == -1 else ("q", "probabilities")
        raise ValueError(f"{name}: expected {what} and no NaN in row {accepted}")
    return accepted, token


def accept_sampled_rows(
    scores: Tensor,
    draft: Tensor,
    q: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """accept_sampled for rows with drafts of one length, without a read of the device.

    scores: (rows, n + 1, vocabulary), draft: (rows, n), q: (rows, n, vocabulary) or None. Returns
    (rows,) accepted and (rows,) tokens; -1 in place of a token where scores have NaN or no finite
    maximum, -2 where q has NaN.
    """
    n = draft.shape[1]
    p = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    at = draft[..., None]  # (rows, n, 1)
    likely = p[:, :n].gather(2, at)[..., 0].double()  # (rows, n): p_i(x_i)
    guessed = torch.ones_like(likely) if q is None else q.gather(2, at)[..., 0].double()
    # In double, since float32 draws nothing below 2^-24. Not p/q, which is NaN where both are 0.
    u = torch.rand(draft.shape, dtype=torch.float64, device=draft.device, generator=generator)
    accepted = ((u * guessed < likely) & (guessed > 0)).cumprod(1).sum(1)  # (rows,)

    rows = torch.arange(len(draft), device=draft.device)
    p = p[rows, accepted]  # (rows, vocabulary)
    if q is None:
        rejected = F.pad(draft, (0, 1))[rows, accepted]
        q = torch.zeros_like(p)
        q[rows, rejected] = (accepted < n).to(p.dtype)
    else:
        q = F.pad(q, (0, 0, 0, 1))[rows, accepted]  # after n acceptances nothing is taken off p
    residual = (p - q).clamp(min=0)
    mass = residual.sum(1)
    # p == q leaves no mass, and could be rejected by rounding only: then p itself is right.
    weights = torch.where(mass[:, None] > 0, residual, p)
    # The race of exponentials: argmax of w / E is distributed as w / sum w. An E of 0 would let a
    # token of weight 0 win, as NaN. torch.multinomial stops a GPU for good on NaN, this does not.
    race = torch.empty_like(weights).exponential_(generator=generator)
    token = (weights / race.clamp_(min=torch.finfo(race.dtype).tiny)).argmax(1)
    token = token.masked_fill(mass.isnan(), -2)
    return accepted, token.masked_fill(p[:, 0].isnan(), -1)
