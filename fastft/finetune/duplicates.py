"""Duplicates among texts that pass by once: digests and MinHash signatures are kept, not the texts.

A signature holds, of each of many random orders of all shingles, the first that the text has; two
texts agree in a share of them that estimates the Jaccard similarity of their shingles, |A ∩ B| /
|A ∪ B| (Broder 1997). Locality-sensitive hashing finds the candidates (Leskovec et al., Mining of
Massive Datasets, chapter 3). A text takes about 5 KB of memory, with exact duplicates alone 0.1.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastft.finetune import need

BLOCK = 4096  # shingles hashed together; a long text would take gigabytes at once
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits spread: Knuth's multiplicative hashing


@dataclass(frozen=True)
class Near:
    """What a near duplicate is: at least `threshold` similar in its shingles of characters."""

    threshold: float = 0.85
    shingle: int = 5  # characters; words would not do for scripts without spaces
    permutations: int = 128


@dataclass(frozen=True)
class Match:
    """An earlier text that a text repeats, by the number it was given."""

    kind: Literal["duplicate", "near duplicate"]
    of: int


@dataclass(frozen=True, slots=True)
class Print:
    """What is kept of a text."""

    digest: bytes
    signature: Any  # datasketch.MinHash, or None


class Duplicates:
    """The texts seen so far. near None: only what is equal to the letter is a duplicate."""

    def __init__(self, near: Near | None) -> None:
        self._near = near
        self._digests: dict[bytes, int] = {}
        if near is not None:
            datasketch = need("datasketch", "finding near duplicates")
            # Copies of one share its random orders, which take longer to draw than a signature.
            self._empty = datasketch.MinHash(near.permutations, hashfunc=_itself)
            # By its usual weights the index would miss half of the pairs at the threshold, and a
            # fifth of those 0.05 above it.
            self._index = datasketch.MinHashLSH(
                near.threshold, near.permutations, weights=(0.05, 0.95)
            )
            self._signatures: dict[int, np.ndarray] = {}

    def print(self, text: str) -> Print:
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if self._near is None or digest in self._digests:
            return Print(digest, None)
        return Print(digest, self._signature(text, self._near.shingle))

    def find(self, print: Print) -> list[Match]:
        """The remembered texts that this one repeats, nearest first; one that is equal alone."""
        if print.digest in self._digests:
            return [Match("duplicate", self._digests[print.digest])]
        if print.signature is None:
            return []
        assert self._near is not None  # else there is no signature
        near = self._near_ones(print.signature, self._near.threshold)
        return [Match("near duplicate", number) for number in near]

    def remember(self, print: Print, number: int) -> None:
        """A text that is equal to none before it, by the number that matches name."""
        self._digests[print.digest] = number
        if print.signature is not None:
            self._index.insert(number, print.signature)
            self._signatures[number] = print.signature.hashvalues

    def _near_ones(self, signature: Any, threshold: float) -> list[int]:
        """The candidates that are as similar as asked for."""
        similar = {
            number: float(np.mean(self._signatures[number] == signature.hashvalues))
            for number in self._index.query(signature)
        }
        near = [number for number, share in similar.items() if share >= threshold]
        return sorted(near, key=lambda number: (-similar[number], number))

    def _signature(self, text: str, shingle: int) -> Any:
        held = shingles(text, shingle)
        signature = self._empty.copy()
        for start in range(0, len(held), BLOCK):
            signature.update_batch(held[start : start + BLOCK].tolist())
        return signature


def shingles(text: str, size: int) -> np.ndarray:
    """32-bit hashes of all runs of `size` characters, without regard to case and width of spaces.

    Returns: uint64 [number of different ones], at least one; a shorter text is one shingle.
    """
    held = " ".join(text.casefold().split()) or " "
    codes = np.frombuffer(held.encode("utf-32-le"), np.uint32).astype(np.uint64)
    size = min(size, len(codes))
    count = len(codes) - size + 1
    hashes = np.zeros(count, np.uint64)
    for offset in range(size):
        hashes = (hashes ^ codes[offset : offset + count]) * MULTIPLIER  # wraps at 2^64
    return np.unique(hashes >> np.uint64(32))  # only the upper half depends on all characters


def _itself(shingle: int) -> int:
    return shingle
