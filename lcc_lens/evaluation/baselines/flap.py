"""FLAP's bias compensation: biases equal to the removed weights' mean contribution (arXiv 2312.11983)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import TokenSequence, batches
from lcc_lens.models.hooked.activations import Site, TokenPositions, parts_of, visit_sites
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook, adders
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.sites import CONSTANT_SITES, ConstantSite, projection_names, projection_output_name
from lcc_lens.models.hooked.weights import named_weight, plain_modules
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.footprint import Footprint


class BiasInjection(Injection):
    """Biases of the linear layers that read a site, added to their outputs; nothing is trained.

    Args:
        biases: by site, for every layer.
    """

    def __init__(self, biases: Mapping[ConstantSite, Float[Tensor, "layer d_model"]]) -> None:
        super().__init__()
        self._sites = tuple(biases)
        for site, values in biases.items():
            self.register_buffer(f"bias_{site}", values.float())

    @property
    def footprint(self) -> Footprint:
        return Footprint(biases=self._sites)

    def biases(self, site: ConstantSite) -> Float[Tensor, "layer d_model"]:
        """The biases of the projections that read a site."""
        return self.get_buffer(f"bias_{site}")

    def hooks(self) -> list[NamedHook]:
        """Hooks that add the biases."""
        return [
            hook
            for site in self._sites
            for hook in adders(projection_output_name(site), dict(enumerate(self.biases(site))))
        ]


def flap(
    pair: Pair, sequences: Sequence[TokenSequence], *, model: HookedModel | None = None, max_tokens: int = 1024
) -> BiasInjection:
    r"""Biases of output and down projections that restore the mean of the removed weights' contribution.

    $b = (W_{dense} - W) \bar x$ with the mean $\bar x$ of a linear layer's inputs in the dense model. If pruning left
    the other weights unchanged, this is the removed weights times the mean input; what a pruner compensated already is
    not counted twice. As in the paper, output and down projections get one each, in one pass and in closed form. (The
    paper removes whole input channels, and proposes a score to choose them; this is its compensation alone, on zeros of
    any kind.)

    Args:
        model: the model to correct; the pair's pruned model if not given.

    Reference:
        FLAP (An et al., AAAI 2024, arXiv 2312.11983), bias compensation; from the paper alone.
    """
    dense, corrected = pair.dense, pair.pruned if model is None else model
    plain_modules(corrected)  # refuses a HookedTransformer, which has no hook points at these layers' outputs
    names = {site: (projection_names(dense, site), projection_names(corrected, site)) for site in CONSTANT_SITES}
    means = mean_inputs(dense, sequences, max_tokens)
    biases: dict[ConstantSite, Tensor] = {}
    for site, by_layer in names.items():
        rows = []
        for layer, (original, name) in enumerate(zip(*by_layer, strict=True)):
            weights = named_weight(dense, original), named_weight(corrected, name)
            if weights[0].shape != weights[1].shape:
                raise RequestError(
                    "expected models whose layers have the same shapes, got a sliced one; leave flap out"
                )
            lost = weights[0].double().cpu() - weights[1].double().cpu()
            rows.append(lost @ means[site][layer])
        biases[site] = torch.stack(rows).float()
    return BiasInjection(biases).to(device_of(corrected))


def mean_inputs(
    model: HookedModel, sequences: Sequence[TokenSequence], max_tokens: int = 1024
) -> dict[ConstantSite, Float[Tensor, "layer width"]]:
    """The mean input of every output and down projection over all tokens, in float64.

    Raises:
        RequestError: no sequences.
        LensError: an activation is not finite.
    """
    if not sequences:
        raise RequestError("expected sequences to take means on, got none; add data")
    n_layers, n = int(model.cfg.n_layers), sum(map(len, sequences))
    sums = {
        site: torch.zeros(n_layers, *parts_of(model, site), dtype=torch.float64) for site in CONSTANT_SITES
    }  # fmt: skip

    def add(site: Site, layer: int, activation: Tensor) -> None:
        if site != "resid":
            sums[site][layer] += activation.float().sum(0).cpu().double()

    for batch in batches(sequences, max_tokens=max_tokens):
        visit_sites(model, batch.tokens, dict.fromkeys(CONSTANT_SITES, TokenPositions.all_tokens(batch)), add)
    return {site: total.flatten(1) / n for site, total in sums.items()}
