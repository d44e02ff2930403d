"""Texts repaired, and texts that no language would have written told apart.

Nothing here knows a language: no word lists, and no count of words, which not every script parts.
"""

import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastft.finetune import need

Normalization = Literal["none", "NFC", "NFKC"]


@dataclass(frozen=True)
class Filters:
    """What a text must be to stay; lengths are in characters."""

    least: int = 1
    most: int | None = None
    letters: float = 0.0  # least share of letters and digits among what is not a space
    compression: float = 10.0  # most times that zlib may make it smaller


def repair(fix: bool, normalization: Normalization) -> Callable[[str], str]:
    """A function from a text to the same text in one Unicode form.

    fix: ftfy undoes wrong decoding ("cafÃ©"), HTML entities, control characters and escapes of
    terminals; quotes, ligatures and wide characters, which a language may want, stay.
    """
    form = None if normalization == "none" else normalization
    if fix:
        ftfy = need("ftfy", "repairing text (fix)")
        settings = ftfy.TextFixerConfig(
            uncurl_quotes=False,
            fix_latin_ligatures=False,
            fix_character_width=False,
            normalization=form,
            explain=False,
        )

    def repaired(text: str) -> str:
        # JSON can hold half a character (a lone surrogate), which no file can.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if fix:
            out: str = ftfy.fix_text(text, settings)
            return out
        return unicodedata.normalize(form, text) if form else text

    return repaired


def reason_against(text: str, filters: Filters) -> str | None:
    """Why a text does not stay, in words; None where it does."""
    length = len(text.strip())
    if not length:
        return "empty"
    if length < filters.least:
        return f"shorter than {filters.least} characters"
    if filters.most is not None and length > filters.most:
        return f"longer than {filters.most} characters"
    if filters.letters and letter_share(text) < filters.letters:
        return f"less than {filters.letters:.0%} letters and digits"
    if compression(text) > filters.compression:
        return "repeats itself"
    return None


def letter_share(text: str) -> float:
    """Letters, their marks and digits of any script, over all characters but spaces; 0 of none."""
    counts = {c: n for c, n in Counter(text).items() if not c.isspace()}
    letters = sum(n for c, n in counts.items() if unicodedata.category(c)[0] in "LMN")
    return letters / max(sum(counts.values()), 1)


def compression(text: str) -> float:
    """How many times smaller zlib makes a text: 2 to 4 for prose, 10 for the same again and again.

    A text below some 100 characters cannot reach 10, whatever it says.
    """
    held = text.encode("utf-8")
    return len(held) / len(zlib.compress(held))
