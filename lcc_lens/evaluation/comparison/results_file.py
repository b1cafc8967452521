"""The file that keeps a comparison's cells, which several processes may fill at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lcc_lens.core.config import package_version
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import locked, read_json, write_json
from lcc_lens.evaluation.comparison.config import CompareConfig

Finish = Callable[[dict[str, Any]], None]
#: What a call of its own says.
_GIVEN = ("identity", "settings", "version")


class ComparisonFile:
    """Cells and bare models in one JSON file; what other processes wrote meanwhile is taken in with every writing.

    Args:
        path: the file.
        run: the comparison's folder, for the lock.
        identity: hashes of both models.
        config: what all cells share.
        order: names of the cells asked for, in their order; those of earlier calls stand before them.

    Raises:
        RequestError: the file holds another comparison.
    """

    def __init__(
        self, path: Path, run: Path, identity: dict[str, str], config: CompareConfig, order: Sequence[str]
    ) -> None:
        self.path, self._run, self._order = path, run, tuple(order)
        self.found = _begun(path, identity, config)

    def keep(self, *, cell: str | None = None, own: Sequence[str] = (), finish: Finish | None = None) -> None:
        """Write everything, with what other processes wrote; only what is named here is this process's to say.

        Args:
            cell: the cell that was just computed.
            own: other entries of the file that were.
            finish: called with the whole just before it is written.
        """
        with locked(self._run, "comparison"):
            self._take_in(cell, own)
            if finish is not None:
                finish(self.found)
            write_json(self.path, self.found)

    def refresh(self) -> None:
        """Take in what other processes wrote."""
        with locked(self._run, "comparison"):
            self._take_in(None, ())

    def _take_in(self, cell: str | None, own: Sequence[str]) -> None:
        theirs: dict[str, Any] = read_json(self.path) if self.path.exists() else {}
        computed = {} if cell is None else {cell: self.found["cells"][cell]}
        cells = {**self.found["cells"], **theirs.get("cells", {}), **computed}
        asked = set(self._order)
        names = [name for name in cells if name not in asked] + [name for name in self._order if name in cells]
        kept = {"cells", *_GIVEN, *own}
        self.found |= {name: value for name, value in theirs.items() if name not in kept}
        self.found["cells"] = {name: cells[name] for name in names}


def _begun(path: Path, identity: dict[str, str], config: CompareConfig) -> dict[str, Any]:
    """What the file holds already, if it is of this comparison."""
    settings = json.loads(json.dumps(asdict(config)))  # as the file holds them
    found: dict[str, Any] = read_json(path) if path.exists() else {"cells": {}}
    if "settings" in found:
        _grow(found, settings)
    for name, value in (("identity", identity), ("settings", settings)):
        if found.setdefault(name, value) != value:
            raise RequestError(
                f"expected a comparison of the same models and settings in {path}, got another; name another run"
            )
    found.setdefault("bare", {})
    found["version"] = package_version()
    return found


def _grow(found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Bring what may be measured afterwards in line: more tasks, and how often inference is timed.

    Not by the task that is trained on: with it, other examples choose the best numbers.
    """
    kept = found["settings"]
    if (kept["data"] in kept["tasks"]) != (settings["data"] in settings["tasks"]):
        return
    kept["speed_rounds"] = settings["speed_rounds"]
    if not settings["tasks"]:
        settings |= {"tasks": kept["tasks"], "limit": kept["limit"]}
    elif not kept["tasks"]:
        kept["limit"] = settings["limit"]
    kept["tasks"] = settings["tasks"] = list(dict.fromkeys([*kept["tasks"], *settings["tasks"]]))
