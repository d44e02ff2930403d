"""Duplicates: found again by digest and by MinHash, and close to the true similarity."""

import random

import pytest

from fastft.finetune.duplicates import Duplicates, Match, Near, shingles


def words(count, seed):
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(count)]


def test_exact_alone():
    seen = Duplicates(None)
    assert seen.find("a text", 0) is None and seen.find("A text", 1) is None
    assert seen.find("a text", 2) == Match("duplicate", 0)


def test_case_and_spaces_and_a_word_are_near():
    seen = Duplicates(Near())
    held = words(80, 0)
    assert seen.find(" ".join(held), 0) is None
    assert seen.find("  ".join(held).upper(), 1) == Match("near duplicate", 0)
    assert seen.find(" ".join([*held[:40], "else", *held[41:]]), 2) == Match("near duplicate", 0)
    assert seen.find(" ".join(held), 3) == Match("duplicate", 0)
    assert seen.find(" ".join(words(80, 1)), 4) is None


def test_scripts_without_spaces():
    seen = Duplicates(Near())
    text = "".join(chr(0x4E00 + random.Random(i).randrange(5000)) for i in range(200))
    assert seen.find(text, 0) is None
    assert seen.find(text[:100] + "好" + text[100:], 1) == Match("near duplicate", 0)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_found_are_those_above_the_threshold(threshold):
    """A text changed by ever more words: found while it is similar, not after."""
    found = 0
    for changed in range(0, 30, 2):
        held = words(60, changed)
        text = " ".join([f"x{changed}y{i}" for i in range(changed)] + held[changed:])
        own, other = (set(shingles(t, 5).tolist()) for t in (" ".join(held), text))
        similarity = len(own & other) / len(own | other)
        seen = Duplicates(Near(threshold))
        seen.find(" ".join(held), 0)
        match = seen.find(text, 1)
        found += match is not None
        # 128 permutations estimate 0.5 within 0.044 (one deviation), and the index misses some of
        # those that are barely similar enough.
        if abs(similarity - threshold) > 0.15 or similarity == 1:
            assert (match is not None) == (similarity > threshold), similarity
    assert 0 < found < 15


def test_of_all_candidates_the_nearest_if_it_is_near_enough():
    seen, held = Duplicates(Near(0.45)), words(90, 0)
    seen._index.query = lambda signature: list(seen._signatures)  # as if all were candidates
    assert seen.find(" ".join(held[:60]), 0) is None
    assert seen.find(" ".join(held[30:]), 1) is None  # a third of it
    assert seen.find(" ".join(held[22:82]), 2) == Match("near duplicate", 1)
    assert seen.find(" ".join(held[8:68]), 3) == Match("near duplicate", 0)


@pytest.mark.parametrize("text", ["", " ", "a", "abcd", "abcde"])
def test_texts_shorter_than_a_shingle(text):
    assert len(shingles(text, 5)) == 1
    seen = Duplicates(Near())
    assert seen.find(text, 0) is None and seen.find("other" + text, 1) is None


def test_shingles_are_counted_once_and_differ():
    assert len(shingles("abcabcabcabc", 3)) == 3
    text = "".join(words(2000, 0))
    assert len(shingles(text, 5)) == len({text[i : i + 5] for i in range(len(text) - 4)})
    assert not set(shingles("ab", 5)) & set(shingles("abc", 5))


def test_a_long_text_is_the_same_in_blocks(monkeypatch):
    from fastft.finetune import duplicates

    text = " ".join(words(3000, 0))
    whole = Duplicates(Near())._signature(text).hashvalues
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    assert (Duplicates(Near())._signature(text).hashvalues == whole).all()
