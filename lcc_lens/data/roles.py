"""Roles of data: a hash of each example's group decides its role, so that two roles never share a group."""

from __future__ import annotations

import hashlib
from typing import Literal

from lcc_lens.core.errors import RequestError
from lcc_lens.data.prompts import Example, Item

Role = Literal["calibration", "probe", "train", "held-out"]
#: Each role's range of the group's hash in per cent, for data sets with a held-out split and without.
_HASH_RANGES: dict[bool, dict[Role, tuple[int, int]]] = {
    True: {"calibration": (0, 25), "probe": (25, 50), "train": (50, 100)},
    False: {"calibration": (0, 15), "probe": (15, 30), "train": (30, 80), "held-out": (80, 100)},
}


def in_role(example: Item | Example, role: Role, *, has_held_out: bool) -> bool:
    """Whether an example serves a role, as the hash of its group says."""
    low, high = _HASH_RANGES[has_held_out].get(role, (0, 0))
    return low <= int(digest(example.group), 16) % 100 < high


def digest(group: str) -> str:
    """A short hash of a group."""
    return hashlib.sha256(group.encode()).hexdigest()[:16]


def check_disjoint(first: frozenset[str], second: frozenset[str], first_name: str, second_name: str) -> None:
    """Refuse two sets of groups (see :attr:`Data.groups`) that overlap."""
    shared = len(first & second)
    if shared:
        raise RequestError(
            f"expected {first_name} and {second_name} without a shared sequence, got {shared} in both; "
            "load them with different roles"
        )
