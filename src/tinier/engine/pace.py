"""How many tokens to draft: as many as pay, by what steps have cost and what was right.

Start at `Pace.lengths`. A token that is drafted at depth j is worth the probability that it and all before
it are right, agreement^j; it costs its row in the model's step and its share of the draft's. What pays is
what brings more tokens a second than the step without it. A draft model also has to read what it has not
read of a request, which must pay by the request's end.
"""

import math
from bisect import bisect

from tinier.engine.request import Request

# weight of what was seen before, against one more step, or one more token
_STEP_MEMORY, _TOKEN_MEMORY = 0.9, 0.95
# until tokens were compared
_AGREEMENT = 0.7
# drafts must promise this much more
_MARGIN = 1.03
# of the time, at most, goes to trying drafts that did not pay before, and to looking whether any do
_TRYING, _LOOKING = 0.01, 0.01
# tokens that are drafted to try
_TRIED = 2
# steps without drafts: a trial is taken to cost no more, and a first step that takes longer says nothing
_SLOW = 3
# steps: what a long prompt's first look takes, or a slow moment, is no reason to miss what repeats
_MOST_REST = 32
# tokens that a request is believed to write still, where it may write many more and has not
_USUAL_REST = 256
# of what a draft saves by a request's end, at most, goes to what it reads first: the request may end sooner
_SURELY = 0.7
# after so many steps with drafts some have none, so that what those cost stays known: a few, for the first
# two say nothing where a step is launched before the one before is read
_DRAFTED, _PLAIN = 96, 3
# of a step: what one more row in it costs, and a token of the draft, before they were measured
_ROW = 0.1
MEASURED = 4
"""So often before anything is decided by it"""


class Pace:
    def __init__(self, most: int, *, model: bool, overlaps: bool = False) -> None:
        """most: tokens drafted at once. model: whether drafting itself takes time. overlaps: whether steps
        without drafts are launched before the one before is read, which those with drafts cannot be."""
        self._most, self._model = most, model
        self._steps, self._drafting, self._reading = _Costs(), _Costs(), _Costs()
        self._checking = _Costs() if overlaps else self._steps
        """Of steps with drafts"""
        self._checked: set[int] = set()
        """Rows of those that there were"""
        self._known = not model
        """Whether drafting was measured, or costs nothing"""
        self._typical = _AGREEMENT
        self._agreement: dict[Request, float] = {}
        self._turn = 0
        """Steps with drafts, then without, of a round"""
        self._credit = 0.0
        """Seconds that may be spent on trying"""
        self._trials = 0
        self._rest = 0
        """Steps in which nobody looks whether a draft pays"""
        self._in_vain = False
        """Whether the last look found nothing that pays"""

    def rests(self) -> bool:
        """Whether the next step goes without drafts and without looking for any."""
        self._rest -= 1
        return self._rest >= 0

    def looked(self, seconds: float, rows: int) -> None:
        """So long, for drafts of requests whose next tokens are `rows`. In short steps that is felt, so
        nobody looks again for a while after it was in vain."""
        step = self._steps.at(rows) if rows and self._in_vain else None
        if step is not None:
            self._rest = min(_MOST_REST, int(seconds / (_LOOKING * step)))
            self._credit += _TRYING * step * self._rest

    def lengths(self, unread: dict[Request, int], rows: int) -> dict[Request, int]:
        """Tokens to draft for each of some requests; those that get none are left out.

        unread: tokens that the draft has to read first. rows: requests whose next tokens the step computes.
        """
        most = {r: min(self._most, r.params.max_tokens - r.num_sampled - 1) for r in unread}
        most = {request: count for request, count in most.items() if count > 0}
        step = self._steps.at(rows)
        self._in_vain = True
        if not most or step is None:
            return {}
        found = self._paying(most, unread, step, rows) if self._known else {}
        if not found:
            self._turn = 0
            return self._trial(most, unread, step, rows)
        self._in_vain = False
        self._turn = (self._turn + 1) % (_DRAFTED + _PLAIN)
        return found if self._turn < _DRAFTED else {}

    def _trial(
        self, most: dict[Request, int], unread: dict[Request, int], step: float, rows: int
    ) -> dict[Request, int]:
        """A few tokens, now and then all, for the request with the fewest to read, if there is credit."""
        request = min(most, key=lambda r: unread[r])
        length = min(most[request], self._most if self._trials % 4 == 3 else _TRIED)
        drafting, reading = self._drafting.at(1), self._reading.at(1)
        if drafting is None:
            drafting = step if self._model else 0.0
        cost = length * (_ROW * step + drafting)
        cost += unread[request] * (_ROW * step if reading is None else reading)
        if self._checking is not self._steps:
            # the device waits before it and after it, as long as a whole step; no more than a few, since a
            # trial is what corrects costs that were seen in a slow moment
            cost += min(self._checking.at(rows + length) or step, _SLOW * step)
        self._credit += _TRYING * step
        if self._known and cost > self._credit:
            return {}
        self._credit = 0.0
        self._trials += 1
        return {request: length}

    def _paying(
        self, most: dict[Request, int], unread: dict[Request, int], step: float, rows: int
    ) -> dict[Request, int]:
        """As many for each as make the most tokens a second, of all requests together."""
        drafting = self._drafting.at(len(most)) or 0.0
        reading = self._reading.at(1) or 0.0
        plain = rate = rows / step
        lengths: dict[Request, int] = {}
        steps = self._checking if self._checking.count else self._steps
        row = steps.slope(rows, rows + sum(most.values()))
        for _ in range(4):  # at the best rate the last token drafted is just worth its cost
            worth = rate * (row + drafting / len(most))
            lengths = {r: _longest(self._of(r), worth, count) for r, count in most.items()}
            drafted = sum(lengths.values())
            tokens = rows + sum(_more(self._of(r), count) for r, count in lengths.items())
            seconds = (steps.at(rows + drafted) or step) + drafting * max(lengths.values())
            rate = max(tokens / seconds, plain)
        if rate < _MARGIN * plain:
            return {}
        saved = step * (1 - plain / rate)  # for each token that is still to come
        return {
            request: count
            for request, count in lengths.items()
            if count
            and (unread[request] <= 2 * self._most
                 or unread[request] * reading < _SURELY * saved * _left(request))
        }  # fmt: skip

    def step_took(self, seconds: float, rows: int, *, drafts: bool = False) -> None:
        """A step of the model alone, with no prompt in it. rows: tokens that it computed."""
        steps = self._checking if drafts else self._steps
        if drafts and self._is_a_first(rows, seconds):
            return
        level = steps.add(rows, seconds)
        # a machine that is busier is so for all
        for other in {self._steps, self._checking, self._drafting, self._reading} - {steps}:
            other.scale(level)

    def _is_a_first(self, rows: int, seconds: float) -> bool:
        """Whether a step with drafts is the first of so many rows and took so long that something was
        compiled or captured in it: it says nothing, and nobody may come to see another."""
        step = self._steps.at(rows)
        if self._checking is self._steps or step is None or rows in self._checked:
            return False
        self._checked.add(rows)
        return seconds > _SLOW * step

    def drafting_took(self, seconds: float, requests: int) -> None:
        """One token for each of some requests."""
        self._drafting.add(requests, seconds)
        self._known = self._drafting.count >= MEASURED

    def reading_took(self, seconds: float, tokens: int) -> None:
        """The draft read what came before."""
        self._reading.add(1, seconds / tokens)

    def agreed(self, request: Request, accepted: int, drafted: int) -> None:
        """What came of a draft."""
        known = self._of(request)
        for right in [1.0] * accepted + [0.0] * (accepted < drafted):
            known += (1 - _TOKEN_MEMORY) * (right - known)
            self._typical += (1 - _TOKEN_MEMORY) / 4 * (right - self._typical)
        self._agreement[request] = known

    def clear(self) -> None:
        """Forget all requests, not what steps cost."""
        self._agreement.clear()
        self._typical = _AGREEMENT
        self._rest = 0

    def forget(self, request: Request) -> None:
        self._agreement.pop(request, None)

    def _of(self, request: Request) -> float:
        return self._agreement.get(request, self._typical)


def _left(request: Request) -> int:
    """Tokens that it may be expected to write still: a limit says little where it is all that fits."""
    most = request.params.max_tokens - request.num_sampled
    return min(most, max(_USUAL_REST, request.num_sampled))


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


class _Mean:
    """Of what was seen, the later the more; the least of the first few, which something is slow in."""

    def __init__(self) -> None:
        self.value, self.count = math.inf, 0

    def add(self, value: float) -> None:
        if self.count < MEASURED:
            self.value = min(self.value, value)
        else:  # what something else held up says little
            self.value += (1 - _STEP_MEMORY) * (min(value, 3 * self.value) - self.value)
        self.count += 1


class _Costs:
    """Seconds of a step by its rows."""

    def __init__(self) -> None:
        self._seen: dict[int, _Mean] = {}
        self.count = 0

    def add(self, rows: int, seconds: float) -> float:
        """Returns by how much steps take longer now than before: the others are taken to do so too."""
        mean = self._seen.setdefault(rows, _Mean())
        before, settled = mean.value, mean.count >= MEASURED
        mean.add(seconds)
        self.count += 1
        if not settled or not before:
            return 1.0
        level = mean.value / before
        self.scale(level)
        mean.value /= level
        return level

    def scale(self, level: float) -> None:
        for mean in self._seen.values():
            mean.value *= level

    def at(self, rows: int) -> float | None:
        """Between and beyond what was seen on a line; None: nothing was."""
        if rows in self._seen:
            return self._seen[rows].value
        known = sorted(self._seen)
        if not known:
            return None
        if len(known) == 1:
            (one,) = known
            return self._seen[one].value * max(1 + _ROW * (rows - one) / one, 0.5)
        low, high = known[0], known[-1]
        inside = low < rows < high
        if inside:  # beyond: by the whole range, since two neighbours differ by chance as well
            at = bisect(known, rows)
            low, high = known[at - 1], known[at]
        first, last = self._seen[low].value, self._seen[high].value
        slope = (last - first) / (high - low)
        near = high if rows > high else low
        return max(
            self._seen[near].value + (slope if inside else max(slope, 0.0)) * (rows - near), 1e-6
        )

    def slope(self, low: int, high: int) -> float:
        """Of one row more, between two numbers of them."""
        first, last = self.at(low), self.at(high)
        assert first is not None
        assert last is not None
        return max(last - first, 0.0) / (high - low)
