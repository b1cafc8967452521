"""What a reading refuses before it begins: vectors with nothing to read, components of another model."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.components import LostComponents
from lcc_lens.core.errors import RequestError
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import device_of


def checked_vector(model: HookedModel, vector: Float[Tensor, " d_head"]) -> Float[Tensor, " d_head"]:
    """The vector in float32 on the model's device, if it is one of a head's width with something to read in it."""
    d_head = int(model.cfg.d_head)
    if len(vector) != d_head:
        raise RequestError(f"expected a vector of d_head = {d_head} numbers, got {len(vector)}")
    if not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
        raise RequestError("expected a vector with something to read, got zeros, NaN or infinity; choose another head")
    return vector.to(device=device_of(model), dtype=torch.float32)


def check_components(model: HookedModel, components: LostComponents) -> None:
    """Refuse components whose layers, heads or width are not the model's."""
    wanted = tuple(int(n) for n in (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head))
    got = (*components.directions.shape[:2], components.d_head)
    if got != wanted:
        raise RequestError(f"expected components of (layers, heads, d_head) {wanted}, got {got}; scan this pair")
