"""Ranges of numbers that settings and options take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcc_lens.core.errors import RequestError


@dataclass(frozen=True)
class Range:
    """The numbers from ``least`` to ``most``.

    Args:
        least: the smallest number.
        most: the largest one.
        above: leave out ``least`` itself.
        below: leave out ``most`` itself.

    Example:
        >>> str(Range(0, 1, above=True)), str(Range(1))
        ('above 0 and at most 1', 'of at least 1')
    """

    least: int | float
    most: int | float = math.inf
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'of at least'} {self.least:g}"
        return low if self.most == math.inf else f"{low} and {'below' if self.below else 'at most'} {self.most:g}"

    def __contains__(self, number: int | float) -> bool:
        is_inside = self.least < number if self.above else self.least <= number
        return is_inside and math.isfinite(number) and (number < self.most or (number == self.most and not self.below))

    def require(self, name: str, number: int | float | None) -> None:
        """Refuse a number outside the range; None, for a default that is chosen later, is inside.

        Raises:
            RequestError: says the range, and how to write a percentage as a fraction.
        """
        if number is None or number in self:
            return
        is_percentage = self.most == 1 < number <= 100
        advice = f"write {number / 100:g} for {number:g} %" if is_percentage else "choose another number"
        raise RequestError(f"expected {name} {self}, got {number:g}; {advice}")


#: How many of something there are, at least one.
COUNT = Range(1)
#: Tokens of a sequence: one to read and one to predict.
LENGTH = Range(2)
#: A fraction of which something must be there.
SHARE = Range(0, 1, above=True)
FRACTION = Range(0, 1)
POSITIVE = Range(0, above=True)
NATURAL = Range(0)
