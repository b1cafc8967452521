"""SparseGPT as a layer pruner: second moments of the inputs, then one sweep per matrix."""

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
    """Removes weights column by column and lets the weights to the right make up for each.

    The result's output error on the calibration data is never above Wanda's: in the rare matrix where the sweep does
    worse (inputs that hardly correlate leave nothing to compensate with), Wanda's mask is taken instead, and the log
    says so.

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
        """Give every matrix as the sweep leaves it."""
        inputs: tuple[str, Damped] | None = None
        for name, weight in weights.items():
            moment = self._moments[name]
            leader = self._moments.same_input(name)
            if inputs is None or inputs[0] != leader:
                inputs = (leader, damped_and_said(moment, name))
            yield name, self._no_worse_than_wanda(name, weight, sparsegpt(weight, inputs[1], self._pattern), moment)

    def _no_worse_than_wanda(self, name: str, weight: Tensor, found: Tensor, moment: Tensor) -> Tensor:
        keep = keep_mask(wanda_score(weight, moment.diagonal().sqrt()), self._pattern)
        wanda = torch.where(keep, weight, 0)
        ours, theirs = (output_error(candidate - weight, moment) for candidate in (found, wanda))
        if ours <= theirs:
            return found
        logger.info("%s: Wanda's mask errs less (%.3g against %.3g) and is taken", name, theirs, ours)
        return wanda

    def removed(self) -> Removed:
        """Nothing goes as a whole."""
        return Removed()


def damped_and_said(moment: Float[Tensor, "in in"], name: str) -> Damped:
    """Damp a second moment; more than the usual damping is said in the log."""
    inputs = damped(moment)
    if inputs.damping > DAMPING:
        logger.warning("%s: damping raised to %g of the mean diagonal until it inverted", name, inputs.damping)
    return inputs
