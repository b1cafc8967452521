"""What the residual stream of a pruned model lacks where a layer's output maps write to it."""

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
from lcc_lens.pruning.refit.dense_stream import Guide

#: A token counts at most so many times as much as the median one.
_MOST = 10.0


class Written(NamedTuple):
    """An output map of the layer that has its new weight."""

    matrix: Matrix
    dense: Float[Tensor, "out in"]
    new: Float[Tensor, "out in"]


class Shortfall:
    r"""Moments for an output map that also makes up for what the stream lacks already.

    For a token let $x$ be the map's input, $y$ the dense map's own output, and $g = r_{dense} - r$ the difference of
    the residual streams that both write to: what earlier layers, and the layer's output maps that come before, left.
    The map is fitted to $y + \gamma g$. Every token is divided by the root mean square of the dense model's stream: the
    next norm does the same, and a few tokens of hundreds of times the size would decide everything otherwise.

    Args:
        matrix: the output map.
        dense: its dense weight.
        before: the layer's output maps that are refitted already, each with its dense and its new weight.
        share: $\gamma$.
    """

    def __init__(self, matrix: Matrix, dense: Float[Tensor, "out in"], before: Sequence[Written], share: float) -> None:
        self.matrix, self.dense, self.before, self.share = matrix, dense, before, share
        self.inputs = InputMoments()
        self.product: Float[Tensor, "out in"] = torch.zeros_like(dense)

    def gather(self, stream: LayerStream, guide: Guide) -> None:
        """Run the current layer of the pruned and the dense model over all batches, in step.

        Leaves $X^\top X$ in ``inputs`` and $Y^\top X$ of the wanted outputs in ``product``.
        """
        maps = [self.matrix, *(written.matrix for written in self.before)]
        own: dict[str, Tensor] = {}
        dense: dict[str, Tensor] = {}
        for _, _, entering, wanted in zip(
            stream.batches_observed(maps, own.__setitem__, settled=self.matrix),
            guide.batches_observed(maps, dense.__setitem__),
            stream.hidden_batches(),
            guide.hidden_batches(),
            strict=True,
        ):
            self._add(own, dense, (wanted.float() - entering.float()).flatten(0, 1), inverse_size(wanted))

    def _add(
        self,
        own: Mapping[str, Tensor],
        dense: Mapping[str, Tensor],
        gap: Float[Tensor, "token d_model"],
        weight: Float[Tensor, "token 1"],
    ) -> None:
        name = self.matrix.name
        inputs = own[name] * weight.to(own[name].dtype)
        with exact_products(inputs.dtype):
            for earlier, W_dense, W in self.before:
                gap = gap + dense[earlier.name].float() @ W_dense.T - own[earlier.name].float() @ W.T
            wanted = dense[name].float() @ self.dense.T + self.share * gap
            self.product += (wanted * weight).T @ inputs.float()
        self.inputs.add(name, inputs)


def inverse_size(stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "token 1"]:
    """One over the root mean square of every token's stream, bounded by ten times the median."""
    size = stream.float().square().mean(-1).sqrt().reshape(-1, 1)
    inverse = size.clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
    return inverse.clamp(max=_MOST * float(inverse.median()))


def outputs_to_mend(matrices: Sequence[Matrix], stream: LayerStream, guide: Guide) -> tuple[str, ...]:
    """The names of a layer's output maps, if all that the layer does is to add what they give to its input.

    There are none otherwise: where a norm comes behind them (Gemma 2), they do not write to the stream themselves.
    """
    maps = output_projections(matrices)
    is_plain = bool(maps) and stream.adds_up(maps) and guide.adds_up(maps)
    return tuple(matrix.name for matrix in maps) if is_plain else ()
