"""Addresses of attention heads, (layer, head), and which dense head each head of a sliced model is."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lcc_lens.core.errors import RequestError
from lcc_lens.core.reading import read_json
from lcc_lens.core.showing import Shown

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

_LABEL = re.compile(r"^L(\d{1,9})H(\d{1,9})$")


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
        """Parse a label such as ``L12H3``.

        Raises:
            RequestError: the label has another form.
        """
        match = _LABEL.match(label)
        if match is None:
            raise RequestError(f"expected a head such as L12H3, got {label!r}")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of(cls, head: HeadLike) -> Head:
        """A head from its layer and position, or from its label.

        Raises:
            RequestError: it is neither.
        """
        if isinstance(head, str):
            return cls.parse(head)
        try:
            layer, position = map(index, head)
        except (TypeError, ValueError) as error:
            raise RequestError(f"expected a head such as (12, 3) or L12H3, got {head!r}") from error
        return cls(layer, position)


#: A head, or what names one: its layer and position, or its label.
HeadLike = Head | tuple[int, int] | str


class _HeadSet(Shown):
    """Heads in a row, shown by their labels."""

    def table(self) -> pd.DataFrame:
        """One row per head, in order: layer, head, label."""
        import pandas as pd

        heads: list[Head] = list(self)  # type: ignore[call-overload]
        return pd.DataFrame([(*head, str(head)) for head in heads], columns=["layer", "head", "label"])

    def _rows(self) -> list[tuple[str, str]]:
        labels = self.table()["label"]
        lines = textwrap.wrap(" ".join(labels), 90, max_lines=14, placeholder=" …")
        return [(f"{len(labels)} heads" if number == 0 else "", line) for number, line in enumerate(lines or ["none"])]


class HeadList(_HeadSet, list[Head]):
    """A list of heads with a short representation."""


class HeadTuple(_HeadSet, tuple[Head, ...]):
    """A tuple of heads with a short representation."""


def all_heads(n_layers: int, n_heads: int) -> list[Head]:
    """Every head of a model, layer by layer."""
    return [Head(layer, head) for layer in range(n_layers) for head in range(n_heads)]


def n_of_share(share: float, n: int) -> int:
    """How many of n things a share is, rounded up.

    Example:
        >>> n_of_share(0.07, 100)  # as floats, 0.07 * 100 is above 7
        7
    """
    return math.ceil(round(share * n, 9))


def check_heads(heads: Iterable[HeadLike], n_layers: int, n_heads: int) -> list[Head]:
    """Sort heads, and refuse those that the model does not have."""
    checked = sorted(map(Head.of, heads))
    if not checked:
        raise RequestError("expected at least one head, got none; raise the share of heads")
    if len(set(checked)) != len(checked):
        raise RequestError("expected every head once, got one twice; remove the repetition")
    for head in checked:
        if not (0 <= head.layer < n_layers and 0 <= head.head < n_heads):
            raise RequestError(
                f"expected heads within {n_layers} layers x {n_heads} heads, got {head}; "
                f"the last one is {Head(n_layers - 1, n_heads - 1)}"
            )
    return checked


def head_indices(heads: Sequence[Head]) -> tuple[list[int], list[int]]:
    """Split heads into the two index lists that address a ``[layer, head, ...]`` tensor."""
    return [head.layer for head in heads], [head.head for head in heads]


#: The file beside a structured-pruned model's weights.
HEAD_MAP = "head_map.json"


@dataclass(frozen=True, repr=False)
class HeadMap(Shown):
    """The dense model's head for every head of a pruned model, and the heads that were removed.

    Example:
        >>> sliced = HeadMap(((0, 2), (1, 2)), ((), ()))
        >>> sliced.dense_heads[1][0]  # the first head of layer 1 was the dense model's second
        1
    """

    dense_heads: tuple[tuple[int, ...], ...]
    """By layer, the dense model's index of every head of the pruned model."""
    removed: tuple[tuple[int, ...], ...]
    """By layer, the heads of the pruned model whose columns of the output projection are all zero."""

    @classmethod
    def identity(cls, n_layers: int, n_heads: int, removed: Sequence[Sequence[int]] | None = None) -> HeadMap:
        """The map of a model that keeps the position of every head."""
        removed = removed if removed is not None else [()] * n_layers
        return cls((tuple(range(n_heads)),) * n_layers, tuple(map(tuple, removed)))

    def fits(self, n_layers: int, n_heads: int) -> bool:
        """Whether it is the map of a pruned model of this shape: every head once, from one dense head."""
        return len(self.dense_heads) == len(self.removed) == n_layers and all(
            len(set(heads)) == len(heads) == n_heads and min(heads) >= 0 and {*gone} <= {*range(n_heads)}
            for heads, gone in zip(self.dense_heads, self.removed, strict=True)
        )

    @property
    def is_identity(self) -> bool:
        """Whether every head keeps its position and none is removed."""
        moved = any(heads != tuple(range(len(heads))) for heads in self.dense_heads)
        return not moved and not any(self.removed)

    def without_removed(self, values: Tensor) -> Tensor:
        """A copy of ``[layer, head, ...]`` values with NaN for the heads that were removed."""
        kept = values.clone()
        for layer, heads in enumerate(self.removed):
            kept[layer, list(heads)] = math.nan
        return kept

    def to_json(self) -> dict[str, Any]:
        """The content of the file beside the weights."""
        return {"dense_heads": self.dense_heads, "removed_heads": self.removed}


@dataclass(frozen=True)
class _HeadMapFile:
    dense_heads: tuple[tuple[int, ...], ...]
    removed_heads: tuple[tuple[int, ...], ...]


def read_head_map(model_dir: Path) -> HeadMap | None:
    """Read the head map beside a model's weights; None if there is none."""
    path = model_dir / HEAD_MAP
    if not path.exists():
        return None
    fields = read_json(path, _HeadMapFile, "prune again")
    return HeadMap(fields.dense_heads, fields.removed_heads)
