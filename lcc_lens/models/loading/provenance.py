"""What a pruned model was made from, as the records beside its weights say, and whether a dense model is that one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.reading import read_json

#: Records beside weights, of what they were calibrated on and made from: there the first that exists counts.
RECORDS = ("pruning.json", "refit.json", "reconstruction.json")


@dataclass(frozen=True)
class _Record:
    """What of a record counts here; earlier versions wrote no ancestors."""

    dense_sha256: str = ""
    dense_ancestors: tuple[str, ...] = ()
    pattern: str | None = None


def ancestors(path: Path) -> tuple[str, ...]:
    """The SHA-256 of the models that a pruned one was made from, the nearest first; empty without a record."""
    for name in RECORDS:
        if (path / name).exists():
            record = read_json(path / name, _Record, "prune again")
            return tuple(digest for digest in (record.dense_sha256, *record.dense_ancestors) if digest)
    return ()


def pruned_to(path: Path) -> str | None:
    """The pattern that a model was pruned to, as its record says; None without a record of pruning."""
    file = path / RECORDS[0]
    return read_json(file, _Record, "prune again").pattern if file.exists() else None


def check_provenance(dense: Checkpoint, pruned: Checkpoint) -> None:
    """Refuse a dense model that the pruned one was not made from, where its records tell, and the two swapped.

    Raises:
        RequestError: names the records and what was given.
    """
    if dense.sha256 == pruned.sha256:  # a model against itself
        return
    made_from = ancestors(pruned.path)
    if pruned.sha256 in ancestors(dense.path):
        raise RequestError(
            f"expected the dense model first, got {dense.path}, which was made from {pruned.path}; swap the two"
        )
    if made_from and dense.sha256 not in made_from:
        raise RequestError(
            f"expected the dense model that {pruned.path} was made from (SHA-256 {made_from[0][:12]}…, as its record "
            f"says), got {dense.sha256[:12]}… in {dense.path}; name that one"
        )
