"""Labelled texts as the data sets' files hold them: reviews with a sentiment, words with tags."""

import csv
from pathlib import Path
from typing import Any

from fastft.finetune import readers
from fastft.finetune.data import shuffled

SENTIMENTS = ("negative", "positive")
# Entities begin with B- and go on with I-.
TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")


def read_reviews(
    path: Path, source: str, held_out: int, seed: int = 0
) -> tuple[list[Any], list[Any]]:
    """(text, label) pairs for training and held out: shuffled, no text in both, 1 is positive.

    source: "rotten_tomatoes" or "imdb".
    """
    with open(path, newline="", encoding="utf-8") as file:
        found = {
            row["text"]: int(row["label"])
            for row in csv.DictReader(file)
            if row["source"] == source
        }
    pairs = list(found.items())
    pairs = [pairs[i] for i in shuffled(len(pairs), seed)]
    return pairs[held_out:], pairs[:held_out]


def read_conll(path: Path) -> list[tuple[list[str], list[str]]]:
    """Sentences, (words, tags), of a CoNLL file."""
    return [(row["tokens"], row["tags"]) for row in readers.conll(path)]
