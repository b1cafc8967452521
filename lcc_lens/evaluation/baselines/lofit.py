"""LoFiT: choose heads by gains trained under an L1 penalty, for offsets trained at these heads (arXiv 2406.01563)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head, n_of_share
from lcc_lens.data.batches import TokenSequence
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.restoration.injections.changes import Change, Gain
from lcc_lens.restoration.injections.weights import WeightInjection, output_gains
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.loop import train

#: Learning rate of the offsets at the chosen heads; so few parameters allow a higher one than all heads do.
LOFIT_LR = 1e-1


class SparseGains(WeightInjection):
    """Gains of head outputs whose absolute values are penalised, so that most heads keep theirs near zero.

    Args:
        changes: gains of the output projections, by name.
        l1: weight of the sum of absolute values in the loss.
    """

    def __init__(self, changes: Mapping[str, Change], *, l1: float) -> None:
        super().__init__(changes, default_lr=1e-2)
        self.l1 = l1

    def penalty(self) -> Tensor:
        """The term that training adds to the objective."""
        return self.l1 * torch.stack([gain.abs().sum() for gain in self.parameters()]).sum()


def lofit_heads(
    model: HookedModel,
    projections: Sequence[str],
    heads: Sequence[Head],
    sequences: Sequence[TokenSequence],
    validation: Sequence[TokenSequence],
    config: TrainConfig,
    *,
    fraction: float = 0.2,
    l1: float = 1e-3,
    teacher: HookedModel | None = None,
) -> list[Head]:
    """LoFiT's first stage: the heads whose trained gains are largest (Euclidean norm), best first.

    Args:
        config: settings of the training; its learning rate is the gains'.
        fraction: of the heads to choose; the published code takes 10 to 30 %.
    """
    if not 0 < fraction <= 1:
        raise RequestError(f"expected a fraction of heads above 0 and up to 1, got {fraction}; correct it")
    gains = SparseGains(output_gains(model, projections, heads).changes(), l1=l1)
    for _ in train(model, gains, sequences, validation, config, teacher=teacher):
        pass
    d_head = int(model.cfg.d_head)
    sizes: dict[Head, float] = {}
    for layer, name in enumerate(projections):
        change = gains.changes().get(name)
        if isinstance(change, Gain):
            for index in (change.columns // d_head).unique().tolist():
                gain = change.gain[change.columns // d_head == index]
                sizes[Head(layer, index)] = float(gain.detach().norm())
    if not any(sizes.values()):
        raise RequestError(
            "expected gains that lower the held-out loss to choose heads by, got none; lower the learning rate"
        )
    return sorted(sizes, key=lambda head: -sizes[head])[: n_of_share(fraction, len(sizes))]
