"""Divide data, and refuse data that overlap."""

from __future__ import annotations

from dataclasses import replace

from lcc_lens.data.datasets import Data
from lcc_lens.data.roles import check_disjoint


def assert_disjoint(*parts: Data) -> None:
    """Refuse data of two roles that share a group.

    Raises:
        RequestError: names the two roles and how many groups they share.
    """
    for i, first in enumerate(parts):
        for second in parts[i + 1 :]:
            check_disjoint(
                first.groups, second.groups, f"{first.role or 'first'} data", f"{second.role or 'second'} data"
            )


def split_examples(data: Data, n_first: int) -> tuple[Data, Data]:
    """The first ``n_first`` examples, and the others that share no group with them."""
    first = data.examples[:n_first]
    groups = {example.group for example in first}
    rest = tuple(example for example in data.examples if example.group not in groups)
    return replace(data, examples=first), replace(data, examples=rest)
