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


def accept_sampled(
    scores: Tensor,
    draft: Tensor,
    q: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """How many drafted tokens of each row are accepted, and the token sampled after them.

    The rule is at the head of this file; nothing is read from the device.

    Args:
        scores: (rows, n + 1, vocabulary) processed logits, of any floating dtype, at the last token
            and at each of the n drafted; -inf is a token that cannot come.
        draft: (rows, n) token ids below vocabulary.
        q: (rows, n, vocabulary) probabilities the draft was drawn with; None: it is a fixed guess.
        generator: on the device of scores; None: PyTorch's.
    Returns: (rows,) accepted and (rows,) tokens; in place of a token -1 where scores have NaN or no
        finite maximum where they decide, -2 where q has NaN.
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
