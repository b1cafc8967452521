"""Checks that a faster computation gives the model's own results: run once per model, on a few tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from lcc_lens.core.errors import LensError
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook
from lcc_lens.models.hooked.offloading import device_of

Verdict = TypeVar("Verdict")
#: Errors of a check on a model that lacks what the faster computation needs.
FAILURES = (AttributeError, RuntimeError, TypeError, ValueError, KeyError, IndexError)


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


#: The same operations on the same shapes, some of them skipped.
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
                except FAILURES:
                    verdicts[key] = on_failure
            return verdicts[key]

        return remembered

    return decorate


def is_close(
    result: Tensor, expected: Tensor, tolerance: Tolerance, dtype: torch.dtype, *, by_norm: bool = False
) -> bool:
    """Whether a result equals the model's, up to rounding and in shape.

    Args:
        dtype: the number format that the model computes in; a result in a coarser one has that one's tolerance.
        by_norm: compare Euclidean norms instead of the largest deviation, for values with large rounding errors.
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
    """The tokens that a model is checked with; none whose embedding is zero, as that of padding often is."""
    tokens = spread_tokens(int(model.cfg.d_vocab), device_of(model), int(model.cfg.n_ctx))
    for module in cast("torch.nn.Module", model).modules():
        weight = getattr(module, "weight", None) if isinstance(module, torch.nn.Embedding) else None
        if weight is not None and len(weight) > int(tokens.max()):
            known = weight.any(dim=1).nonzero().flatten()
            return known[tokens % len(known)] if len(known) < len(weight) else tokens
    return tokens


def run_with_activations(
    model: HookedModel, tokens: Tensor, names: list[str], hooks: list[NamedHook] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a model, with hooks if given; returns its logits and the activations at named hook points.

    Raises:
        LensError: a hook point is missing.
    """
    missing = [name for name in names if name not in model.hook_dict]
    if missing:
        raise unsupported("of head outputs", f"no hook point {missing[0]}")
    activations: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor, hook: Any) -> None:
        activations[name] = value.detach().clone()

    keepers = [(name, functools.partial(keep, name)) for name in names]
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[*(hooks or []), *keepers])
    return logits, activations


def unsupported(path: str, got: str) -> LensError:
    """The error for an architecture that computes a path (such as residual stream to logits) in an unknown way."""
    return LensError(f"expected a known path {path} in this architecture, got {got}; use another model")
