"""Labelled texts as the data sets' files hold them: reviews with a sentiment, words with tags."""

import csv
from pathlib import Path

from fastft.finetune.data import shuffled

SENTIMENTS = ("negative", "positive")
# Entities begin with B- and go on with I-.
TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")


def read_reviews(path: Path, source: str, held_out: int, seed: int = 0) -> tuple[list, list]:
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
    """Sentences, (words, tags): a word a line, its tag last, a blank line between sentences."""
    sentences, words, tags = [], [], []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        fields = line.split()
        if fields and fields[0] != "-DOCSTART-":
            words.append(fields[0])
            tags.append(fields[-1])
        elif words:
            sentences.append((words, tags))
            words, tags = [], []
    return sentences
