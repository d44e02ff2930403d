"""Drafts from a row's own text, held to a search through all of it."""

from itertools import zip_longest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.decode.prompt_lookup import PromptLookup


def searched(text: list[int], ngram: tuple[int, int], most: int) -> tuple[int, list[int]]:
    """Longest suffix that occurred before, and the draft after its last occurrence."""
    largest, smallest = ngram
    for n in range(min(largest, len(text) - 1), smallest - 1, -1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:]:
                grown = list(text)
                for k in range(most):
                    grown.append(grown[start + n + k])
                return n, grown[len(text) :]
    return 0, []


texts = st.lists(st.integers(0, 2), max_size=40)
ngrams = st.tuples(st.integers(1, 5), st.integers(1, 5)).filter(lambda n: n[0] >= n[1])


@given(texts, ngrams, st.integers(0, 8))
def test_draft_is_what_a_search_finds(text, ngram, most):
    lookup, before = PromptLookup(ngram), (0, [])
    for end, token in enumerate(text, 1):
        lookup.extend(0, [token])
        suffix, drafted = lookup.suffix(0), lookup.draft(0, most)
        if before[0] >= ngram[0] and before[1][0] == token:
            # A copy of more than the largest n-gram stays with its source.
            assert (suffix, drafted) == (before[0] + 1, before[1][1 : most + 1])
        else:
            assert (suffix, drafted) == searched(text[:end], ngram, most)
        before = suffix, lookup.draft(0, most + 1)


@given(texts, st.lists(st.integers(0, 40), max_size=5))
def test_how_the_text_arrives_does_not_matter(text, cuts):
    whole, pieces = PromptLookup(), PromptLookup()
    whole.extend(0, text)
    cuts = [0, *sorted(cuts), len(text)]
    for start, end in zip(cuts, cuts[1:], strict=False):
        pieces.extend(0, text[start:end])
    assert (whole.suffix(0), whole.draft(0, 6)) == (pieces.suffix(0), pieces.draft(0, 6))


def test_a_copy_stays_with_its_source():
    # The same three tokens three times, each going on in another way; the first is being copied.
    source = [1, 2, 7, 8, 9, 3, 7, 8, 9, 4, 7, 8, 9, 5]
    lookup = PromptLookup((3, 2))
    lookup.extend(0, [*source, 1, 2, 7, 8, 9])
    assert (lookup.suffix(0), lookup.draft(0, 2)) == (5, [3, 7])
    lookup.extend(0, [6, 7, 8, 9])  # not what the source says: the most recent from here on
    assert (lookup.suffix(0), lookup.draft(0, 2)) == (3, [6, 7])


@given(texts, texts)
def test_rows_do_not_see_each_other(first, second):
    together, alone = PromptLookup(), PromptLookup()
    alone.extend(7, second)
    for a, b in zip_longest(first, second):
        together.extend(3, [] if a is None else [a])
        together.extend(7, [] if b is None else [b])
    assert together.draft(7, 5) == alone.draft(7, 5)
    together.drop(3)
    assert together.draft(7, 5) == alone.draft(7, 5)


def test_longest_then_most_recent():
    lookup = PromptLookup((3, 1))
    #                  1 2 3 -> 4, the longest; 2 3 -> 5 is more recent; 3 -> 6 more so
    lookup.extend(0, [1, 2, 3, 4, 9, 2, 3, 5, 8, 3, 6, 1, 2, 3])
    assert (lookup.suffix(0), lookup.draft(0, 2)) == (3, [4, 9])
    lookup.extend(0, [7, 1, 2, 3])  # now 1 2 3 -> 7 as well
    assert (lookup.suffix(0), lookup.draft(0, 1)) == (3, [7])


def test_a_repetition_goes_on():
    lookup = PromptLookup((2, 2))
    lookup.extend(0, [5, 6, 7, 5, 6])
    assert lookup.draft(0, 8) == [7, 5, 6, 7, 5, 6, 7, 5]
    lookup.extend(1, [4, 4, 4])
    assert lookup.draft(1, 3) == [4, 4, 4]


def test_nothing_to_draft():
    lookup = PromptLookup()
    assert lookup.draft(0, 5) == [] and lookup.suffix(0) == 0
    lookup.extend(0, [])
    assert lookup.draft(0, 5) == []
    lookup.extend(0, [1, 2, 1, 2])
    assert lookup.draft(0, 0) == [] and lookup.draft(0, -1) == []
    assert lookup.draft(0, 1) == [1]
    lookup.drop(0)
    lookup.drop(0)
    assert lookup.draft(0, 5) == []


def test_callers_own_the_lists():
    lookup, prompt = PromptLookup((1, 1)), [1, 2, 1]
    lookup.extend(0, prompt)
    prompt.clear()
    lookup.draft(0, 2).clear()
    assert lookup.draft(0, 2) == [2, 1]


@pytest.mark.parametrize("ngram", [(2, 3), (2, 0), (-1, -1)])
def test_ngram_is_checked(ngram):
    with pytest.raises(ValueError, match="^ngram"):
        PromptLookup(ngram)
