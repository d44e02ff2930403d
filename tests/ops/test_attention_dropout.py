"""attention's dropout: the kernel against its definition, the definition against chance."""

import pytest
import torch
from packed import bounds, inputs
from truth import assert_as_exact

from fastft.ops.attention import _keep, attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


LENGTHS = [37, 63]


def dropout_from(keep, dropout):
    """Attention over the two sequences with a given mask of what is kept."""
    sequence = torch.repeat_interleave(torch.arange(2), torch.tensor(LENGTHS))
    unseen = sequence[:, None] != sequence

    def eager(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        wide = torch.promote_types(q.dtype, torch.float32)
        p = torch.softmax(scores.masked_fill(unseen, -torch.inf), -1, dtype=wide)
        p = p * keep / (1 - dropout)
        return torch.einsum("hqk,khd->qhd", p.to(q.dtype), v)

    return eager


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, -5, 2**40 + 17])
def test_kernel_drops_what_the_reference_drops(isa, dtype, seed):
    """Numbered by query head, and by token of all sequences together."""
    keep = _keep(torch.tensor(seed), 4, 100, 100, 0.3)
    args = inputs(dtype, 100, 100, 4, 2, 24)
    cu = bounds(LENGTHS)
    assert_as_exact(
        lambda q, k, v: attention(q, k, v, cu, dropout=0.3, seed=seed),
        dropout_from(keep, 0.3),
        args,
    )


def test_mask_statistics():
    """Every pair of rows, heads and seeds is as good as independent, and the rate is right."""
    masks = torch.stack([_keep(torch.tensor(s), 4, 64, 1024, 0.25) for s in (0, 1, 2**32)])
    rows = masks.flatten(0, 2).double()  # (768, 1024)
    assert abs(rows.mean() - 0.75) < 5 * (0.1875 / rows.numel()) ** 0.5
    # Means of rows and of columns have the spread of independent draws.
    assert abs(rows.mean(1).std() / (0.1875 / rows.shape[1]) ** 0.5 - 1) < 0.15
    assert abs(rows.mean(0).std() / (0.1875 / rows.shape[0]) ** 0.5 - 1) < 0.15
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 6 / rows.shape[1] ** 0.5
    neighbours = torch.corrcoef(rows.t()) - torch.eye(rows.shape[1])
    assert neighbours.abs().max() < 6 / rows.shape[0] ** 0.5


def test_expected_value_of_dropout():
    args = inputs(torch.float32, 12, 12, 2, 2, 8)
    cu, plain = bounds([12]), attention(*args, bounds([12]))
    draws = torch.stack([attention(*args, cu, dropout=0.2, seed=s) for s in range(3000)])
    error = (draws.mean(0) - plain) / (draws.std(0) / len(draws) ** 0.5)
    assert error.abs().max() < 5
    assert draws.std(0).min() > 0


def test_seed_and_generator():
    args, cu = inputs(torch.float32, 30, 30, 2, 2, 8), bounds([30])

    def with_(**options):
        return attention(*args, cu, dropout=0.5, **options)

    assert torch.equal(with_(seed=1), with_(seed=1))
    assert not torch.equal(with_(seed=1), with_(seed=2))
    torch.manual_seed(4)
    first, second = with_(), with_()
    torch.manual_seed(4)
    assert torch.equal(first, with_()) and torch.equal(second, with_())
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    with_(seed=1), attention(*args, cu)
    assert torch.equal(state, torch.get_rng_state())
