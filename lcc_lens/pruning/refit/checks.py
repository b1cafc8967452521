"""Check before a refit, from files alone, that two models are a dense one and its zeroed version."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.side_files import side_files
from lcc_lens.models.architecture.linear_maps import Matrix, find_matrices
from lcc_lens.models.architecture.whole_weights import require_complete
from lcc_lens.models.architecture.zeros import refuse_swapped
from lcc_lens.models.loading.provenance import check_provenance


def require_refittable(
    dense: Path, pruned: Path, instead: str | None = None
) -> tuple[list[list[Matrix]], list[list[Matrix]]]:
    """The matrices of both models, which are refused unless they are a dense model and its zeroed version.

    Args:
        instead: what serves models that have no such matrices, for the message.

    Raises:
        RequestError: incomplete files, other shapes (a sliced model's), another pair's models, or the two swapped.
    """
    refuse_swapped(dense, pruned)
    checkpoints = require_complete(Checkpoint(dense)), require_complete(Checkpoint(pruned))
    side_files(pruned)
    try:
        _check_shapes(*(plans := (find_matrices(checkpoints[0]), find_matrices(checkpoints[1]))))
    except RequestError as error:
        if instead is None:
            raise
        raise RequestError(f"{error}; or {instead}") from error
    check_provenance(*checkpoints)
    return plans


def _check_shapes(dense: Sequence[Sequence[Matrix]], pruned: Sequence[Sequence[Matrix]]) -> None:
    dense_shapes, pruned_shapes = (
        [[(matrix.name, matrix.d_in, matrix.d_out) for matrix in layer] for layer in plan] for plan in (dense, pruned)
    )
    if dense_shapes != pruned_shapes:
        raise RequestError(
            "expected a dense model and the same model with zeros, got matrices of other names or sizes; a sliced "
            "model cannot be refitted"
        )
