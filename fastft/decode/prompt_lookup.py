"""Drafts taken from a row's own text: what followed the last time its latest tokens were seen.

Rewriting, quoting and editing repeat their prompt, so a table of n-grams drafts for nothing: no
second model, no pass over anything. Saxena 2023, prompt lookup decoding; Yang et al. 2023,
inference with reference (arXiv 2304.04487).
"""

from dataclasses import dataclass, field


@dataclass
class _Row:
    tables: list[dict[tuple[int, ...], int]]  # n-gram: position after its last occurrence
    tokens: list[int] = field(default_factory=list)
    suffix: int = 0  # how many tokens before `source` are those at the end of the text; 0: none
    source: int = 0  # position that the next draft is copied from


class PromptLookup:
    """Drafts for rows of a batch, each from its own prompt and what it has generated so far.

    ngram = (largest, smallest): the last `largest` tokens are looked up, then fewer, down to
    `smallest`. The longest n-gram that occurred before wins, since the more context two places
    share, the longer they go on alike. Of its occurrences the most recent wins: an edit moves
    forward through its source, and what was just written has the changes in it, while the first
    occurrence (the one transformers takes) leads back to the start. Once more than `largest`
    tokens were copied from one place, the copy stays with it until they differ, however often
    its n-grams recur: in code they recur everywhere.

    Counted on edits of Python files split into words and signs, 8 of them drafted: 5.0 a step with
    (3, 2), 6.4 with copies that stay with their source, 6.5 with (4, 2), 6.6 with (8, 2). A suffix
    of one is right in one draft of three: (4, 1) where verifying is cheap.

    extend costs O(largest - smallest + 1) per token, draft O(tokens drafted); nothing is searched.
    A row is any integer, and begins empty.
    """

    def __init__(self, ngram: tuple[int, int] = (4, 2)) -> None:
        largest, smallest = ngram
        if not 1 <= smallest <= largest:
            raise ValueError(f"ngram: expected (largest, smallest), both from 1 up, got {ngram}")
        self._sizes = range(largest, smallest - 1, -1)
        self._rows: dict[int, _Row] = {}

    def extend(self, row: int, tokens: list[int]) -> None:
        """Appends tokens to a row: its prompt at first, then whatever was generated."""
        state = self._rows.setdefault(row, _Row([{} for _ in self._sizes]))
        text = state.tokens
        for token in tokens:
            if state.suffix and text[state.source] == token:
                state.suffix, state.source = state.suffix + 1, state.source + 1
            else:
                state.suffix = 0
            text.append(token)
            end = len(text)
            for n, table in zip(self._sizes, state.tables, strict=True):
                if n > end:
                    continue
                gram = tuple(text[-n:])
                source = table.get(gram)
                table[gram] = end
                if source is not None and n >= state.suffix:
                    state.suffix, state.source = n, source

    def suffix(self, row: int) -> int:
        """How many tokens the end of a row shares with the place it would copy; 0: no draft.

        Up to `largest` the length of the n-gram found, beyond it the length of the copy so far. It
        tells good drafts from bad: suffix.bit_length() makes few classes of it, as DraftLength has.
        """
        state = self._rows.get(row)
        return state.suffix if state else 0

    def draft(self, row: int, most: int) -> list[int]:
        """The `most` tokens that come after the place a row would copy; [] where there is none.

        Where the copy reaches the end of the text it goes on into itself: a text that repeats is
        drafted as a period of what repeats.
        """
        state = self._rows.get(row)
        if not state or not state.suffix:
            return []
        drafted = state.tokens[state.source : state.source + max(most, 0)]
        period = len(state.tokens) - state.source
        while len(drafted) < most:
            drafted.append(drafted[-period])
        return drafted

    def drop(self, row: int) -> None:
        """Forgets a row that has ended; one never seen is no error."""
        self._rows.pop(row, None)
