"""Sparsity patterns (unstructured, N:M): parse them, check that they fit a matrix, detect them in weights."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.errors import RequestError

# Hardware patterns to detect, strictest first: every 2:4 matrix also satisfies 4:8.
_KNOWN_GROUPS = ((2, 4), (4, 8))
# A matrix that nobody pruned may still hold a few exact zeros (a small format underflows, a feature is dead).
_INCIDENTAL_ZEROS = 1e-3


def common_pattern(patterns: Collection[str]) -> str:
    """The strictest pattern that holds in every matrix.

    Example:
        >>> common_pattern(["2:4", "4:8"])
        '4:8'
        >>> common_pattern(["2:4", "dense"])
        'unstructured'
    """
    distinct = set(patterns)
    if len(distinct) == 1:
        return distinct.pop()
    return "4:8" if distinct <= {"2:4", "4:8"} else "unstructured"


def shown_pattern(found: str, asked: str | None) -> str:
    """A pattern as tables show it: what the zeros satisfy, and beside it another N:M that they were made for.

    Example:
        >>> shown_pattern("unstructured", "3:4")
        'unstructured, pruned to 3:4'
        >>> shown_pattern("2:4", "2:4")
        '2:4'
    """
    return f"{found}, pruned to {asked}" if asked and ":" in asked and asked != found else found


@dataclass(frozen=True)
class Unstructured:
    """A fraction of zeros, wherever the scores are lowest.

    Args:
        sparsity: fraction of weights to remove, at least 0 and below 1.

    Raises:
        RequestError: the fraction lies outside [0, 1).
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise RequestError(f"expected a sparsity from 0 to below 1, got {self.sparsity}; write 0.5 for one half")

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NofM:
    """At most ``n`` weights other than zero in every ``m`` neighbours along the input dimension.

    Args:
        n: weights kept in a group.
        m: size of a group.

    Raises:
        RequestError: not 0 < n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise RequestError(f"expected N:M with 0 < N < M, got {self}; write 2:4 to keep two weights of every four")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the pattern."""
        return 1 - self.n / self.m


Pattern = Unstructured | NofM


def parse_pattern(text: str) -> NofM:
    """Read a pattern such as ``2:4``.

    Example:
        >>> parse_pattern("2:4")
        NofM(n=2, m=4)
    """
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text.strip())
    if match is None:
        raise RequestError(f"expected a pattern N:M, got {text!r}; write 2:4 to keep two weights of every four")
    return NofM(int(match[1]), int(match[2]))


def require_fit(pattern: Pattern, width: int, name: str) -> None:
    """Refuse a pattern whose groups do not fill the rows of a matrix.

    Args:
        width: number of input features of the matrix.
    """
    if isinstance(pattern, NofM) and width % pattern.m:
        raise RequestError(
            f"expected an input width that {pattern.m} divides for pattern {pattern}, got {width} in {name}; "
            "choose another pattern or an unstructured sparsity"
        )


def sparsity(weight: Float[Tensor, "out in"]) -> float:
    """The fraction of weights that are exactly zero."""
    return 1 - torch.count_nonzero(weight).item() / weight.numel()


def detect_pattern(weight: Float[Tensor, "out in"]) -> str:
    """The strictest pattern that the zeros of a matrix satisfy.

    Args:
        weight: matrix with one row per output; groups run along the input dimension.

    Returns:
        ``2:4`` or ``4:8`` where every group has its zeros, ``dense`` where at most one weight in a thousand is zero,
        else ``unstructured``.
    """
    zeros = weight == 0
    if zeros.sum().item() <= _INCIDENTAL_ZEROS * weight.numel():
        return "dense"
    for n, m in _KNOWN_GROUPS:
        if weight.shape[1] % m == 0 and bool((zeros.reshape(-1, m).sum(dim=1) >= m - n).all()):
            return f"{n}:{m}"
    return "unstructured"
