"""How many tokens to draft for each row of a step, so that speculation pays or does not happen.

A step over R rows, row r drafting n_r, verifies R + sum n_r tokens. With a_r the probability that
a drafted token of the row is accepted, given that those before it were, it gains

    sum_r E_r,   E_r = 1 + a_r + … + a_r^n_r = (1 - a_r^(n_r + 1)) / (1 - a_r)       tokens in
    step(R + sum n_r) + drafting * max n_r                                            seconds

and the lengths with most tokens per second are taken. a and both costs are measured as decoding
goes on. E_r grows ever slower in n_r, so for any sum of lengths the best ones take the largest
a_r^k first: one pass over them, in that order, sees every best choice. The formula is that of
Leviathan et al. 2023 (arXiv 2211.17192, theorem 3.8), with a measured cost in place of a constant.
"""

from bisect import bisect_right
from collections.abc import Sequence
from heapq import heapify, heapreplace

FORGETTING = 0.93  # of a row's acceptance, per draft
POOL_FORGETTING = 0.98  # of the acceptance of all rows
EXPECTED = 0.6  # acceptance before anything is known, as if seen in CERTAINTY tokens
CERTAINTY = 2.0
SMOOTHING = 0.2  # weight of the newest measurement of a cost
SLOPE = 0.1  # before anything is known, what a token more costs, in tokens of the narrowest step
REFRESH = 128  # rounds after which a step without drafts is measured again
STALE = 1024  # rounds after which the cost of a width is forgotten
PROBING = 0.01  # of the time may go into drafts that are not expected to pay
CREDIT = 4.0  # plain steps of earlier gains that may be lost again


def _smoothed(old: float | None, new: float) -> float:
    if old is None:
        return new
    # A step that took ten times as long met something else on the machine.
    return old + SMOOTHING * (min(max(new, old / 2), old * 2) - old)


class StepCost:
    """Seconds of a step by the number of its tokens: measured, monotone, linear in between."""

    def __init__(self):
        self._points: dict[int, list[float]] = {}  # tokens: [seconds, measurements, last round]
        self._widths: list[int] = []
        self._seconds: list[float] = []

    def observe(self, tokens: int, seconds: float, now: int) -> None:
        point = self._points.setdefault(tokens, [None, 0, now])
        point[:] = _smoothed(point[0], seconds), min(point[1] + 1, 1 / SMOOTHING), now
        for width in [w for w, p in self._points.items() if now - p[2] > STALE]:
            del self._points[width]
        # Pool adjacent violators: the nearest costs that do not fall as tokens are added.
        pools: list[list] = []  # [seconds, weight, widths]
        for width in sorted(self._points):
            pools.append([*self._points[width][:2], [width]])
            while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
                cost, weight, widths = pools.pop()
                before = pools[-1]
                before[0] = (before[0] * before[1] + cost * weight) / (before[1] + weight)
                before[1] += weight
                before[2] += widths
        self._widths = [width for _, _, widths in pools for width in widths]
        self._seconds = [cost for cost, _, widths in pools for _ in widths]

    def age(self, tokens: int, now: int) -> float:
        """Rounds since a step of so many tokens was measured; inf if never."""
        return now - self._points[tokens][2] if tokens in self._points else float("inf")

    def __call__(self, tokens: int) -> float:
        widths, seconds = self._widths, self._seconds
        at = bisect_right(widths, tokens)
        if at == 0:
            return seconds[0]
        if at < len(widths):
            share = (tokens - widths[at - 1]) / (widths[at] - widths[at - 1])
            return seconds[at - 1] + share * (seconds[at] - seconds[at - 1])
        beyond = tokens - widths[-1]
        if len(widths) == 1:
            return seconds[0] * (1 + SLOPE * beyond / widths[0])
        return seconds[-1] + beyond * (seconds[-1] - seconds[0]) / (widths[-1] - widths[0])


class DraftLength:
    """Chooses draft lengths, round by round; the same observations give the same lengths.

    A round of decoding, each call but `choose` only where there is something to tell:

        lengths = choose([(row, available, kind), …])   one offer for every row of the step
        observe_draft(longest draft, seconds)
        observe_step(tokens verified, seconds)
        observe(row, drafted, accepted, kind)           per row

    rows are any integers, `available` is how many tokens could be drafted, `kind` any class of
    drafts whose acceptance is tracked apart, as by the length of the suffix PromptLookup found. A
    draft that cost nothing can be observed without having been verified, by whether its first
    token is the one that came: observe(row, 1, came, kind).

    How a loss is kept small: every round is booked against the same tokens decoded without drafts.
    When more was lost than one step and a hundredth of the time, nothing is drafted until it is
    made up for, but for probes: one token of one row, and no more of them than cost a hundredth of
    the time if none is accepted. Gains are booked too, up to CREDIT steps.
    """

    def __init__(self):
        self._step = StepCost()
        self._drafting: float | None = None  # seconds per position drafted
        self._rows: dict[int, dict[int, list[float]]] = {}  # row: {kind: [accepted, tried]}
        self._pool: dict[int, list[float]] = {}  # kind: [accepted, tried]
        self._round = 0
        self._longest = 1  # a draft may be twice as long as any before: costs are found out cheaply
        self._chosen: dict[int, int] = {}
        self._accepted = 0
        self._probe = False
        self._probed: dict[int, int] = {}  # row: round
        self._unprobed = 0.0  # seconds since the last draft
        self._credit: float | None = None  # seconds

    def acceptance(self, row: int, kind: int = 0) -> float:
        """Probability that a drafted token is accepted, if those before it were."""
        accepted, tried = self._pool.get(kind, (0.0, 0.0))
        pool = (accepted + CERTAINTY * EXPECTED) / (tried + CERTAINTY)
        accepted, tried = self._rows.get(row, {}).get(kind, (0.0, 0.0))
        # Never certain: what is drafted without end is verified without end.
        return min((accepted + CERTAINTY * pool) / (tried + CERTAINTY), 0.98)

    def choose(self, offers: Sequence[tuple[int, int, int]]) -> list[int]:
        """Length of the draft for every offer (row, available, kind); 0: do not draft."""
        self._settle()
        self._round += 1
        lengths, self._probe = self._lengths(offers)
        self._chosen = {row: n for (row, _, _), n in zip(offers, lengths, strict=True)}
        self._longest = max(self._longest, 2 * max(lengths, default=0))
        return lengths

    def observe(self, row: int, drafted: int, accepted: int, kind: int = 0) -> None:
        """What became of a row's draft."""
        if not 0 <= accepted <= drafted:
            raise ValueError(f"accepted: expected 0 to {drafted} drafted, got {accepted}")
        self._accepted += min(accepted, self._chosen.get(row, 0))
        if drafted:
            tried = min(accepted + 1, drafted)  # after a rejection nothing was asked
            for counts, kept in (
                (self._rows.setdefault(row, {}).setdefault(kind, [0.0, 0.0]), FORGETTING),
                (self._pool.setdefault(kind, [0.0, 0.0]), POOL_FORGETTING),
            ):
                counts[:] = counts[0] * kept + accepted, counts[1] * kept + tried

    def observe_step(self, tokens: int, seconds: float) -> None:
        """Time of a step that verified so many tokens, those of all rows; not that of a prompt."""
        self._step.observe(tokens, seconds, self._round)

    def observe_draft(self, tokens: int, seconds: float) -> None:
        """Time of drafting: tokens are those of the longest draft, as rows are drafted together."""
        if tokens:
            self._drafting = _smoothed(self._drafting, seconds / tokens)

    def drop(self, row: int) -> None:
        """Forgets a row that has ended; what it told about all rows stays."""
        self._rows.pop(row, None)
        self._probed.pop(row, None)

    def _settle(self) -> None:
        """Books the last round: its estimated time, against that of its tokens without drafts."""
        rows, accepted, self._accepted = len(self._chosen), self._accepted, 0
        if not rows or self._step.age(rows, self._round) == float("inf"):
            return
        plain, longest = self._step(rows), max(self._chosen.values())
        spent = self._step(rows + sum(self._chosen.values())) + longest * (self._drafting or 0.0)
        if self._credit is None:
            self._credit = plain
        gained = (rows + accepted) * plain / rows - spent
        if not self._probe:
            self._credit = min(self._credit + gained, CREDIT * plain) + PROBING * spent
        self._unprobed = 0.0 if longest else self._unprobed + spent

    def _lengths(self, offers) -> tuple[list[int], bool]:
        rows, nothing = len(offers), [0] * len(offers)
        drafting = self._drafting or 0.0
        # Nothing is worth a draft where its gain cannot be told.
        if self._step.age(rows, self._round) > REFRESH or not any(n for _, n, _ in offers):
            return nothing, False
        plain = self._step(rows)
        if self._credit is not None and self._credit < 0:
            return self._probing(offers, plain)
        best, gain = nothing, 1.01 * rows / plain  # a gain too small to be sure of is none
        lengths, tokens, deepest = list(nothing), float(rows), 0
        heap = []
        for index, (row, available, kind) in enumerate(offers):
            most = min(available, self._longest)
            if most > 0:
                a = self.acceptance(row, kind)
                heap.append((-a, index, a, most))
        heapify(heap)
        for width in range(rows + 1, rows + 1 + sum(most for *_, most in heap)):
            negative, index, a, most = heap[0]
            if negative > -0.01:
                break
            tokens -= negative
            lengths[index] += 1
            deepest = max(deepest, lengths[index])
            rate = tokens / (self._step(width) + drafting * deepest)
            if rate > gain:
                best, gain = list(lengths), rate
            more = negative * a if lengths[index] < most else 0.0
            heapreplace(heap, (more, index, a, most))
        return (best, False) if any(best) else self._probing(offers, plain)

    def _probing(self, offers, plain: float) -> tuple[list[int], bool]:
        """One token of the row that has waited longest, when enough time has gone by for it."""
        lengths = [0] * len(offers)
        price = self._step(len(offers) + 1) + (self._drafting or 0.0) - plain
        if self._unprobed * PROBING < price:
            return lengths, False
        waiting = [index for index, (_, available, _) in enumerate(offers) if available > 0]
        index = min(waiting, key=lambda index: self._probed.get(offers[index][0], 0))
        lengths[index] = 1
        self._probed[offers[index][0]] = self._round
        return lengths, True
