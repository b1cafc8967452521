"""Checks that a shortcut gives what a model itself gives: tried on a few tokens, remembered per model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from lcc_lens.core.errors import LensError
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook
from lcc_lens.models.hooked.offloading import device_of

Verdict = TypeVar("Verdict")
#: What a check raises where a model lacks what the shortcut needs.
_FAILURES = (AttributeError, RuntimeError, TypeError, ValueError, KeyError, IndexError)


@dataclass(frozen=True)
class Tolerance:
    """The largest accepted deviation, as a fraction of the largest expected value, by number format."""

    float32: float
    float64: float
    coarse: float
    """In bfloat16 and float16."""

    def of(self, dtype: torch.dtype) -> float:
        """The tolerance of results that were computed in a number format."""
        return {torch.float32: self.float32, torch.float64: self.float64}.get(dtype, self.coarse)


#: The same operations on the same shapes, of which some are left out.
SAME_OPERATIONS = Tolerance(1e-5, 1e-10, 2e-2)
#: The logits of the same weights by another implementation.
SAME_LOGITS = Tolerance(1e-5, 1e-10, 5e-2)
#: Other kernels within one layer whose inputs are the same.
OTHER_KERNELS = Tolerance(1e-4, 1e-8, 2e-2)
#: Other operations or shapes; differences grow from layer to layer.
OTHER_OPERATIONS = Tolerance(1e-4, 1e-8, 5e-2)


def tried_once(*, on_failure: Any) -> Callable[[Callable[[HookedModel], Verdict]], Callable[[HookedModel], Verdict]]:
    """Decorate a check so that it runs once per model, without gradients; its verdict lives as long as the model.

    Args:
        on_failure: the verdict where the check raises an error.
    """

    def decorate(check: Callable[[HookedModel], Verdict]) -> Callable[[HookedModel], Verdict]:
        verdicts: WeakKeyDictionary[Any, Verdict] = WeakKeyDictionary()

        @functools.wraps(check)
        def remembered(model: HookedModel) -> Verdict:
            key: Any = model
            if key not in verdicts:
                try:
                    with torch.no_grad():
                        verdicts[key] = check(model)
                except _FAILURES:
                    verdicts[key] = on_failure
            return verdicts[key]

        return remembered

    return decorate


def is_close(
    result: Tensor, expected: Tensor, tolerance: Tolerance, dtype: torch.dtype, *, by_norm: bool = False
) -> bool:
    """Whether a result is what a model gives, up to rounding.

    Args:
        dtype: the number format that the model computes in; a result in a coarser one counts as that.
        by_norm: compare Euclidean norms instead of the largest deviation, where single values round badly.
    """
    if result.shape != expected.shape:
        return False
    wide = torch.promote_types(result.dtype, torch.float32)
    coarser = torch.float32 if dtype == torch.float64 and wide == torch.float32 else dtype
    size = torch.linalg.vector_norm if by_norm else lambda values: values.abs().max()
    limit = tolerance.of(coarser) * size(expected.to(wide)).clamp_min(1e-6)
    return bool(size(result.to(wide) - expected.to(wide)) <= limit)


def spread_tokens(d_vocab: int, device: torch.device, context: int | None = None) -> Int[Tensor, "batch pos"]:
    """Two fixed short sequences spread over the vocabulary, no longer than the context."""
    length = min(16, context or 16)
    return (torch.arange(1, 2 * length + 1, device=device) * 7919 % d_vocab).reshape(2, length)


def check_tokens(model: HookedModel) -> Int[Tensor, "batch pos"]:
    """The tokens that a model is checked with."""
    return spread_tokens(int(model.cfg.d_vocab), device_of(model), int(model.cfg.n_ctx))


def run_with_activations(
    model: HookedModel, tokens: Tensor, names: list[str], hooks: list[NamedHook] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a model, with hooks if given; its logits and the activations at named hook points.

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


def unsupported(where: str, got: str) -> LensError:
    """The refusal of an architecture whose way somewhere is another than the one computed here."""
    return LensError(f"this architecture's way {where} is not known: got {got}; use another model")
