"""Sequential mean shift: each layer's mean difference, measured after the layers below it are corrected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.heads import Head, check_heads
from lcc_lens.core.progress import track
from lcc_lens.data.batches import TokenSequence, batches
from lcc_lens.models.hooked.activations import parts_of
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook
from lcc_lens.models.hooked.layer_walk import LayerWalk
from lcc_lens.models.hooked.sites import CONSTANT_SITES, ConstantSite, site_adders, site_readers
from lcc_lens.models.pair import Pair


def sequential_means(
    pair: Pair,
    sequences: Sequence[TokenSequence],
    heads: Sequence[Head],
    *,
    mlp: bool = False,
    model: HookedModel | None = None,
    max_tokens: int = 1024,
) -> dict[ConstantSite, Float[Tensor, "layer part width"]]:
    r"""The mean difference of every layer, measured with the constants of all layers below added; nothing is trained.

    $c_l = \mathrm{mean}_n(a_{dense,l} - a_{corrected,l})$ over all tokens, where the corrected model is the pruned one
    with $c_0 \dots c_{l-1}$ added; for an MLP, also its own layer's heads. A plain mean shift measures every layer in
    the unrestored model, and so corrects again what the layers below have already corrected.

    Both models run layer by layer, with the hidden states of all tokens in memory.

    Args:
        heads: the heads to correct; may be empty with ``mlp``, which also corrects the MLPs of all layers.
        model: the model to correct, by default the pruned one; ``max_tokens``: padded tokens per forward pass at most.

    Returns:
        By site the constants, zero for heads that are not corrected.

    Raises:
        RequestError: one model in memory at a time, MLPs of different widths, no sequence, or a head outside the model.
        LensError: an activation is not finite.
    """
    if pair.one_at_a_time:
        raise RequestError("expected both models in memory for a sequential mean shift, got one at a time; load both")
    if mlp and "mlp" not in pair.sites:
        raise RequestError("expected MLPs of the same width in both models, got other widths; leave the MLPs out")
    if not sequences:
        raise RequestError("expected sequences to measure a mean shift on, got none; add data")
    model = pair.pruned if model is None else model
    heads = check_heads(heads, pair.n_layers, pair.n_heads) if heads or not mlp else []
    padded = batches(sequences, max_tokens=max_tokens)
    valid = [batch.is_valid() for batch in padded]
    tokens = [batch.tokens for batch in padded]
    dense, corrected = (_Measured(LayerWalk(walked, tokens), valid) for walked in (pair.dense, model))
    sites: tuple[ConstantSite, ...] = CONSTANT_SITES if mlp else ("z",)
    constants: dict[ConstantSite, Tensor] = {
        site: torch.zeros(pair.n_layers, *parts_of(model, site), dtype=torch.float64) for site in sites
    }
    for layer in track(range(pair.n_layers), pair.n_layers, "correcting layers"):
        targets = dense.means(sites, [], go_on=True)
        hooks: list[NamedHook] = []
        for site in sites:
            chosen = torch.zeros(constants[site].shape[1], dtype=torch.bool)
            chosen[[0] if site == "mlp" else [head.head for head in heads if head.layer == layer]] = True
            if bool(chosen.any()):
                target = targets[site]
                if site == "z" and model is pair.pruned:
                    target = pair.kept_heads(layer, target)
                constants[site][layer, chosen] = (target - corrected.means((site,), hooks)[site])[chosen]
                hooks += site_adders(site, {layer: constants[site][layer].float()})
        corrected.walk.advance(hooks)
    return {site: values.float() for site, values in constants.items()}


@dataclass(frozen=True)
class _Measured:
    """A walk whose activations are averaged over the tokens that are not padding."""

    walk: LayerWalk
    valid: Sequence[Tensor]

    def means(
        self, sites: Sequence[ConstantSite], hooks: Sequence[NamedHook], *, go_on: bool = False
    ) -> Mapping[ConstantSite, Float[Tensor, "part width"]]:
        """The current layer's means by site, in float64, under hooks; the walk goes on to the next layer if asked."""
        layer, sums = self.walk.layer, dict[ConstantSite, Tensor]()

        def watch(batch: int) -> list[NamedHook]:
            return [hook for site in sites for hook in site_readers(site, [layer], adder(site, self.valid[batch]))]

        def adder(site: ConstantSite, mask: Tensor) -> Callable[[int, Tensor], None]:
            def add(_: int, activation: Tensor) -> None:
                chosen = activation[mask.to(activation.device)]
                by_part = chosen.reshape(len(chosen), -1 if site == "z" else 1, chosen.shape[-1])
                total = by_part.float().sum(0).cpu().double()  # float32 suffices for one batch, float64 for all
                sums[site] = sums[site] + total if site in sums else total

            return add

        if go_on:
            self.walk.advance(hooks, watch)
        else:
            for batch in range(self.walk.n_batches):
                self.walk.run(batch, [*hooks, *watch(batch)])
        for site, total in sums.items():
            if not bool(torch.isfinite(total).all()):
                raise LensError(
                    f"expected finite activations, got NaN or infinity at {site} of layer {layer}; check the weights"
                )
        n = sum(int(mask.sum()) for mask in self.valid)
        return {site: total / n for site, total in sums.items()}
