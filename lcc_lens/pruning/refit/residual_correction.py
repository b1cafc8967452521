"""Regression targets that let an output projection also correct the residual-stream error of earlier layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.models.architecture.anatomy import output_projections
from lcc_lens.models.architecture.linear_maps import Matrix
from lcc_lens.pruning.calibration.stream import LayerStream
from lcc_lens.pruning.methods.moments import InputMoments, exact_products
from lcc_lens.pruning.refit.dense_stream import DenseStream

#: Upper bound of a token's weight, relative to the median token.
_MAX_RELATIVE_WEIGHT = 10.0


class RefittedProjection(NamedTuple):
    """An output projection of the current layer, with its dense and its refitted weight."""

    matrix: Matrix
    dense: Float[Tensor, "out in"]
    refitted: Float[Tensor, "out in"]


class ResidualCorrection:
    r"""Second moments for refitting one output projection.

    Let $x$ be its input in the pruned model, $y$ the dense projection's output, and $e = r_{dense} - r_{pruned}$ the
    residual-stream error at that point, including this layer's projections that are already refitted. The regression
    target is $y + \gamma e$. Tokens are weighted by $1 / RMS(r_{dense})$, as the next norm divides by it; otherwise a
    few high-norm tokens dominate the fit.

    Args:
        matrix: the output projection.
        dense: its dense weight.
        refitted: this layer's projections that are already refitted.
        fraction: $\gamma$.
    """

    def __init__(
        self, matrix: Matrix, dense: Float[Tensor, "out in"], refitted: Sequence[RefittedProjection], fraction: float
    ) -> None:
        self.matrix, self.dense, self.refitted, self.fraction = matrix, dense, refitted, fraction
        self.inputs = InputMoments()
        self.product: Float[Tensor, "out in"] = torch.zeros_like(dense)

    def gather(self, pruned_stream: LayerStream, dense_stream: DenseStream) -> None:
        r"""Run the current layer of both models on all batches; fills ``inputs`` and ``product``.

        ``inputs`` then holds $X^\top X$, and ``product`` holds $Y^\top X$ with the regression targets $Y$.
        """
        matrices = [self.matrix, *(projection.matrix for projection in self.refitted)]
        pruned_inputs: dict[str, Tensor] = {}
        dense_inputs: dict[str, Tensor] = {}
        for _, _, hidden_pruned, hidden_dense in zip(
            pruned_stream.batches_observed(matrices, pruned_inputs.__setitem__, settled=self.matrix),
            dense_stream.batches_observed(matrices, dense_inputs.__setitem__),
            pruned_stream.hidden_batches(),
            dense_stream.hidden_batches(),
            strict=True,
        ):
            error = (hidden_dense.float() - hidden_pruned.float()).flatten(0, 1)
            self._add(pruned_inputs, dense_inputs, error, token_weights(hidden_dense))

    def _add(
        self,
        pruned_inputs: Mapping[str, Tensor],
        dense_inputs: Mapping[str, Tensor],
        error: Float[Tensor, "token d_model"],
        weight: Float[Tensor, "token 1"],
    ) -> None:
        name = self.matrix.name
        inputs = pruned_inputs[name] * weight.to(pruned_inputs[name].dtype)
        with exact_products(inputs.dtype):
            for matrix, W_dense, W in self.refitted:
                error = error + dense_inputs[matrix.name].float() @ W_dense.T - pruned_inputs[matrix.name].float() @ W.T
            target = dense_inputs[name].float() @ self.dense.T + self.fraction * error
            self.product += (target * weight).T @ inputs.float()
        self.inputs.add(name, inputs)


def token_weights(hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "token 1"]:
    """The inverse root mean square of every token's residual stream, at most ten times the median."""
    rms = hidden.float().square().mean(-1).sqrt().reshape(-1, 1)
    inverse = rms.clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
    return inverse.clamp(max=_MAX_RELATIVE_WEIGHT * float(inverse.median()))


def projections_to_correct(
    matrices: Sequence[Matrix], pruned_stream: LayerStream, dense_stream: DenseStream
) -> tuple[str, ...]:
    """The names of a layer's output projections, if they write to the residual stream directly.

    Empty for layers that apply a norm to a projection's output first (Gemma 2).
    """
    projections = output_projections(matrices)
    is_direct = bool(projections) and pruned_stream.adds_up(projections) and dense_stream.adds_up(projections)
    return tuple(matrix.name for matrix in projections) if is_direct else ()
