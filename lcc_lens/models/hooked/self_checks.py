"""How a way through a model is checked: a short run of the model itself, and what was computed beside it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lcc_lens.core.errors import LensError
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook
from lcc_lens.models.hooked.offloading import device_of

#: How far a recomputed value may lie from the model's own, relative to the largest.
_TOLERANCE, _COARSE_TOLERANCE = 1e-4, 5e-2
_N_PROBED = 9


def run_with_activations(
    model: HookedModel, tokens: Tensor, names: list[str], hooks: list[NamedHook] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a model, with hooks if given, and keep its logits and the activations at named hook points.

    Raises:
        LensError: a hook point is not there.
    """
    missing = [name for name in names if name not in model.hook_dict]
    if missing:
        raise unsupported("of a head's output", f"no hook point {missing[0]}")
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> NamedHook:
        def keep(value: Tensor, hook: Any) -> None:
            seen[name] = value.detach().clone()

        return name, keep

    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[*(hooks or []), *map(keeper, names)])
    return logits, seen


def check_tokens(model: HookedModel) -> Int[Tensor, "batch pos"]:
    """A fixed short sequence spread over the vocabulary."""
    spread = torch.linspace(1, int(model.cfg.d_vocab) - 1, _N_PROBED).long()
    return spread[None].to(device_of(model))


def is_close(got: Tensor, wanted: Tensor, model: HookedModel) -> bool:
    """Whether a recomputed value is the model's own, up to the rounding of the model's dtype."""
    is_coarse = model.cfg.dtype not in (torch.float32, torch.float64)
    tolerance = (_COARSE_TOLERANCE if is_coarse else _TOLERANCE) * float(wanted.abs().max())
    return bool((got - wanted).abs().max() <= tolerance)


def unsupported(where: str, got: str) -> LensError:
    """The refusal of an architecture whose way somewhere is another than the one computed here."""
    return LensError(f"this architecture's way {where} is not known: got {got}; use another model")
