"""How many tokens to draft for each row of a step, so that speculation pays or does not happen.

A step over R rows, row r drafting n_r, verifies R + sum n_r tokens. With a_r the probability that
a drafted token of the row is accepted, given that those before it were, it gains

    sum_r E_r,   E_r = 1 + a_r + … + a_r^n_r = (1 - a_r^(n_r + 1)) / (1 - a_r)       tokens in
    step(R + sum n_r) + drafting * max n_r                                            seconds

and the lengths with most tokens per second are taken, a token of one row being worth as much as
one of another: rows that end early make room. a and both costs are measured as decoding goes on.
E_r grows ever slower in n_r, so for any sum of lengths the best ones take the largest a_r^k first:
one pass over them, in that order, sees every best choice. The formula is that of Leviathan et al.
2023 (arXiv 2211.17192, theorem 3.8), with measured costs in place of a constant.
"""

from bisect import bisect_right
from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace
from typing import Any

FORGETTING = 0.95  # of a row's acceptance, per draft
POOL_FORGETTING = 0.98  # of the acceptance of all rows
EXPECTED = 0.6  # acceptance before anything is known, as if seen in CERTAINTY tokens
CERTAINTY = 3.0
SMOOTHING = 0.2  # weight of the newest measurement of a cost
LASTING = 8  # measurements beyond which a cost gets no surer
SURPRISE = 1.25  # by how much a width's first measurement may exceed what its neighbours tell
SLOPE = 0.1  # before anything is known, what a token more costs, in tokens of the narrowest step
REFRESH = 16  # rounds after which a step without drafts is measured again, by measurements so far
STALE = 1024  # rounds after which the cost of a width is forgotten
PROBING = 0.01  # of the time may go into drafts that are not expected to pay
CREDIT = 4.0  # plain steps of earlier gains that may be lost again


def _smoothed(old: float, measurements: int, new: float) -> float:
    """The mean of the first measurements, then one that forgets."""
    if not measurements:
        return new
    # A step that took ten times as long met something else on the machine.
    new = min(max(new, old / 2), old * 2)
    return old + max(SMOOTHING, 1 / (measurements + 1)) * (new - old)


class StepCost:
    """Seconds of a step by the number of its tokens: measured, monotone, linear in between."""

    def __init__(self) -> None:
        self._points: dict[int, tuple[float, int, int]] = {}  # tokens: seconds, measurements, round
        self._widths: list[int] = []
        self._seconds: list[float] = []

    def observe(self, tokens: int, seconds: float, now: int) -> None:
        old, measurements, _ = self._points.get(tokens, (0.0, 0, now))
        if not measurements and self._points:
            # A width that looks dear is not tried again: one slow step must not decide.
            seconds = min(seconds, SURPRISE * self(tokens))
        new = _smoothed(old, measurements, seconds)
        self._points[tokens] = new, min(measurements + 1, LASTING), now
        for width in [w for w, p in self._points.items() if now - p[2] > STALE]:
            del self._points[width]
        # Pool adjacent violators: the nearest costs that do not fall as tokens are added.
        pools: list[list[Any]] = []  # [seconds, weight, widths]
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

    def known(self, tokens: int) -> bool:
        return tokens in self._points

    def fresh(self, tokens: int, now: int) -> bool:
        """Whether a step of so many tokens was measured lately, the surer the longer ago."""
        _, measurements, last = self._points.get(tokens, (0.0, 0, 0))
        return now - last <= REFRESH * measurements and measurements > 0

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
    A round risks at most half a step more than was gained before; once there is a loss, nothing is
    drafted until a hundredth of the time has made up for it, but for probes: one token of one row,
    and no more of them than cost a hundredth of the time if none is accepted. So whatever the text,
    the loss is half a step and two hundredths of the time.
    """

    def __init__(self) -> None:
        self._step = StepCost()
        self._drafting = 0.0  # seconds per position drafted
        self._draftings = 0  # measurements of it
        self._rows: dict[int, dict[int, list[float]]] = {}  # row: {kind: [accepted, tried]}
        self._pool: dict[int, list[float]] = {}  # kind: [accepted, tried]
        self._round = 0
        self._longest = 1  # a draft may be twice as long as any before: costs are found out cheaply
        self._chosen: dict[int, int] = {}
        self._accepted = 0
        self._probe = False
        self._probed: dict[int, int] = {}  # row: round
        self._unprobed = 0.0  # seconds since the last probe
        self._credit = 0.0  # seconds that may be lost

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
            self._drafting = _smoothed(self._drafting, self._draftings, seconds / tokens)
            self._draftings += 1

    def drop(self, row: int) -> None:
        """Forgets a row that has ended; what it told about all rows stays."""
        self._rows.pop(row, None)
        self._probed.pop(row, None)

    def _settle(self) -> None:
        """Books the last round: its estimated time, against that of its tokens without drafts."""
        rows, accepted, self._accepted = len(self._chosen), self._accepted, 0
        if not self._step.known(rows):
            return
        plain, longest = self._step(rows), max(self._chosen.values())
        spent = self._step(rows + sum(self._chosen.values())) + longest * self._drafting
        gained = (rows + accepted) * plain / rows - spent
        if not self._probe:
            self._credit = min(self._credit + gained, CREDIT * plain) + PROBING * spent
        self._unprobed += spent

    def _lengths(self, offers: Any) -> tuple[list[int], bool]:
        """Lengths, and whether nothing but a probe is in them."""
        lengths = [0] * len(offers)
        # Nothing is worth a draft where its gain cannot be told.
        if not self._step.fresh(len(offers), self._round):
            return lengths, False
        if self._credit >= 0:
            lengths = self._best(offers)
        pays = any(lengths)
        return lengths, self._add_probe(offers, lengths) and not pays

    def _best(self, offers: Any) -> list[int]:
        """The lengths with most tokens per second."""
        best = [0] * len(offers)
        # A gain too small to be sure of is none.
        rate = 1.02 * len(offers) / self._step(len(offers))
        rows = [
            (self.acceptance(row, kind), index, min(available, self._longest))
            for index, (row, available, kind) in enumerate(offers)
            if available > 0
        ]
        deepest = max((most for *_, most in rows), default=0)
        # All rows share what a position costs to draft, so it is either paid for or not.
        for depth in range(1 if self._drafting else deepest, deepest + 1):
            lengths, found = self._best_within(rows, len(offers), depth)
            if found > rate:
                best, rate = lengths, found
            elif any(best):
                break
        return best

    def _best_within(self, rows: Any, width: int, depth: int) -> tuple[list[int], float]:
        """The best lengths up to depth, and their tokens per second."""
        tokens, order, best, rate = float(width), [], 0, 0.0
        # If nothing is accepted, a round loses at most half a plain step more than the credit.
        limit = 1.5 * self._step(width) + self._credit
        heap = [(-a, index, a, min(most, depth)) for a, index, most in rows]
        heapify(heap)
        while heap and heap[0][0] < -0.01:
            gain, index, a, left = heap[0]
            tokens -= gain
            order.append(index)
            spent = self._step(width + len(order)) + self._drafting * depth
            if tokens / spent > rate and spent <= limit:
                best, rate = len(order), tokens / spent
            if left > 1:
                heapreplace(heap, (gain * a, index, a, left - 1))
            else:
                heappop(heap)
        lengths = [0] * width
        for index in order[:best]:
            lengths[index] += 1
        return lengths, rate

    def _add_probe(self, offers: Any, lengths: list[int]) -> bool:
        """One token for the undrafted row that has waited longest, if enough time has gone by."""
        waiting = [i for i, offer in enumerate(offers) if offer[1] > 0 and not lengths[i]]
        width = len(offers) + sum(lengths)
        price = self._step(width + 1) - self._step(width)
        price += 0.0 if any(lengths) else self._drafting
        if not waiting or self._unprobed * PROBING < price:
            return False
        index = min(waiting, key=lambda i: self._probed.get(offers[i][0], 0))
        lengths[index], self._unprobed = 1, 0.0
        self._probed[offers[index][0]] = self._round
        return True
