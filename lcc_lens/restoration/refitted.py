"""The refitted model of a pair in a folder: made once, used again, refused if it is another pair's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.reading import read_json
from lcc_lens.models.loading.references import resolve
from lcc_lens.pruning.jobs import refit
from lcc_lens.pruning.refit.refit import REFIT_RECORD
from lcc_lens.restoration.settings import RefitRequest

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


def refitted_model(dense: str | Path, pruned: str | Path, folder: Path, request: RefitRequest | None = None) -> Path:
    """Refit the pruned model into a folder, unless that was done; gives the folder.

    Raises:
        RequestError: the folder holds another pair's, or the model cannot be refitted.
    """
    if folder.exists():
        check_refitted(folder, pair_hashes(dense, pruned))
        return folder
    request = request or RefitRequest()
    refit(dense, pruned, folder, calibration=request.calibration, n_samples=request.n_samples, seq_len=request.seq_len)
    return folder
