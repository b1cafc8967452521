"""Where a model that a run recorded lies now: runs and models may be moved together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.models.loading.references import resolve

#: How many folders above a run are searched for its models.
_FOLDERS_ABOVE = 2


def recorded_model(reference: str, sha256: str, run: str | Path) -> str | Path:
    """A recorded model's reference, or the folder that holds the same weights beside the run.

    First the reference as it was recorded; then, in the run and the folders above it, paths that end like the
    reference (``wanda50``, ``out/wanda50``, ...); then every folder beside the run. The hash of the weights decides.

    Args:
        reference: what was recorded.
        sha256: the hash of its weights; empty where it was not recorded, which any weights fit.
        run: the run directory that recorded it.

    Raises:
        RequestError: no such weights were found.
    """
    if _holds(reference, sha256):
        return reference
    for folder in _candidates(Path(reference), Path(run).resolve()):
        if _holds(folder, sha256):
            return folder
    raise RequestError(
        f"expected the model {reference} (SHA-256 {sha256[:12]}…) where {run} recorded it or beside the run, got none "
        "with these weights; name its folder"
    )


def _holds(reference: str | Path, sha256: str) -> bool:
    try:
        return not sha256 or Checkpoint(resolve(reference)).sha256 == sha256
    except RequestError:
        return False


def _candidates(reference: Path, run: Path) -> Iterator[Path]:
    folders = [run, *run.parents[:_FOLDERS_ABOVE]]
    endings = [Path(*reference.parts[place:]) for place in range(len(reference.parts)) if place or not reference.root]
    seen = {path for folder in folders for ending in endings if (path := folder / ending / "config.json").is_file()}
    yield from (path.parent for path in sorted(seen))
    for folder in folders:
        for pattern in ("*/model*.safetensors", "*/*/model*.safetensors"):
            yield from sorted({path.parent for path in folder.glob(pattern)} - {path.parent for path in seen})
