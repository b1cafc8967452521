"""The panel of domains on which recovery is measured: one data set for each kind of text."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from pathlib import Path

from lcc_lens.core import hub
from lcc_lens.core.errors import RequestError
from lcc_lens.data.checks import is_available
from lcc_lens.data.registry import DATASETS, domains, part_names
from lcc_lens.data.sources import local_splits
from lcc_lens.data.user_files import is_data_file

logger = logging.getLogger(__name__)
PANEL = ("wikitext", "c4", "wikipedia", "howto", "science", "alpaca", "python")


def available_panel() -> tuple[str, ...]:
    """The data sets of the panel that have a source; the others are named in the log.

    A run whose models and data are local contacts no network, so the hub counts only where it was reached already.
    """
    available = tuple(name for name in PANEL if local_splits(name) or (hub.is_in_use() and is_available(name)))
    if missing := tuple(name for name in PANEL if name not in available):
        _tell_of_missing(missing)
    return available


def panel_labels(texts: Iterable[str]) -> dict[str, str]:
    """What tables call each text of a panel: a data set by its name, a file by its own, without the folder.

    Raises:
        RequestError: two texts would be called the same.

    Example:
        >>> panel_labels(["python", "texts/notes.txt"])
        {'python': 'python', 'texts/notes.txt': 'notes'}
    """
    labels: dict[str, str] = {}
    for name in texts:
        label = _label(name)
        if label in labels.values():
            raise RequestError(f"expected texts of different names, got {label} twice; rename one or leave it out")
        labels[name] = label
    return labels


def _label(name: str) -> str:
    """A file that has the name of a data set keeps its ending, so that nobody takes it for that."""
    if name not in DATASETS and (parts := part_names(name)):
        return "+".join(map(_label, parts))
    path = Path(name)
    if not is_data_file(name):
        return name
    return path.name if path.stem in DATASETS else path.stem


def other_domains(name: str) -> tuple[str, ...]:
    """The data sets of the panel whose domain some data do not hold; the whole panel where there are none."""
    available = available_panel()
    return tuple(other for other in available if not domains(other) & domains(name)) or available


@functools.cache
def _tell_of_missing(missing: tuple[str, ...]) -> None:
    logger.info("no source of %s here: left out of the panel of domains", ", ".join(missing))
