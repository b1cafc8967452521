"""Heads and how many of them a share is."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest

from lcc_lens.core.heads import n_of_share


@pytest.mark.parametrize("n", [1, 15, 100, 1024])
def test_a_share_written_in_hundredths_is_as_many_as_by_hand(n: int) -> None:
    for hundredths in range(1, 101):
        assert n_of_share(hundredths / 100, n) == ceil(Fraction(hundredths, 100) * n)
