"""How soon a model will be requested again, predicted from how long it was unused before earlier requests.

Each model has a histogram of these rests, and there is one of all models, with bins of half an octave from a second on.
Counting a rest takes constant time. A decision computes a hazard for each bin: of the rests that reached the bin, the
part that ended in it. Where a model has few rests of its own, the hazard of all models stands in for its own. Rests
beyond `LONG_S` end when a caller comes back, and not when a caller at work goes on. For them the hazard of all models
is scaled by how often callers come back to this model (proportional hazards with a gamma frailty: D. R. Cox 1972,
J. W. Vaupel et al. 1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

BINS = 40  # the last one begins at six days, and has no end
LONG_S = 600.0  # a rest that is as long as that is not a pause of a caller at work

_TRUST = 3.0  # how many rests of its own a model's bin needs to count as much as the bin of all models
_COMMON = 0.5  # returns to a model that are assumed beside its own, at the rate of all models
_SURE = 0.005  # the probability of longer rests that is neglected
_HALF = math.sqrt(0.5)
_EDGES = tuple(2.0 ** (place / 2) for place in range(BINS))  # where the bins begin, seconds
_LOG_WIDTH = math.log(2.0) / 2

Histogram = dict[int, int]  # rests by bin; a bin that is empty may be missing


def bin_of(rest_s: float) -> int:
    """Return the bin of a rest; one of less than a second is in the first."""
    if rest_s < 1.0:
        return 0
    mantissa, exponent = math.frexp(rest_s)
    place = 2 * exponent - 2 + (mantissa >= _HALF)
    return place if place < BINS else BINS - 1


def count_interval(rest_s: float, own: Histogram, common: Histogram) -> None:
    """Count a rest that ended with a request; in constant time, since requests for loaded models pay for it too."""
    if rest_s >= 1.0:
        place = bin_of(rest_s)
        own[place] = own.get(place, 0) + 1
        common[place] = common.get(place, 0) + 1


# For stays of growing length: the probability that a model is requested within the stay, and the mean seconds that it
# rests until then, or else until the end of the stay.
ReuseForecast = Sequence[tuple[float, float]]


def request_rate(forecast: ReuseForecast) -> float:
    """Return how often a second a model is requested while it stays, over the stay for which that is most often."""
    return max((asked / rest_s for asked, rest_s in forecast), default=0.0)


class IdleTimeStatistics:
    """The hazards of the rests of all models, computed once for a decision."""

    __slots__ = ("_known", "hazards", "rates")

    def __init__(self, common: Mapping[int, int]) -> None:
        self.hazards = [0.0] * BINS  # by bin: the probability that a rest which reaches the bin ends in it
        self.rates = [0.0] * BINS  # the same, as the integral of a rate over the bin
        self._known: dict[object, ReuseForecast] = {}  # by the rests of a model: those of many models are the same
        reached = 0
        for place in range(BINS - 1, -1, -1):
            ended = common.get(place, 0)
            reached += ended
            hazard = (ended + 0.5) / (reached + 1.0)
            self.hazards[place] = hazard
            self.rates[place] = -math.log1p(-min(hazard, 0.99))

    def forecast(self, own: Mapping[int, int], rest_s: float) -> ReuseForecast:
        """Return the forecast for a model that has rested for `rest_s`, for stays of growing length."""
        key = rest_s, *own.items()
        if (known := self._known.get(key)) is None:
            known = self._known[key] = self._forecast(own, rest_s)
        return known

    def _forecast(self, own: Mapping[int, int], rest_s: float) -> ReuseForecast:
        first = bin_of(rest_s)
        hazards = self._hazards_of(own, first)
        stays, asked, rest, at = 1.0, 0.0, 0.0, max(rest_s, 1.0)
        found = []
        for place in range(first, BINS - 1):
            end_s, hazard = _EDGES[place + 1], hazards[place]
            ends = hazard if place > first else 1.0 - (1.0 - hazard) ** (math.log(end_s / at) / _LOG_WIDTH)
            asked += stays * ends
            rest += stays * (end_s - at) * (1.0 - ends / 2)
            stays *= 1.0 - ends
            at = end_s
            found.append((asked, rest))
            if stays < _SURE:
                break
        return found

    def _hazards_of(self, own: Mapping[int, int], first: int) -> list[float]:
        """Return a model's hazards by bin, from the bin that its rest has reached on."""
        often = self._frailty(own, first)
        hazards = [0.0] * BINS
        reached, expm1 = 0, math.expm1
        for place in range(BINS - 1, first - 1, -1):
            ended = own.get(place, 0)
            reached += ended
            common = self.hazards[place] if place < _LONG else -expm1(-often * self.rates[place])
            hazards[place] = (ended + _TRUST * common) / (reached + _TRUST)
        return hazards

    def _frailty(self, own: Mapping[int, int], first: int) -> float:
        """Return how many times as often callers come back to this model after a long rest as to all models.

        The present rest counts up to its present length.
        """
        ended, expected = 0, 0.0
        for place in range(BINS - 1, _LONG - 1, -1):
            now = own.get(place, 0)
            ended += now
            expected += (ended - now / 2 + (place < first)) * self.rates[place]
        return (ended + _COMMON) / (expected + _COMMON)


_LONG = bin_of(LONG_S)
