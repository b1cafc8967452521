"""Checks of data sets and roles by their names, before anything is loaded; the mix replaces missing defaults."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from lcc_lens.core.errors import RequestError
from lcc_lens.core.registry import nearest
from lcc_lens.data.registry import DATASETS, part_names, require_dataset
from lcc_lens.data.roles import Role
from lcc_lens.data.sources import available_splits
from lcc_lens.data.user_files import is_data_file, read_file

logger = logging.getLogger(__name__)
#: Replaces what a default names where that cannot be had; needs no network.
MIX = "mix"


def check_role(role: str | None) -> None:
    """Refuse what is no role of data.

    Raises:
        RequestError: names the roles, and the nearest one.
    """
    roles = get_args(Role)
    if role is not None and role not in roles:
        raise RequestError(f"expected a role ({', '.join(roles)}), got {role!r}; {nearest(role, roles)}")


def check_data(names: Iterable[str]) -> None:
    """Refuse unknown data sets, data sets without a source, and files that are not there.

    Raises:
        RequestError: names the nearest data set, or what is missing.
    """
    for name in dict.fromkeys(names):
        require_dataset(name)
        if parts := part_names(name):
            check_data(parts)
        elif is_data_file(name):
            read_file(Path(name))
        elif name in DATASETS and not DATASETS[name].is_self_written:
            available_splits(name)  # refuses a missing source now rather than after hours


def is_available(name: str) -> bool:
    """Whether data can be had."""
    try:
        check_data([name])
    except RequestError:
        return False
    return True


def or_mix(*names: str, instead: str = MIX, told: bool = True) -> tuple[str, ...]:
    """The data sets that a default names; the mix alone, with a line in the log, where one of them has no source.

    Args:
        names: what the default names.
        instead: what replaces them, in place of the mix.
        told: whether the log says so.
    """
    missing = tuple(name for name in names if not is_available(name))
    if not missing:
        return names
    if told:
        _tell(missing, instead)
    return (instead,)


@functools.cache
def _tell(missing: tuple[str, ...], instead: str) -> None:
    parts = f" ({', '.join(part_names(instead))})" if part_names(instead) else ""
    logger.warning(
        "no source of %s here: taking %s%s instead; set LCC_LENS_DATA, or let the hub be reached, for others",
        ", ".join(missing), instead, parts,
    )  # fmt: skip
