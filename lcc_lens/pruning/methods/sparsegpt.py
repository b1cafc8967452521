"""SparseGPT as a layer pruner: second moments of the inputs, then one pass over each matrix."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.pruning.methods.masks import keep_mask
from lcc_lens.pruning.methods.moments import InputMoments
from lcc_lens.pruning.methods.obs import DAMPING, Damped, damped, output_error, sparsegpt
from lcc_lens.pruning.methods.pruners import LayerTask, Removed
from lcc_lens.pruning.methods.scores import wanda_score

logger = logging.getLogger(__name__)


class SparseGPTPruner:
    """Removes weights column by column; the weights to the right compensate for each.

    The output error on the calibration data is never above Wanda's: for the rare matrix where SparseGPT does worse
    (uncorrelated inputs leave nothing to compensate with), Wanda's mask is used instead and logged.

    Reference:
        Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot".
    """

    uses_inputs: ClassVar[bool] = True

    def __init__(self, task: LayerTask) -> None:
        self._pattern = task.pattern
        self._moments = InputMoments()

    def observe(self, name: str, inputs: Float[Tensor, "token in"]) -> None:
        """Add to the second moment of a matrix's inputs."""
        self._moments.add(name, inputs)

    def pruned(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield every pruned matrix."""
        inputs: tuple[str, Damped] | None = None
        for name, weight in weights.items():
            moment = self._moments[name]
            leader = self._moments.same_input(name)
            if inputs is None or inputs[0] != leader:
                inputs = (leader, damped_with_warning(moment, name))
            yield name, self._no_worse_than_wanda(name, weight, sparsegpt(weight, inputs[1], self._pattern), moment)

    def _no_worse_than_wanda(self, name: str, weight: Tensor, pruned: Tensor, moment: Tensor) -> Tensor:
        keep = keep_mask(wanda_score(weight, moment.diagonal().sqrt()), self._pattern)
        wanda = torch.where(keep, weight, 0)
        error, wanda_error = (output_error(candidate - weight, moment) for candidate in (pruned, wanda))
        if error <= wanda_error:
            return pruned
        logger.info("%s: using Wanda's mask, whose error is smaller (%.3g, not %.3g)", name, wanda_error, error)
        return wanda

    def removed(self) -> Removed:
        """No heads and no neurons."""
        return Removed()


def damped_with_warning(moment: Float[Tensor, "in in"], name: str) -> Damped:
    """Damp a second moment; logs a warning if it needs more than the usual damping."""
    inputs = damped(moment)
    if inputs.damping > DAMPING:
        logger.warning(
            "%s: damping raised to %g of the mean diagonal, to make the second moment invertible", name, inputs.damping
        )
    return inputs
