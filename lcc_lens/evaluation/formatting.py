"""Numbers as text, formatted alike in every table."""

from __future__ import annotations

from collections.abc import Sequence


def number(value: int | float | None, form: str = ".2f") -> str:
    """A number in a format of :func:`format`; empty if there is none."""
    return "" if value is None else format(value, form)


def with_spread(value: int | float | None, spread: int | float | None, form: str = ".2f") -> str:
    """A mean with its standard deviation, ``3.10 ± 0.02``; empty without a mean."""
    return number(value, form) + ("" if value is None or spread is None else f" ± {spread:{form}}")


def interval(ends: Sequence[int | float] | None, form: str = ".2f") -> str:
    """The ends of an interval, ``[1.20, 3.40]``; empty if there is none."""
    return "" if ends is None else f"[{', '.join(format(end, form) for end in ends)}]"


def count(value: int | float | None) -> str:
    """A count in few characters: 960, 34.6k, 2.4M; empty if there is none."""
    if value is None or value < 1000:
        return number(value, ".0f")
    return f"{value / 1e3:.1f}k" if value < 1e6 else f"{value / 1e6:.1f}M"
