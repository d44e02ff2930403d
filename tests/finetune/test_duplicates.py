"""Duplicates: found again by digest and by MinHash, and close to the true similarity."""

import json
import random

import pytest
from finetune import tiny

from fastft.finetune import PrepareConfig, prepare
from fastft.finetune.duplicates import Duplicates, Match, Near, shingles


def words(count, seed):
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(count)]


def find(seen, text, number):
    """The nearest of the texts before; a text without one is remembered."""
    print = seen.print(text)
    matches = seen.find(print)
    if not matches:
        seen.remember(print, number)
    return matches[0] if matches else None


def test_exact_alone():
    seen = Duplicates(None)
    assert find(seen, "a text", 0) is None and find(seen, "A text", 1) is None
    assert find(seen, "a text", 2) == Match("duplicate", 0)


def test_case_and_spaces_and_a_word_are_near():
    seen = Duplicates(Near())
    held = words(80, 0)
    assert find(seen, " ".join(held), 0) is None
    assert find(seen, "  ".join(held).upper(), 1) == Match("near duplicate", 0)
    assert find(seen, " ".join([*held[:40], "else", *held[41:]]), 2) == Match("near duplicate", 0)
    assert find(seen, " ".join(held), 3) == Match("duplicate", 0)
    assert find(seen, " ".join(words(80, 1)), 4) is None


def test_scripts_without_spaces():
    seen = Duplicates(Near())
    text = "".join(chr(0x4E00 + random.Random(i).randrange(5000)) for i in range(200))
    assert find(seen, text, 0) is None
    assert find(seen, text[:100] + "好" + text[100:], 1) == Match("near duplicate", 0)


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
        find(seen, " ".join(held), 0)
        match = find(seen, text, 1)
        found += match is not None
        # 128 permutations estimate 0.5 within 0.044 (one deviation).
        if abs(similarity - threshold) > 0.13 or similarity == 1:
            assert (match is not None) == (similarity > threshold), similarity
    assert 0 < found < 15


def test_few_pairs_above_the_threshold_are_missed():
    seen, missed = Duplicates(Near(0.85)), 0
    for i in range(60):
        held = words(48, i)
        text = " ".join([*held[:10], "else", *held[11:30], "other", *held[31:]])  # 0.9 similar
        assert find(seen, " ".join(held), i) is None
        missed += not seen.find(seen.print(text))
    assert missed <= 5, missed


def test_of_all_candidates_the_nearest_if_it_is_near_enough():
    seen, held = Duplicates(Near(0.45)), words(90, 0)
    seen._index.query = lambda signature: list(seen._signatures)  # as if all were candidates
    assert find(seen, " ".join(held[:60]), 0) is None
    assert find(seen, " ".join(held[30:]), 1) is None  # a third of it
    assert find(seen, " ".join(held[22:82]), 2) == Match("near duplicate", 1)
    assert find(seen, " ".join(held[8:68]), 3) == Match("near duplicate", 0)


@pytest.mark.parametrize("text", ["", " ", "a", "abcd", "abcde"])
def test_texts_shorter_than_a_shingle(text):
    assert len(shingles(text, 5)) == 1
    seen = Duplicates(Near())
    assert find(seen, text, 0) is None and find(seen, "other" + text, 1) is None


def test_shingles_are_counted_once_and_differ():
    assert len(shingles("abcabcabcabc", 3)) == 3
    text = "".join(words(2000, 0))
    assert len(shingles(text, 5)) == len({text[i : i + 5] for i in range(len(text) - 4)})
    assert not set(shingles("ab", 5)) & set(shingles("abc", 5))


def test_a_long_text_is_the_same_in_blocks(monkeypatch):
    from fastft.finetune import duplicates

    text = " ".join(words(3000, 0))
    whole = Duplicates(Near())._signature(text, Near().shingle).hashvalues
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    assert (Duplicates(Near())._signature(text, Near().shingle).hashvalues == whole).all()


def test_what_repeats_a_duplicate_that_is_kept_shares_its_split(tmp_path):
    """Each version changes the one before it, until the last is like the first no more."""
    rows = []
    for i in range(40):
        held = words(40, i)
        for change in range(6):
            held[6 * change] = f"else{change}"
            rows.append({"text": " ".join(held), "of": i})
    made = prepare(
        PrepareConfig(
            data=str(tiny.save_rows(tmp_path / "raw.jsonl", rows)), keep_columns=["of"],
            output=str(tmp_path / "made"), duplicates=False, test=0.3,
        )
    )  # fmt: skip
    splits: dict[int, set] = {}
    for split in made.splits:
        for line in (made.folder / f"{split}.jsonl").read_text().splitlines():
            splits.setdefault(json.loads(line)["of"], set()).add(split)
    assert len(splits) == 40 and set.union(*splits.values()) == {"train", "validation", "test"}
    assert all(len(of) == 1 for of in splits.values())
