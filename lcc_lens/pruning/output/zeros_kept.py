"""Write a checkpoint with new weights at the places that pruning left, and refuse one that lost a zero."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import LensError
from lcc_lens.core.files import write_json
from lcc_lens.core.outputs.folders import atomic_directory
from lcc_lens.core.rewriting import copy_checkpoint
from lcc_lens.models.architecture.zeros import compare_zeros


def write_with_zeros(
    dense: Checkpoint,
    pruned: Checkpoint,
    out: Path,
    weights: Mapping[str, Tensor],
    record: tuple[str, Mapping[str, Any]],
    *,
    overwrite: bool,
) -> dict[str, Any]:
    """Copy the pruned checkpoint with new weights, complete or not at all.

    Args:
        weights: by name, in the checkpoint's layout.
        record: the name of a file to write beside the weights, and its contents, with both models' ``dense_sha256`` and
            ``pruned_sha256``.

    Returns:
        The record with the hash of what was written.

    Raises:
        LensError: a zero was lost or gained, or a model changed in the meantime.
    """
    file, contents = record
    with atomic_directory(out, overwrite=overwrite) as part:
        copy_checkpoint(pruned, part, replaced=weights)
        dense.require_unchanged(contents["dense_sha256"])
        pruned.require_unchanged(contents["pruned_sha256"])
        if not compare_zeros(pruned.path, part).is_equal:
            raise LensError("expected the pruned model's zeros in the new one, got others; nothing was kept")
        contents = {**contents, "sha256": Checkpoint(part).sha256}
        write_json(part / file, contents)
    return contents
