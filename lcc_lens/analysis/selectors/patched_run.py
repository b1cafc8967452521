"""Patched forward passes over one batch: many (example, head) rows at once, started at the patched layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lcc_lens.analysis.selectors.backward import dense_run
from lcc_lens.data.batches import Batch
from lcc_lens.models.hooked.forward import forward
from lcc_lens.models.hooked.hooks import (
    HookedModel,
    HookFunction,
    NamedHook,
    logits_at,
    readers,
    resid_pre_name,
    z_name,
)
from lcc_lens.models.hooked.layer_walk import run_from_layer
from lcc_lens.models.hooked.losses import Outcome, measure
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair

PatchedPositions = Literal["all", "response"]


@dataclass(frozen=True)
class PatchedRuns:
    """Shared state of patched runs over one batch: both models' activations, and the outcome without a patch.

    Activations keep the models' number format. ``resid`` is the pruned model's residual stream before every layer,
    which a patch in a later layer does not change; it is empty if runs must start from the tokens. ``is_patched`` marks
    the positions that are patched; None for all.
    """

    model: HookedModel
    batch: Batch
    z_dense: list[Float[Tensor, "batch pos head d_head"]]
    resid: list[Float[Tensor, "batch pos d_model"]]
    is_patched: Bool[Tensor, "batch pos"] | None
    dense_logits: Float[Tensor, "target d_vocab"] | None
    unpatched: Outcome

    @classmethod
    def prepare(
        cls, pair: Pair, batch: Batch, positions: PatchedPositions, *, may_start: bool, divergence: bool
    ) -> PatchedRuns:
        """Run both models once over the batch."""
        z_dense, dense_logits = dense_run(pair, batch, with_logits=divergence)
        return cls.over(pair.pruned, batch, z_dense, positions, may_start=may_start, dense_logits=dense_logits)

    @classmethod
    def over(
        cls,
        model: HookedModel,
        batch: Batch,
        z_source: list[Float[Tensor, "batch pos head d_head"]],
        positions: PatchedPositions,
        *,
        may_start: bool,
        dense_logits: Float[Tensor, "target d_vocab"] | None = None,
    ) -> PatchedRuns:
        """Run a model once over the batch, whose head outputs will be replaced by ``z_source``."""
        device, resid = device_of(model), list[Tensor]()
        dense_logits = None if dense_logits is None else dense_logits.to(device)
        hooks = resid_readers(int(model.cfg.n_layers), resid) if may_start else []
        with torch.inference_mode():
            narrow = logits_at(model, batch.is_target().to(device))
            logits = forward(model, batch.tokens.to(device), [*hooks, *narrow])
            unpatched = measure(logits[0], batch, dense_logits)
        position = torch.arange(batch.tokens.shape[1])
        is_patched = (position >= batch.loss_from[:, None] - 1).to(device) if positions == "response" else None
        return cls(model, batch, [z.to(device) for z in z_source], resid, is_patched, dense_logits, unpatched)

    def run(self, layer: int, example: Int[Tensor, " row"], head: Int[Tensor, " row"]) -> Outcome:
        """The pruned model's outcome on each row's example with the dense output of that row's head.

        Args:
            example: row by row, the example's place in the batch.
        """
        rows = Batch(
            self.batch.tokens[example], self.batch.lengths[example], self.batch.loss_from[example],
            tuple(self.batch.index[i] for i in example.tolist()),
        )  # fmt: skip
        device = device_of(self.model)
        length = int(rows.lengths.max()) - 1  # the last token predicts nothing
        mask, place = rows.is_target()[:, :length].to(device), example.to(device)
        patch = (z_name(layer), self._patch(layer, place, head.to(device), length))
        hooks: list[NamedHook] = [patch, *logits_at(self.model, mask)]
        with torch.inference_mode():
            tokens = rows.tokens[:, :length].to(device)
            if self.resid and layer > 0:
                logits = run_from_layer(self.model, layer, self.resid[layer][place, :length], tokens, hooks)
            else:
                logits = forward(self.model, tokens, hooks)
            if self.dense_logits is None:
                return measure(logits[0], rows)
            return measure(logits[0], rows, self.dense_logits, self._dense_row(example).to(device))

    def _patch(self, layer: int, example: Tensor, head: Tensor, length: int) -> HookFunction:
        row = torch.arange(len(example), device=example.device)

        def patch(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            value = self.z_dense[layer][example, :length, head]
            if self.is_patched is not None:
                value = torch.where(self.is_patched[example, :length, None], value, z[row, :, head])
            z[row, :, head] = value
            return z

        return patch

    def _dense_row(self, example: Int[Tensor, " row"]) -> Int[Tensor, " target"]:
        """For each target of the rows, its number among the batch's targets."""
        is_target = self.batch.is_target()
        number = is_target.flatten().cumsum(0).reshape(is_target.shape) - 1
        return number[example][is_target[example]]


def resid_readers(n_layers: int, resid: list[Tensor]) -> list[NamedHook]:
    """Hooks that append the residual stream before every layer to a list, in the order of layers."""
    return readers(resid_pre_name, range(n_layers), lambda layer, x: resid.append(x.clone()))
