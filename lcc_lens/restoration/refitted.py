"""The refitted model of a pair in a folder: made once, used again, refused if it is another pair's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.outputs.folders import recover
from lcc_lens.core.reading import read_json
from lcc_lens.models.architecture.linear_maps import find_matrices
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.loading.references import resolve
from lcc_lens.pruning.calibration.texts import calibration_length, named_calibration
from lcc_lens.pruning.jobs import refit
from lcc_lens.pruning.refit.refit import REFIT_RECORD
from lcc_lens.restoration.injections.changes import Shift
from lcc_lens.restoration.injections.weights import FixedWeights, layer_maps
from lcc_lens.restoration.record import RefitOrigin
from lcc_lens.restoration.settings import RefitRequest

logger = logging.getLogger(__name__)
REFITTED = "refit"


def pair_hashes(dense: str | Path, pruned: str | Path) -> dict[str, str]:
    """The SHA-256 of both models' weights, under the names that records give them."""
    models = {"dense": dense, "pruned": pruned}
    return {f"{name}_sha256": Checkpoint(resolve(model)).sha256 for name, model in models.items()}


def check_refitted(folder: Path, hashes: Mapping[str, str]) -> None:
    """Refuse a folder that holds the refitted model of another pair."""
    file = folder / REFIT_RECORD
    record = read_json(file, dict[str, Any], "name another run") if file.exists() else None
    if record is not None and {name: record.get(name) for name in hashes} != hashes:
        raise RequestError(f"expected a refit of this pair in {folder}, got another's; name another run")


def refitted_model(
    dense: str | Path,
    pruned: str | Path,
    folder: Path,
    request: RefitRequest | None = None,
    *,
    resume: bool = False,
) -> Path:
    """Refit the pruned model into a folder, unless that was done; gives the folder.

    Args:
        resume: refuse the refit of another request, which is replaced otherwise.

    Raises:
        RequestError: the folder holds another pair's refit, or the model cannot be refitted.
    """
    request = request or RefitRequest()
    recover(folder)
    if folder.exists():
        check_refitted(folder, pair_hashes(dense, pruned))
        length = calibration_length(resolve(pruned), request.seq_len)
        changed = _difference(folder, replace(request, seq_len=length))
        if changed is None:
            return folder
        if resume:
            raise RequestError(f"expected {changed}; repeat its settings or start without --resume")
        logger.warning("refitting again: expected %s", changed)
    refit(
        dense, pruned, folder, calibration=request.calibration, n_samples=request.n_samples, seq_len=request.seq_len,
        overwrite=True,
    )  # fmt: skip
    return folder


def refit_origin(pruned: str | Path, folder: Path) -> RefitOrigin | None:
    """What a model in a folder was refitted from, by its record; None where it is no refit of this pruned model."""
    file, sha256 = folder / REFIT_RECORD, Checkpoint(resolve(pruned)).sha256
    record = read_json(file, _Record) if file.exists() else None
    if record is None or record.pruned_sha256 != sha256:
        return None
    return RefitOrigin(str(pruned), sha256, record.calibration.data, record.calibration.sequences)


def refit_as_change(model: HookedModel, pruned: Path, folder: Path) -> FixedWeights:
    """The refitted model in a folder as a change of the pruned model's weights, on the CPU.

    Args:
        model: the hooked pruned model; ``pruned``: its directory.
    """
    before, after = (
        {matrix.name: matrix for layer in find_matrices(Checkpoint(path)) for matrix in layer}
        for path in (pruned, folder)
    )
    names = {module: Checkpoint(pruned).stored_name(f"{module}.weight") for module in layer_maps(model)}
    return FixedWeights(
        {
            module: Shift(after[name].read().float() - before[name].read().float())
            for module, name in names.items()
            if name in before
        }
    )


def _difference(folder: Path, request: RefitRequest) -> str | None:
    """What differs between a refit on disk and the request; None where it is what was asked for."""
    record = read_json(folder / REFIT_RECORD, _Record)
    names = [data if isinstance(data, str) else data.name for data in named_calibration(request.calibration)]
    made = record.calibration
    if (made.data, made.sequences, made.length) != ("+".join(names), request.n_samples, request.seq_len):
        return (
            f"a refit on {request.n_samples} sequences of {request.seq_len} tokens of {'+'.join(names)} in {folder}, "
            f"got one on {made.sequences} of {made.length} of {made.data}"
        )
    if record.sha256 not in (None, Checkpoint(folder).sha256):
        return f"the weights that the refit wrote in {folder}, got others"
    return None


@dataclass(frozen=True)
class _Calibration:
    data: str
    sequences: int
    length: int


@dataclass(frozen=True)
class _Record:
    """What is read of ``refit.json``; version 0.1.0 noted no hash of the weights."""

    calibration: _Calibration
    sha256: str | None = None
    pruned_sha256: str | None = None
