"""Checks of data sets and roles by their names, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from lcc_lens.core.errors import RequestError
from lcc_lens.core.registry import nearest
from lcc_lens.data.registry import DATASETS, require_dataset
from lcc_lens.data.sources import Role, available_splits
from lcc_lens.data.user_files import is_data_file, read_file


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
        if is_data_file(name):
            read_file(Path(name))
        if name in DATASETS:
            available_splits(name)  # refuses a missing source now rather than after hours
