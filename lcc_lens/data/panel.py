"""The panel of domains on which recovery is measured: one data set for each kind of text."""

from __future__ import annotations

import functools
import logging

from lcc_lens.core import hub
from lcc_lens.data.checks import is_available
from lcc_lens.data.registry import domains
from lcc_lens.data.sources import local_splits

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


def other_domains(name: str) -> tuple[str, ...]:
    """The data sets of the panel whose domain some data do not hold; the whole panel where there are none."""
    available = available_panel()
    return tuple(other for other in available if not domains(other) & domains(name)) or available


@functools.cache
def _tell_of_missing(missing: tuple[str, ...]) -> None:
    logger.info("no source of %s here: left out of the panel of domains", ", ".join(missing))
