"""How many tokens to draft: as many as pay, by what steps have cost and what was agreed on.

Start at `Pace.lengths`. A token that is drafted at depth j is worth the probability that it and all before
it are right, agreement^j; it costs its row in the model's step and its share of the draft's. What pays is
what brings more tokens a second than the step without it.
"""

import math

from tinier.engine.request import Request

# steps without drafts before some are tried again: what they cost is lost among them
_TRIED_EVERY = 64
# weight of what was seen before, against one more step, or one more token
_STEP_MEMORY, _TOKEN_MEMORY = 0.95, 0.95
_FIRST_AGREEMENT = 0.7
# drafts must promise this much more
_MARGIN = 1.02


class Pace:
    def __init__(self, most: int, draft_share: float) -> None:
        """most: tokens drafted at once. draft_share: a drafted token's cost for as long as it is not known,
        of a step's."""
        self._most, self._draft_share = most, draft_share
        self._steps = _Line()
        self._drafting: float | None = None
        """Seconds to draft one token more for every request"""
        self._typical = _FIRST_AGREEMENT
        self._agreement: dict[Request, float] = {}
        self._since = 0

    def lengths(self, requests: list[Request]) -> dict[Request, int]:
        """Tokens to draft for each of some requests, whose next tokens a step computes; those that get
        none are left out."""
        most = {r: min(self._most, r.params.max_tokens - r.num_sampled - 1) for r in requests}
        most = {request: count for request, count in most.items() if count > 0}
        if not most:
            return {}
        found = self._paying(most, len(requests))
        self._since = 0 if found else self._since + 1
        if not found and self._since >= _TRIED_EVERY:
            self._since = 0
            return {request: min(2, count) for request, count in most.items()}
        return found

    def _paying(self, most: dict[Request, int], rows: int) -> dict[Request, int]:
        step = self._steps.at(rows)
        if step is None:  # nothing is known yet
            return {request: min(2, count) for request, count in most.items()}
        row = self._steps.slope
        drafting = step * self._draft_share if self._drafting is None else self._drafting
        plain = rows / step
        rate = plain
        for _ in range(
            4
        ):  # the best rate is the one at which what is worth its cost brings just that
            worth = min(rate * (row + drafting / len(most)), 1.0)
            lengths = {r: _longest(self._of(r), worth, count) for r, count in most.items()}
            tokens = rows + sum(_more(self._of(r), count) for r, count in lengths.items())
            seconds = step + row * sum(lengths.values()) + drafting * max(lengths.values())
            rate = max(tokens / seconds, plain)
        if rate < _MARGIN * plain:
            return {}
        return {request: count for request, count in lengths.items() if count}

    def step_took(self, seconds: float, rows: int) -> None:
        """A step of the model alone, with no prompt in it. rows: tokens that it computed."""
        self._steps.add(rows, seconds)

    def drafting_took(self, seconds: float, depth: int) -> None:
        each = seconds / depth
        known = self._drafting
        self._drafting = each if known is None else known + (1 - _STEP_MEMORY) * (each - known)

    def agreed(self, request: Request, accepted: int, drafted: int) -> None:
        """What came of a draft."""
        known = self._of(request)
        for right in [1.0] * accepted + [0.0] * (accepted < drafted):
            known += (1 - _TOKEN_MEMORY) * (right - known)
            self._typical += (1 - _TOKEN_MEMORY) / 4 * (right - self._typical)
        self._agreement[request] = known

    def forget(self, request: Request) -> None:
        self._agreement.pop(request, None)

    def _of(self, request: Request) -> float:
        return self._agreement.get(request, self._typical)


def _longest(agreement: float, worth: float, most: int) -> int:
    """The largest j with agreement^j >= worth."""
    if agreement >= 1 or worth <= 0:
        return most
    if agreement <= 0 or worth >= 1:
        return 0
    return min(most, int(math.log(worth) / math.log(agreement)))


def _more(agreement: float, count: int) -> float:
    """Tokens that a draft of `count` brings: the sum of agreement^j."""
    return float(sum(agreement**j for j in range(1, count + 1)))


class _Line:
    """Seconds of a step by its rows: a line through those seen, the later ones weighing more."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5

    def add(self, rows: int, seconds: float) -> None:
        expected = self.at(rows)
        if expected is not None:  # a step that something else held up says little
            seconds = min(seconds, 3 * expected)
        new = (1.0, rows, rows * rows, seconds, rows * seconds)
        self._sums = [_STEP_MEMORY * old + one for old, one in zip(self._sums, new, strict=True)]

    @property
    def slope(self) -> float:
        """Of one row more; a tenth of a step's mean, where all steps were alike."""
        count, rows, squares, seconds, products = self._sums
        spread = count * squares - rows * rows
        if spread < 1e-3 * rows * rows:
            return 0.1 * seconds / rows
        return max((count * products - rows * seconds) / spread, 0.0)

    def at(self, rows: int) -> float | None:
        count, total, _, seconds, _ = self._sums
        if not count:
            return None
        return max((seconds + self.slope * (count * rows - total)) / count, 1e-6)
