"""The records of a data set or file that serve a role, with what they read as."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import torch

from lcc_lens.core.errors import RequestError
from lcc_lens.data.checks import check_role
from lcc_lens.data.negatives import distinct_wrongs
from lcc_lens.data.prompts import Example, Item, Kind, Record
from lcc_lens.data.registry import DATASETS, part_names, require_dataset
from lcc_lens.data.roles import Role, digest, in_role
from lcc_lens.data.sources import available_splits, choose_split, read_named
from lcc_lens.data.user_files import is_data_file, read_file

logger = logging.getLogger(__name__)

Pairs = list[tuple[Record, Item | Example]]
#: A group that two data sets put into different roles serves the first of these.
_PRECEDENCE: tuple[Role, ...] = ("held-out", "calibration", "probe", "train")


class EmptyRole(RequestError):
    """Data of which no example falls to a role."""


def draw(name: str, n: int | None, role: Role | None, seed: int) -> tuple[Kind, Pairs, str]:
    """The kind of a data set or file, the drawn records with their examples, and where they came from."""
    check_role(role)
    require_dataset(name)
    if is_data_file(name):
        kind, pairs, source = read_file(Path(name))
        pairs = [pair for pair in pairs if role is None or in_role(pair[1], role, has_held_out=False)]
    else:
        kind, pairs, source = _read_named(name, role)
    pairs = _with_a_wrong_answer(pairs, source)
    if role is not None and not pairs:
        raise EmptyRole(
            f"expected examples for the role {role} in {source}, got none: its examples (of a .txt, its "
            "paragraphs) are divided among the roles by their text; add more"
        )
    if n is not None:
        pairs = [pairs[i] for i in drawn_order(len(pairs), seed)[:n]]
    if not pairs:
        raise RequestError(f"expected examples in {source}, got none; add some")
    return kind, pairs, source


def reserved_groups(names: Iterable[str], role: Role) -> frozenset[str]:
    """Short hashes of the groups that data which are joined put into a role that goes before this one.

    Each data set divides its own groups among the roles; two sets may hold the same one (a question of ARC's easy set
    that is tested in the challenge set), so a pool leaves out what another role of any of its parts has.
    """
    first = _PRECEDENCE[: _PRECEDENCE.index(role)]
    return frozenset(digest(group) for name in names for group, own in _roles_of_groups(name) if own in first)


def leaves(name: str) -> tuple[str, ...]:
    """The data sets and files that a name joins, through all its parts, which are read from somewhere.

    Example:
        >>> leaves("c4+self")
        ('c4',)
    """
    if parts := part_names(name):
        return tuple(dict.fromkeys(leaf for part in parts for leaf in leaves(part)))
    return () if name in DATASETS and DATASETS[name].is_self_written else (name,)


def _roles_of_groups(name: str) -> Iterable[tuple[str, Role]]:
    """Every group of a data set or file with its role."""
    if is_data_file(name):
        pairs, has_own = read_file(Path(name))[1], False
    else:
        dataset, splits = DATASETS[name], available_splits(name)
        split, has_own = choose_split(dataset, splits, None)
        pairs = read_named(name, split)[0]
        if has_own:
            for _, read in read_named(name, choose_split(dataset, splits, "held-out")[0])[0]:
                yield read.group, "held-out"
    for _, read in pairs:
        yield from ((read.group, role) for role in get_args(Role) if in_role(read, role, has_held_out=has_own))


def _read_named(name: str, role: Role | None) -> tuple[Kind, Pairs, str]:
    dataset, splits = DATASETS[name], available_splits(name)
    split, has_own = choose_split(dataset, splits, role)
    pairs, origin = read_named(name, split)
    if role is not None and not (role == "held-out" and has_own):
        pairs = [pair for pair in pairs if in_role(pair[1], role, has_held_out=has_own)]
        if has_own:  # splits may share a passage
            held_out = {read.group for _, read in read_named(name, choose_split(dataset, splits, "held-out")[0])[0]}
            pairs = [pair for pair in pairs if pair[1].group not in held_out]
    return dataset.kind, pairs, origin


def _with_a_wrong_answer(pairs: Pairs, source: str) -> Pairs:
    """Leave out questions whose wrong answers all equal the right one."""
    kept = [(record, read) for record, read in pairs if isinstance(read, Example) or distinct_wrongs(read)]
    if len(kept) < len(pairs):
        n_equal = len(pairs) - len(kept)
        if not kept:
            raise RequestError(
                f"expected wrong answers that differ from the right ones in {source}, got none in {n_equal} questions; "
                "correct the answers"
            )
        logger.warning("skipped %d of %d questions whose wrong answers equal the right one", n_equal, len(pairs))
    return kept


def drawn_order(n: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
