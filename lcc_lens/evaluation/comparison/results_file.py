"""The JSON file with the results of a comparison's runs, which several processes may write at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lcc_lens.core.config import package_version
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import locked
from lcc_lens.core.reading import convert, read_record, write_record
from lcc_lens.evaluation.comparison.config import CompareConfig

Finish = Callable[[dict[str, Any]], None]
#: Entries that every call states itself.
_STATED = ("identity", "settings", "version")
_AGAIN = "name another run"


class ComparisonFile:
    """Results of runs and of the unrestored models in one JSON file; every write merges in other processes' results.

    Args:
        path: the file.
        run: the comparison's folder, for the lock.
        identity: hashes of both models.
        config: what all runs share.
        order: names of this call's runs in their order; runs of earlier calls stand before them.

    Raises:
        RequestError: the file holds another comparison.
    """

    def __init__(
        self, path: Path, run: Path, identity: dict[str, str], config: CompareConfig, order: Sequence[str]
    ) -> None:
        self.path, self._run, self._order = path, run, tuple(order)
        self.results = _begun(path, identity, config)

    def keep(self, *, new_run: str | None = None, own: Sequence[str] = (), finish: Finish | None = None) -> None:
        """Write all results; the file's values replace ours except those named here.

        Args:
            own: other entries of the file that were just computed.
            finish: called with the results just before they are written.
        """
        with locked(self._run, "comparison"):
            self._merge(new_run, own)
            if finish is not None:
                finish(self.results)
            write_record(self.path, self.results)

    def refresh(self) -> None:
        """Read what other processes wrote."""
        with locked(self._run, "comparison"):
            self._merge(None, ())

    def _merge(self, new_run: str | None, own: Sequence[str]) -> None:
        theirs = read_comparison(self.path) if self.path.exists() else {}
        computed = {} if new_run is None else {new_run: self.results["cells"][new_run]}
        runs = {**self.results["cells"], **theirs.get("cells", {}), **computed}
        requested = set(self._order)
        names = [name for name in runs if name not in requested] + [name for name in self._order if name in runs]
        ours = {"cells", *_STATED, *own}
        self.results |= {name: value for name, value in theirs.items() if name not in ours}
        self.results["cells"] = {name: runs[name] for name in names}


@dataclass(frozen=True)
class _Text:
    perplexity: float
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Cell:
    """What is read of a run's results, or of an unrestored model's."""

    perplexity: float | None = None
    kl: float | None = None
    response_loss: float | None = None
    texts: dict[str, _Text] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class _Layout:
    """What is read of a comparison's file."""

    cells: dict[str, _Cell]
    bare: dict[str, _Cell] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, str] = field(default_factory=dict)
    inference: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_comparison(path: Path) -> dict[str, Any]:
    """The content of a comparison's file.

    Raises:
        RequestError: it has another layout, or was changed.
    """
    results = read_record(path, dict[str, Any], _AGAIN)
    convert(results, _Layout, str(path), _AGAIN)
    return results


def _begun(path: Path, identity: dict[str, str], config: CompareConfig) -> dict[str, Any]:
    """The results in the file, if any; refuses those of another comparison."""
    settings = json.loads(json.dumps(asdict(config)))  # lists for tuples, as in the file
    results = read_comparison(path) if path.exists() else {"cells": {}}
    if "settings" in results:
        _extend(results, settings)
    for name, value in (("identity", identity), ("settings", settings)):
        if results.setdefault(name, value) != value:
            raise RequestError(
                f"expected a comparison of the same models and settings in {path}, got another; name another run"
            )
    results.setdefault("bare", {})
    results["version"] = package_version()
    return results


def _extend(results: dict[str, Any], settings: dict[str, Any]) -> None:
    """Align the settings that may change later: more tasks, and the rounds in which inference is timed.

    The task that is trained on may not be added: with it, other examples choose the best parameters.
    """
    before = results["settings"]
    if (before["data"] in before["tasks"]) != (settings["data"] in settings["tasks"]):
        return
    before["speed_rounds"] = settings["speed_rounds"]
    if settings["heads"] >= 1 and before["heads"] >= 1:  # of all heads no selector chooses
        before["selector"] = settings["selector"]
    if not settings["tasks"]:
        settings |= {"tasks": before["tasks"], "limit": before["limit"]}
    elif not before["tasks"]:
        before["limit"] = settings["limit"]
    before["tasks"] = settings["tasks"] = list(dict.fromkeys([*before["tasks"], *settings["tasks"]]))
