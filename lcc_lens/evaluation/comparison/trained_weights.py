"""Trained parameters of a comparison's runs on disk, so that more can be measured later without training again."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lcc_lens.core.config import package_version
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_sealed, write_sealed
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.heads import Head
from lcc_lens.core.reading import convert, parse_json, read_record, reading, write_record
from lcc_lens.restoration.injections.base import Injection

logger = logging.getLogger(__name__)


class ChosenHeads(NamedTuple):
    """Heads that a training chose, and the seconds it took."""

    heads: list[Head]
    seconds: float


@dataclass(frozen=True)
class _KeptHeads:
    request: str
    heads: list[str]
    seconds: float


class TrainedWeights:
    """A folder with a safetensors file per run: the trained parameters and the costs of training them.

    If a first stage chooses heads by training, a JSON file holds its choice.

    Args:
        folder: created at the first write.
        settings: all other settings that a training depends on.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder, self._settings = folder, {**settings, "version": package_version()}

    def load(self, injection: Injection, entry: str, seed: int, request: Sequence[Any]) -> dict[str, Any] | None:
        """Load stored parameters into a newly built injection; None if there are none of the same training.

        Args:
            injection: as built for the run, on any device.
            request: what else the training depends on: models, learning rates.

        Returns:
            The ``costs`` passed to :meth:`keep`.
        """
        path = self._path(entry, seed)
        if not path.exists():
            return None
        try:
            tensors, metadata = read_sealed(path)
            if metadata.get("request") != self._request(request):
                return None
            costs = convert(parse_json(metadata.get("costs", ""), str(path), finite=True), dict[str, Any], str(path))
            with reading(path), torch.no_grad():
                for name, parameter in _trained(injection).items():
                    parameter.copy_(tensors[name])
        except RequestError as error:
            logger.warning("%s; training again", error)
            return None
        return costs

    def keep(
        self, injection: Injection, entry: str, seed: int, request: Sequence[Any], costs: Mapping[str, Any]
    ) -> None:
        """Write the trained parameters of a run; the arguments are those of :meth:`load`."""
        metadata = {"request": self._request(request), "costs": json.dumps(costs)}
        self._folder.mkdir(parents=True, exist_ok=True)
        write_sealed(self._path(entry, seed), _trained(injection), metadata)

    def heads(self, entry: str, seed: int, request: Sequence[Any], choose: Callable[[], Sequence[Head]]) -> ChosenHeads:
        """The heads that a first stage chooses; it runs only if no choice of the same training is stored.

        Args:
            entry: the run's entry, without the parts that the first stage does not depend on.
        """
        path, key = self._path(entry, seed).with_suffix(".json"), self._request(request)
        try:
            kept = read_record(path, _KeptHeads) if path.exists() else None
            if kept is not None and kept.request == key:
                return ChosenHeads([Head.parse(label) for label in kept.heads], kept.seconds)
        except RequestError as error:
            logger.warning("could not read the heads in %s (%s); choosing again", path, error)
        start = time.perf_counter()
        chosen = ChosenHeads(list(choose()), time.perf_counter() - start)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_record(path, asdict(_KeptHeads(key, [str(head) for head in chosen.heads], chosen.seconds)))
        return chosen

    def _path(self, entry: str, seed: int) -> Path:
        return self._folder / f"{re.sub(r'[^a-z0-9.=@+-]+', '_', entry.lower())}_{seed}.safetensors"

    def _request(self, request: Sequence[Any]) -> str:
        return fingerprint(request, self._settings)


def _trained(injection: Injection) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in injection.named_parameters() if parameter.requires_grad}
