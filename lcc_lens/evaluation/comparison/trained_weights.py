"""What the cells of a comparison trained, kept so that more can be measured of them later without training again."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lcc_lens.core.config import package_version
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_json, read_tensors, write_json, write_tensors
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.heads import Head
from lcc_lens.restoration.injections.base import Injection

logger = logging.getLogger(__name__)


class ChosenHeads(NamedTuple):
    """Heads that were found by training, and how many seconds that took."""

    heads: list[Head]
    seconds: float


class TrainedWeights:
    """A folder with a safetensors file per cell: the trained numbers, and what training them took.

    Where a first stage chooses heads by training, a JSON file holds its choice.

    Args:
        folder: the folder; made when something is kept.
        settings: what the trainings of all cells depend on.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder, self._settings = folder, {**settings, "version": package_version()}

    def load(self, injection: Injection, entry: str, seed: int, request: Sequence[Any]) -> dict[str, Any] | None:
        """Put the kept numbers into a freshly built injection; None where there are none of this very training.

        Args:
            injection: as built for the cell, on any device.
            entry: the cell's entry.
            seed: its seed.
            request: what else the training depends on: models, learning rates.

        Returns:
            What :meth:`keep` was given as ``costs``.
        """
        path = self._path(entry, seed)
        if not path.exists():
            return None
        try:
            tensors, metadata = read_tensors(path)
        except RequestError as error:
            logger.warning("%s; trained anew", error)
            return None
        if metadata.get("request") != self._asked(request):
            return None
        with torch.no_grad():
            for name, number in _trained(injection).items():
                number.copy_(tensors[name])
        costs: dict[str, Any] = json.loads(metadata["costs"])
        return costs

    def keep(
        self, injection: Injection, entry: str, seed: int, request: Sequence[Any], costs: Mapping[str, Any]
    ) -> None:
        """Write what a cell trained; the arguments are those of :meth:`load`."""
        metadata = {"request": self._asked(request), "costs": json.dumps(costs)}
        self._folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self._path(entry, seed), _trained(injection), metadata)

    def heads(self, entry: str, seed: int, request: Sequence[Any], choose: Callable[[], Sequence[Head]]) -> ChosenHeads:
        """What a first stage chose; it is run where nothing of this very training is kept.

        Args:
            entry: the cell's entry, less what the first stage does not depend on.
            seed: its seed.
            request: what else the choice depends on.
            choose: the first stage.
        """
        path, asked = self._path(entry, seed).with_suffix(".json"), self._asked(request)
        try:
            found = read_json(path) if path.exists() else {}
            if found and found["request"] == asked:
                return ChosenHeads([Head.parse(label) for label in found["heads"]], found["seconds"])
        except (RequestError, LookupError, TypeError) as error:
            logger.warning("the heads in %s cannot be read (%s); chosen anew", path, error)
        start = time.perf_counter()
        chosen = ChosenHeads(list(choose()), time.perf_counter() - start)
        self._folder.mkdir(parents=True, exist_ok=True)
        labels = [str(head) for head in chosen.heads]
        write_json(path, {"request": asked, "heads": labels, "seconds": chosen.seconds})
        return chosen

    def _path(self, entry: str, seed: int) -> Path:
        return self._folder / f"{re.sub(r'[^a-z0-9.=@+-]+', '_', entry.lower())}_{seed}.safetensors"

    def _asked(self, request: Sequence[Any]) -> str:
        return fingerprint(request, self._settings)


def _trained(injection: Injection) -> dict[str, torch.Tensor]:
    return {name: number for name, number in injection.named_parameters() if number.requires_grad}
