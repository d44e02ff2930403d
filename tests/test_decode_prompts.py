"""The prompts of the decoding benches, and the count of what an answer copies."""

import pytest

from bench.decode_prompts import FIFTY, OPEN, REWRITING, copied


@pytest.mark.parametrize(("prompts", "count"), [(REWRITING, 10), (OPEN, 10), (FIFTY, 50)])
def test_prompts_are_all_different(prompts, count):
    assert len(prompts) == len(set(prompts)) == count


def test_copied_counts_tokens_of_shared_3_grams():
    prompt = [1, 2, 3, 4, 5, 9]
    assert copied(prompt, [2, 3, 4]) == 3
    assert copied(prompt, [1, 2, 3, 4, 7, 3, 4, 7]) == 4  # overlapping grams count a token once
    assert copied(prompt, [1, 2, 7, 4, 5]) == 0  # pairs are not enough
    assert copied(prompt, [2, 3]) == copied([], [1, 2, 3]) == 0
    assert copied(prompt, [5, 9, 5], n=2) == 2
