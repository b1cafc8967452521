"""Refit the surviving weights of every linear layer to the dense model's outputs, by masked least squares."""

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
from lcc_lens.core.files import require_space
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.outputs.folders import reserved
from lcc_lens.core.progress import track
from lcc_lens.core.ranges import Count, Fraction, Positive, check_numbers
from lcc_lens.models.architecture.linear_maps import Matrix, StoredWeights
from lcc_lens.pruning.calibration.finished_layers import FinishedLayers
from lcc_lens.pruning.calibration.stream import LayerStream
from lcc_lens.pruning.methods.moments import InputMoments, exact_products
from lcc_lens.pruning.methods.obs import output_error
from lcc_lens.pruning.methods.pruners import Removed
from lcc_lens.pruning.output.zeros_kept import write_with_zeros
from lcc_lens.pruning.refit.checks import require_refittable
from lcc_lens.pruning.refit.dense_stream import DenseStream
from lcc_lens.pruning.refit.least_squares import NormalEquations, masked_least_squares
from lcc_lens.pruning.refit.residual_correction import RefittedProjection, ResidualCorrection, projections_to_correct

REFIT_RECORD = "refit.json"


@dataclass(frozen=True)
class RefitConfig:
    """How to refit.

    Args:
        follow: interpolates the regression inputs between the pruned model's (0) and the dense model's (1). Above 0,
            later linear layers also correct the errors of earlier ones.
        ridge: strength of the pull towards the dense weights, as a fraction of the inputs' mean square.
        mend: fraction of the residual-stream error that output projections correct
            (:class:`~lcc_lens.pruning.refit.residual_correction.ResidualCorrection`). At 0, or where projections do not
            write to the residual stream directly, they are fitted as ``follow`` says.
        batch_size: sequences per forward pass.
    """

    follow: Fraction = 0.5
    ridge: Positive = 0.03
    mend: Fraction = 0.75
    batch_size: Count = 8

    def __post_init__(self) -> None:
        check_numbers(self)


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
    r"""Fit the surviving weights of a pruned checkpoint by least squares and write the result; nothing is trained.

    Linear layers are refitted in the order of computation. For every row $w$ of a weight matrix,
    $\min_w \lVert X w - y \rVert^2 + \lambda \lVert w - w_{dense} \rVert^2$ over the weights that pruning left,
    where $X$ are the inputs after everything before is refitted. Zeros stay zeros, bit for bit.

    Finished layers are kept beside ``out`` until all are written; after an interruption the same call continues there.

    Args:
        dense: Hugging Face directory of the dense model.
        out: directory to write; it appears complete or not at all.
        tokens: calibration sequences of equal length, without padding.
        dtype: format to run both models in; moments and solutions are float32.
        overwrite: whether ``out`` may replace an existing directory.
        provenance: where the tokens come from, for the record.

    Returns:
        The contents of ``refit.json``: settings and, by matrix, the squared output error on the calibration inputs
        relative to that of the pruned weights. It may exceed 1 for an output projection with ``mend``, whose targets
        include the residual-stream error.

    Raises:
        RequestError: the two are not a dense model and its zeroed version.
        LensError: an activation or a weight is not finite, or a zero was lost; nothing is written.

    Reference:
        SparseGPT's compensation with a fixed mask (Frantar & Alistarh 2023); reconstruction as in arXiv 2510.14444.
    """
    config = config or RefitConfig()
    plans = require_refittable(dense, pruned)
    checkpoints = Checkpoint(dense), Checkpoint(pruned)
    with reserved(out, overwrite=overwrite, inputs=[dense, pruned]) as target:
        require_space(target, 2 * checkpoints[1].n_bytes)
        digests = {"dense_sha256": checkpoints[0].sha256, "pruned_sha256": checkpoints[1].sha256}
        finished = FinishedLayers(
            target, fingerprint(config, tokens, digests, dtype, device.type, package_version())
        )  # fmt: skip
        errors = _refit_layers(dense, pruned, plans, tokens, config, device, dtype, finished)
        report = {
            "follow": config.follow, "ridge": config.ridge, "mend": config.mend, **digests,
            "lcc_lens_version": package_version(),
            "calibration": {**provenance, "sequences": len(tokens), "length": tokens.shape[1]}, "error_left": errors,
        }  # fmt: skip
        report = write_with_zeros(*checkpoints, target, finished, (REFIT_RECORD, report), overwrite=overwrite)
        finished.discard()
    return report


def _refit_layers(
    dense: Path,
    pruned: Path,
    plans: tuple[Sequence[Sequence[Matrix]], Sequence[Sequence[Matrix]]],
    tokens: Int[Tensor, "sequence pos"],
    config: RefitConfig,
    device: torch.device,
    dtype: torch.dtype,
    finished: FinishedLayers,
) -> dict[str, float]:
    """Refit the layers in order; each is on disk before the next begins. Gives the error left, by matrix."""
    pruned_stream = LayerStream.of(pruned, tokens, config.batch_size, device, dtype)
    dense_stream: DenseStream | None = None
    if config.follow > 0 or config.mend > 0:
        dense_stream = DenseStream(LayerStream.of(dense, tokens, config.batch_size, device, dtype))
    errors = dict(finished.notes)
    for index, matrices in enumerate(track(plans[1], len(plans[1]), "refitting layers")):
        if index < finished.n_layers:
            for matrix in matrices:
                pruned_stream.replace(matrix, finished[matrix.name])
        else:
            layer = _LayerRefit(StoredWeights(plans[0][index], device), StoredWeights(matrices, device), config)
            weights = layer.run(matrices, pruned_stream, dense_stream)
            errors |= layer.errors
            finished.add({name: weight.cpu() for name, weight in weights.items()}, Removed(), layer.errors)
        pruned_stream.advance()
        if dense_stream is not None:
            dense_stream.advance()
    return errors


class _LayerRefit:
    """Refits one decoder layer; linear layers that read the same inputs are refitted together."""

    def __init__(self, dense: Mapping[str, Tensor], pruned: Mapping[str, Tensor], config: RefitConfig) -> None:
        self.dense, self.pruned, self.config = dense, pruned, config
        self.errors: dict[str, float] = {}

    def run(
        self, matrices: Sequence[Matrix], pruned_stream: LayerStream, dense_stream: DenseStream | None
    ) -> dict[str, Tensor]:
        """Refit the layer in the pruned model's stream; gives the weights in the checkpoint's layout and format."""
        weights: dict[str, Tensor] = {}
        corrected: tuple[str, ...] = ()
        if dense_stream is not None:
            dense_stream.enter(matrices)
            if self.config.mend:
                corrected = projections_to_correct(matrices, pruned_stream, dense_stream)
        refitted: list[RefittedProjection] = []
        for group in _groups(matrices, pruned_stream):
            first = group[0].name
            moments: _Moments | ResidualCorrection
            if dense_stream is not None and first in corrected:
                moments = ResidualCorrection(group[0], self.dense[first], refitted, self.config.mend)
                moments.gather(pruned_stream, dense_stream)
            else:
                moments = _Moments()
                moments.gather(group, pruned_stream, dense_stream if self.config.follow else None)
            for matrix in group:
                name = matrix.name
                weights[name] = matrix.stored(self._solve(name, moments))
                pruned_stream.replace(matrix, weights[name])
                if name in corrected:
                    weight = matrix.rows(weights[name]).float()
                    refitted.append(RefittedProjection(matrix, self.dense[name], weight))
        return weights

    def _solve(self, name: str, moments: _Moments | ResidualCorrection) -> Float[Tensor, "out in"]:
        target, start, moment = self.dense[name], self.pruned[name], moments.inputs[name]
        equations = NormalEquations.of(
            moment,
            target,
            cross_moment=None
            if isinstance(moments, ResidualCorrection)
            else moments.cross_moment(name, self.config.follow),
            product=moments.product if isinstance(moments, ResidualCorrection) else None,
            ridge=self.config.ridge,
        )
        weight = masked_least_squares(equations, start != 0, start)
        before, after = (output_error(w - target, moment) for w in (start, weight))
        self.errors[name] = after / before if before > 0 else 1.0
        return weight


def _groups(matrices: Sequence[Matrix], stream: LayerStream) -> list[list[Matrix]]:
    """Linear layers that read the same inputs, in order of computation, as the first batch shows."""
    moments = _Moments()
    first_batch = stream.batches_observed(matrices, moments.add)
    next(first_batch)
    first_batch.close()
    by_name = {matrix.name: matrix for matrix in matrices}
    groups: dict[str, list[Matrix]] = {}
    for name in moments.seen:
        groups.setdefault(moments.inputs.same_input(name), []).append(by_name[name])
    return list(groups.values())


class _Moments:
    """Second moments of the inputs of linear layers, in the pruned model and between both models."""

    def __init__(self) -> None:
        self.inputs = InputMoments()
        self.seen: list[str] = []
        self._cross: dict[str, Tensor] = {}
        self._dense_inputs: dict[str, Tensor] = {}

    def gather(self, matrices: Sequence[Matrix], pruned_stream: LayerStream, dense_stream: DenseStream | None) -> None:
        """Run the current layer of both models on all batches, in step."""
        settled = matrices[0] if len(matrices) == 1 else None
        pruned_batches = pruned_stream.batches_observed(matrices, self.add, settled=settled)
        if dense_stream is None:
            for _ in pruned_batches:
                pass
        else:
            dense_batches = dense_stream.batches_observed(matrices, self._dense_inputs.__setitem__)
            for _ in zip(dense_batches, pruned_batches, strict=True):
                self._dense_inputs.clear()

    def cross_moment(self, name: str, follow: float) -> Float[Tensor, "in in"] | None:
        r"""$((1 - f) X + f X_{dense})^\top X$ of a linear layer's inputs; None where no dense model ran."""
        cross = self._cross.get(self.inputs.same_input(name))
        return None if cross is None else torch.lerp(self.inputs[name], cross, follow)

    def add(self, name: str, inputs: Float[Tensor, "token in"]) -> None:
        """Add a batch of inputs in the pruned model."""
        self.inputs.add(name, inputs)
        if name not in self.seen:
            self.seen.append(name)
        if self.inputs.same_input(name) == name and name in self._dense_inputs:
            with exact_products(inputs.dtype):
                product = self._dense_inputs[name].float().T @ inputs.float()
            self._cross[name] = self._cross[name] + product if name in self._cross else product
