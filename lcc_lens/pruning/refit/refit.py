"""Masked refit: the surviving weights of every linear map, fitted anew to what the dense model computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.config import package_version
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import atomic_directory, read_json, require_free, require_space, write_json
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.progress import track
from lcc_lens.core.rewriting import copy_checkpoint
from lcc_lens.models.architecture.linear_maps import Matrix, StoredWeights, find_matrices
from lcc_lens.models.architecture.zeros import compare_zeros
from lcc_lens.pruning.calibration.finished_layers import FinishedLayers
from lcc_lens.pruning.calibration.stream import LayerStream
from lcc_lens.pruning.methods.moments import InputMoments, exact_products
from lcc_lens.pruning.methods.obs import output_error
from lcc_lens.pruning.methods.pruners import Removed
from lcc_lens.pruning.refit.dense_stream import Guide
from lcc_lens.pruning.refit.least_squares import NormalEquations, masked_least_squares
from lcc_lens.pruning.refit.residual_correction import Shortfall, Written, outputs_to_mend

REFIT_RECORD = "refit.json"
#: Beside the finished layers of a run that is not through.
_ERRORS = "errors.json"


@dataclass(frozen=True)
class RefitConfig:
    """How to refit.

    Args:
        follow: fit each map to what the dense weights give on inputs so far along the way from those that it sees now
            (0: every map by itself) to the dense model's own, which no pruning has touched (1: its outputs): then later
            maps also make up for earlier ones' errors.
        ridge: pull towards the dense weights, as a share of the inputs' mean square.
        mend: the share of what the residual stream lacks already that the maps which write to it make up for, upon
            giving the dense maps' own outputs (:class:`~lcc_lens.pruning.refit.residual_correction.Shortfall`); 0
            leaves it. Only where
            layers add to the stream what their output maps give; elsewhere all maps follow as ``follow`` says.
        batch_size: sequences per forward pass.
    """

    follow: float = 0.5
    ridge: float = 0.03
    mend: float = 0.75
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.ridge < float("inf"):
            raise RequestError(f"expected a ridge above 0, got {self.ridge}")
        for name, share in (("follow", self.follow), ("mend", self.mend)):
            if not 0 <= share <= 1:
                raise RequestError(f"expected a share to {name} between 0 and 1, got {share}")
        if self.batch_size < 1:
            raise RequestError(f"expected a batch size of at least 1, got {self.batch_size}")


def refit_checkpoint(
    dense: Path,
    pruned: Path,
    out: Path,
    *,
    tokens: Int[Tensor, "sequence pos"],
    config: RefitConfig | None = None,
    device: torch.device,
    dtype: torch.dtype,
    overwrite: bool = False,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    r"""Fit the surviving weights of a pruned checkpoint by least squares and write the result; no training.

    Layer by layer, and within a layer in the order in which maps read each other's results: for every row of a map,
    $\min_w \lVert X w - y \rVert^2 + \lambda \lVert w - w_{dense} \rVert^2$ over the weights that pruning left,
    with $X$ the map's inputs behind all that is refitted already. Zeros stay zeros, bit for bit.

    Finished layers are kept beside ``out`` until the whole is written; the same call goes on there.

    Args:
        dense: Hugging Face directory of the dense model.
        pruned: the same model with zeros.
        out: directory to write; it appears whole or not at all.
        tokens: calibration sequences of equal length, without padding.
        config: settings.
        device: where to compute.
        dtype: format to run both models in; moments and solutions are float32.
        overwrite: whether ``out`` may replace what is there.
        provenance: where the tokens come from, for the record.

    Returns:
        What ``refit.json`` beside the weights holds: settings and, by matrix, the squared error of its outputs on the
        calibration inputs that it sees, relative to the pruned weights' on the same; a map that makes up for what the
        stream lacks may leave more than 1, since it is fitted to other outputs.

    Raises:
        RequestError: the two are not a dense model and its zeroed version.
        LensError: an activation or a weight is not finite, or a zero was lost; nothing is written.

    Reference:
        SparseGPT's compensation with the mask given (Frantar & Alistarh 2023); layer-wise reconstruction after pruning
        as in arXiv 2510.14444.
    """
    config = config or RefitConfig()
    checkpoints = Checkpoint(dense), Checkpoint(pruned)
    plans = find_matrices(checkpoints[0]), find_matrices(checkpoints[1])
    _check_shapes(*plans)
    require_free(out, overwrite=overwrite)
    require_space(out, 2 * checkpoints[1].n_bytes)
    digests = {"dense_sha256": checkpoints[0].sha256, "pruned_sha256": checkpoints[1].sha256}
    finished = FinishedLayers(out, fingerprint(config, tokens, digests, dtype, package_version()))
    errors = _walk(dense, pruned, plans, tokens, config, device, dtype, finished)
    report = {
        "follow": config.follow, "ridge": config.ridge, "mend": config.mend, **digests,
        "lcc_lens_version": package_version(),
        "calibration": {**provenance, "sequences": len(tokens), "length": tokens.shape[1]}, "error_left": errors,
    }  # fmt: skip
    with atomic_directory(out, overwrite=overwrite) as part:
        copy_checkpoint(checkpoints[1], part, replaced=finished)
        if not compare_zeros(pruned, part).is_equal:
            raise LensError("expected the zeros of the pruned model in the refitted one, got others; nothing was kept")
        write_json(part / REFIT_RECORD, report)
    finished.discard()
    return report


def _check_shapes(dense: Sequence[Sequence[Matrix]], pruned: Sequence[Sequence[Matrix]]) -> None:
    found = [[(one.name, one.d_in, one.d_out) for layer in plan for one in layer] for plan in (dense, pruned)]
    if found[0] != found[1]:
        raise RequestError(
            "expected a dense model and the same model with zeros, got matrices of other names or sizes; a "
            "sliced model "
            "cannot be refitted"
        )


def _walk(
    dense: Path,
    pruned: Path,
    plans: tuple[Sequence[Sequence[Matrix]], Sequence[Sequence[Matrix]]],
    tokens: Int[Tensor, "sequence pos"],
    config: RefitConfig,
    device: torch.device,
    dtype: torch.dtype,
    finished: FinishedLayers,
) -> dict[str, float]:
    """Refit layer after layer; each is on disk before the next one begins."""
    stream = LayerStream.of(pruned, tokens, config.batch_size, device, dtype)
    is_guided = config.follow > 0 or config.mend > 0
    guide = Guide(LayerStream.of(dense, tokens, config.batch_size, device, dtype)) if is_guided else None
    errors: dict[str, float] = read_json(finished.folder / _ERRORS) if finished.n_layers else {}
    for index, matrices in enumerate(track(plans[1], len(plans[1]), "refitting layers")):
        if index < finished.n_layers:
            for matrix in matrices:
                stream.replace(matrix, finished[matrix.name])
        else:
            layer = _LayerRefit(StoredWeights(plans[0][index], device), StoredWeights(matrices, device), config)
            weights = layer.run(matrices, stream, guide)
            errors |= layer.errors
            write_json(finished.folder / _ERRORS, errors)
            finished.add({name: weight.cpu() for name, weight in weights.items()}, Removed())
        for one in (stream, guide):
            if one is not None:
                one.advance()
    return errors


class _LayerRefit:
    """One layer: maps that read the same inputs together, in the order of the layer's computation."""

    def __init__(self, dense: Mapping[str, Tensor], pruned: Mapping[str, Tensor], config: RefitConfig) -> None:
        self.dense, self.pruned, self.config = dense, pruned, config
        self.errors: dict[str, float] = {}

    def run(self, matrices: Sequence[Matrix], stream: LayerStream, guide: Guide | None) -> dict[str, Tensor]:
        """The new weights in the checkpoint's layout and format; they are in the stream's layer as well."""
        found: dict[str, Tensor] = {}
        if guide is not None:
            guide.enter(matrices)
        mended = outputs_to_mend(matrices, stream, guide) if guide is not None and self.config.mend else ()
        written: list[Written] = []
        for group in _groups(matrices, stream):
            moments: _Moments | Shortfall
            if guide is not None and group[0].name in mended:
                moments = Shortfall(group[0], self.dense[group[0].name], written, self.config.mend)
                moments.gather(stream, guide)
            else:
                moments = _Moments()
                moments.gather(group, stream, guide if self.config.follow else None)
            for matrix in group:
                found[matrix.name] = matrix.stored(self._solve(matrix.name, moments))
                stream.replace(matrix, found[matrix.name])
                if matrix.name in mended:
                    new = matrix.rows(found[matrix.name]).float()
                    written.append(Written(matrix, self.dense[matrix.name], new))
        return found

    def _solve(self, name: str, moments: _Moments | Shortfall) -> Float[Tensor, "out in"]:
        target, start, moment = self.dense[name], self.pruned[name], moments.inputs[name]
        equations = NormalEquations.of(
            moment,
            target,
            cross_moment=None if isinstance(moments, Shortfall) else moments.followed(name, self.config.follow),
            product=moments.product if isinstance(moments, Shortfall) else None,
            ridge=self.config.ridge,
        )
        weight = masked_least_squares(equations, start != 0, start)
        before, after = (output_error(w - target, moment) for w in (start, weight))
        self.errors[name] = after / before if before > 0 else 1.0
        return weight


def _groups(matrices: Sequence[Matrix], stream: LayerStream) -> list[list[Matrix]]:
    """Maps that read the same inputs, in the order of the computation; one batch tells."""
    moments = _Moments()
    first_batch = stream.batches_observed(matrices, moments.note)
    next(first_batch)
    first_batch.close()
    by_name = {matrix.name: matrix for matrix in matrices}
    groups: dict[str, list[Matrix]] = {}
    for name in moments.seen:
        groups.setdefault(moments.inputs.same_input(name), []).append(by_name[name])
    return list(groups.values())


class _Moments:
    """Second moments of the inputs of some maps, and with the dense model's inputs at the same tokens."""

    def __init__(self) -> None:
        self.inputs = InputMoments()
        self.seen: list[str] = []
        self._cross: dict[str, Tensor] = {}
        self._dense: dict[str, Tensor] = {}

    def gather(self, matrices: Sequence[Matrix], stream: LayerStream, guide: Guide | None) -> None:
        """Run the layer of both models over all batches, in step."""
        own = stream.batches_observed(matrices, self.note, settled=matrices[0] if len(matrices) == 1 else None)
        if guide is None:
            for _ in own:
                pass
        else:
            for _ in zip(guide.batches_observed(matrices, self._dense.__setitem__), own, strict=True):
                self._dense.clear()

    def followed(self, name: str, share: float) -> Float[Tensor, "in in"] | None:
        r"""$((1 - s) X + s X_{dense})^\top X$ of a map's inputs; None where no dense model ran along."""
        cross = self._cross.get(self.inputs.same_input(name))
        return None if cross is None else torch.lerp(self.inputs[name], cross, share)

    def note(self, name: str, inputs: Float[Tensor, "token in"]) -> None:
        """Add a batch of inputs of a map."""
        self.inputs.add(name, inputs)
        if name not in self.seen:
            self.seen.append(name)
        if self.inputs.same_input(name) == name and name in self._dense:
            with exact_products(inputs.dtype):
                product = self._dense[name].float().T @ inputs.float()
            self._cross[name] = self._cross[name] + product if name in self._cross else product
