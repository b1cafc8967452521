"""One fingerprint: the same request gives the same hash, anything else another one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lcc_lens.core.fingerprint import fingerprint


@dataclass(frozen=True)
class Settings:
    rank: int
    names: tuple[str, ...] = ("z",)


def test_order_counts_in_sequences_alone() -> None:
    assert fingerprint({"a": 1, "b": {2, 3}}) == fingerprint({"b": {3, 2}, "a": 1})
    assert fingerprint(1, 2) != fingerprint(2, 1)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, "1"),
        (None, "None"),
        (True, 1),
        ([1, [2]], [1, 2]),
        (Settings(1), Settings(2)),
        (Path("a/b"), Path("a/c")),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0 + 2**-23])),
    ],
)
def test_what_differs_at_all_differs(first: object, second: object) -> None:
    assert fingerprint(first) != fingerprint(second)


def test_what_is_equal_agrees() -> None:
    assert fingerprint(Settings(1)) == fingerprint({"rank": 1, "names": ["z"]})
    assert fingerprint(torch.arange(6.0).reshape(2, 3).T) == fingerprint(torch.tensor([[0.0, 3], [1, 4], [2, 5]]))
    assert fingerprint(torch.ones(2, dtype=torch.bfloat16)) == fingerprint(torch.ones(2, dtype=torch.bfloat16))
