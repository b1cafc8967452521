"""Checks of the lens's inputs: zero vectors, and components of another model."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.components import LostComponents
from lcc_lens.core.errors import RequestError
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import device_of


def checked_vector(model: HookedModel, vector: Float[Tensor, " d_head"]) -> Float[Tensor, " d_head"]:
    """The vector in float32 on the model's device, checked for a head's width and a norm above 0."""
    d_head = int(model.cfg.d_head)
    if len(vector) != d_head:
        raise RequestError(f"expected a vector of d_head = {d_head} numbers, got {len(vector)}; pass a head's vector")
    if not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
        raise RequestError("expected a finite vector other than zero, got zeros, NaN or infinity; choose another head")
    return vector.to(device=device_of(model), dtype=torch.float32)


def check_components(model: HookedModel, components: LostComponents) -> None:
    """Check that components have the model's layers, heads and head width."""
    shape = tuple(int(n) for n in (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head))
    got = (*components.directions.shape[:2], components.d_head)
    if got != shape:
        raise RequestError(f"expected components of (layers, heads, d_head) {shape}, got {got}; scan this pair")
