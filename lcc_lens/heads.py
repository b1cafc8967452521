"""The address of an attention head, always as (layer, head)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lcc_lens.errors import RequestError

_LABEL = re.compile(r"^L(\d+)H(\d+)$")


class Head(NamedTuple):
    """One attention head, addressed by layer and by position within the layer (both from 0).

    Example:
        >>> str(Head(12, 3))
        'L12H3'
        >>> Head.parse("L12H3")
        Head(layer=12, head=3)
    """

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, label: str) -> Head:
        """Read a label such as ``L12H3``.

        Raises:
            RequestError: the label has another form.
        """
        match = _LABEL.match(label)
        if match is None:
            raise RequestError(f"wanted a head such as L12H3, got {label!r}")
        return cls(int(match[1]), int(match[2]))


def all_heads(n_layers: int, n_heads: int) -> list[Head]:
    """Every head of a model, layer by layer."""
    return [Head(layer, head) for layer in range(n_layers) for head in range(n_heads)]


def check_heads(heads: Iterable[Head | tuple[int, int]], n_layers: int, n_heads: int) -> list[Head]:
    """Sort heads and refuse what the model does not have.

    Raises:
        RequestError: no head at all, the same head twice, or a head outside the model.
    """
    checked = sorted(Head(*head) for head in heads)
    if not checked:
        raise RequestError("wanted at least one head, got none; raise the share of heads")
    if len(set(checked)) != len(checked):
        raise RequestError("wanted every head once, got one twice; remove the repetition")
    for head in checked:
        if not (0 <= head.layer < n_layers and 0 <= head.head < n_heads):
            raise RequestError(
                f"wanted heads within {n_layers} layers x {n_heads} heads, got {head}; "
                f"the last one is {Head(n_layers - 1, n_heads - 1)}"
            )
    return checked


def head_indices(heads: Sequence[Head]) -> tuple[list[int], list[int]]:
    """Split heads into the two index lists that address a ``[layer, head, ...]`` tensor."""
    return [head.layer for head in heads], [head.head for head in heads]
