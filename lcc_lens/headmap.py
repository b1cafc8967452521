"""Which head of a pruned model is which head of the dense one, after whole heads were removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcc_lens.errors import RequestError
from lcc_lens.files import read_json

#: The file beside a structured-pruned model's weights.
HEAD_MAP = "head_map.json"


@dataclass(frozen=True)
class HeadMap:
    """Pruned heads and what they were.

    Example:
        >>> sliced = HeadMap(((0, 2), (1, 2)), ((), ()))
        >>> sliced.dense_heads[1][0]  # the first head that layer 1 still has was the dense model's second
        1
    """

    dense_heads: tuple[tuple[int, ...], ...]
    """By layer, for every head of the pruned model, the dense model's head."""
    removed: tuple[tuple[int, ...], ...]
    """By layer, the heads of the pruned model that are there in shape only: their output goes nowhere."""

    @classmethod
    def identity(cls, n_layers: int, n_heads: int, removed: Sequence[Sequence[int]] | None = None) -> HeadMap:
        """Every head is where it was."""
        gone = removed if removed is not None else [()] * n_layers
        return cls((tuple(range(n_heads)),) * n_layers, tuple(tuple(heads) for heads in gone))

    @property
    def is_identity(self) -> bool:
        """Whether every head is where it was and all are alive."""
        moved = any(heads != tuple(range(len(heads))) for heads in self.dense_heads)
        return not moved and not any(self.removed)

    def to_json(self) -> dict[str, Any]:
        """As it lies beside the weights."""
        return {"dense_heads": self.dense_heads, "removed_heads": self.removed}


def read_head_map(model_dir: Path) -> HeadMap | None:
    """The head map beside a model's weights, if there is one.

    Raises:
        RequestError: the file holds something else.
    """
    path = model_dir / HEAD_MAP
    if not path.exists():
        return None
    fields = read_json(path)
    try:
        dense_heads, removed = (
            tuple(tuple(int(head) for head in heads) for heads in fields[name])
            for name in ("dense_heads", "removed_heads")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"wanted a head map in {path}, got another layout ({error!r}); prune again") from error
    if len(dense_heads) != len(removed):
        raise RequestError(f"wanted a head map of as many layers in both parts of {path}, got another; prune again")
    return HeadMap(dense_heads, removed)
