"""Perplexity, the recovered fraction of a loss, and bootstrap intervals."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int16
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def perplexity(nll: float, n_tokens: int) -> float:
    """Perplexity from a summed negative log-likelihood in nats; infinity where it exceeds a float."""
    try:
        return math.exp(nll / n_tokens)
    except OverflowError:
        return math.inf


def share_recovered(dense: float, pruned: float, restored: float) -> float | None:
    r"""The fraction of the lost log-likelihood that a restoration recovers, $(p - r) / (p - d)$.

    Args:
        dense: loss of the dense model, nats per token.
        pruned: loss of the pruned model, nats per token.
        restored: loss of the restored model, nats per token.

    Returns:
        1 for full recovery, 0 for none, negative for harm; None if pruning lost nothing.

    Example:
        >>> share_recovered(dense=2.0, pruned=3.0, restored=2.4)
        0.6
    """
    lost = pruned - dense
    if not math.isfinite(lost) or lost <= 0:
        return None
    return round((pruned - restored) / lost, 12)


def learned_warning(losses: Mapping[str, float]) -> str | None:
    """Say that training taught the task rather than restored the model, where the held-out losses show it.

    Args:
        losses: nats per token of the ``dense``, the ``pruned`` and the ``restored`` model.

    Returns:
        A sentence if the dense model is no better than the pruned one, or the restored one better than the dense one;
        None otherwise, and where a loss is missing.

    Example:
        >>> learned_warning({"dense": 2.0, "pruned": 3.0, "restored": 2.4}) is None
        True
    """
    dense, pruned, restored = (losses.get(name, math.nan) for name in ("dense", "pruned", "restored"))
    if dense >= pruned:
        fact = f"the dense model's loss ({dense:.3f}) is not below the pruned one's ({pruned:.3f})"
        return f"{fact}: pruning lost nothing there, so a gain is the task learned, not restored; name other data"
    if restored < dense:
        fact = f"the restored model's loss ({restored:.3f}) is below the dense one's ({dense:.3f})"
        return f"{fact}: training also taught the task, which is not restoring; measure on other text"
    return None


def standard_error(values: Float[Tensor, "example ..."]) -> Float[Tensor, "..."]:
    """The standard error of the mean over the first axis; NaN for a single example."""
    n = len(values)
    return values.std(0) / math.sqrt(n) if n > 1 else torch.full_like(values[0], math.nan)


def _remembered(interval: Callable[_P, _R]) -> Callable[_P, _R]:
    """Cache intervals by their arguments: a comparison requests all of them again whenever a run is finished."""
    known: dict[str, _R] = {}

    @functools.wraps(interval)
    def cached(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        key = sha256(repr((args, sorted(kwargs.items()))).encode()).hexdigest()
        if key not in known:
            known[key] = interval(*args, **kwargs)
        return known[key]

    return cached


@_remembered
def bootstrap_interval(
    numerators: Sequence[float],
    denominators: Sequence[float] | None = None,
    *,
    level: float = 0.95,
    n_samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    r"""Percentile bootstrap interval of $\sum_i a_i / \sum_i b_i$ over resampled items (Efron 1979).

    With differences of two models on the same items as ``numerators`` the interval is a paired one.

    Args:
        denominators: b; ones if not given, so that the statistic is a mean.
        level: fraction of the resamples inside the interval.
    """
    a = torch.tensor(numerators, dtype=torch.float64)
    b = torch.ones_like(a) if denominators is None else torch.tensor(denominators, dtype=torch.float64)
    if not len(a) or len(a) != len(b):
        raise ValueError(f"expected as many numerators as denominators, at least one, got {len(a)} and {len(b)}")
    drawn = torch.randint(len(a), (n_samples, len(a)), generator=torch.Generator().manual_seed(seed))
    statistics = a[drawn].sum(1) / b[drawn].sum(1)
    low, high = torch.quantile(statistics, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return float(low), float(high)


@_remembered
def stratified_interval(
    numerators: Sequence[Sequence[float]],
    denominators: Sequence[Sequence[float]] | None = None,
    *,
    level: float = 0.95,
    n_samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    r"""Percentile bootstrap interval of $\sum_t \bar a_t / \sum_t \bar b_t$ over items resampled within each stratum t.

    With the differences of two models on the items of several tasks as ``numerators`` it is the paired interval of
    their difference in mean accuracy, with equal weight for every task. With the accuracy lost on the same items as
    ``denominators`` it is the interval of the recovered fraction.

    Args:
        denominators: b, as long as a; ones if not given.
        level: fraction of the resamples inside the interval.

    Returns:
        None if the interval of the denominator includes 0: the ratio is then unbounded (Fieller 1954). Single resamples
        whose denominator is not positive are left out.
    """
    shapes = [len(stratum) for stratum in numerators]
    if not shapes or not all(shapes) or (denominators is not None and [len(b) for b in denominators] != shapes):
        raise ValueError(f"expected strata with items, as many denominators as numerators, got {shapes}")
    quantiles = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    above, below = torch.zeros(2, n_samples, dtype=torch.float64)
    for stratum, times in enumerate(_times_drawn(tuple(shapes), n_samples, seed)):
        a, weights = torch.tensor(numerators[stratum], dtype=torch.float64), times.double()
        b = torch.ones_like(a) if denominators is None else torch.tensor(denominators[stratum], dtype=torch.float64)
        above += (weights @ a) / len(a)
        below += (weights @ b) / len(b)
    if float(torch.quantile(below, quantiles[0])) <= 0:
        return None
    low, high = torch.quantile((above / below)[below > 0], quantiles)
    return float(low), float(high)


@functools.lru_cache(maxsize=2)
def _times_drawn(sizes: tuple[int, ...], n_samples: int, seed: int) -> list[Int16[Tensor, "sample item"]]:
    """By stratum, how often each resample holds each item; a comparison asks for hundreds of intervals of one shape."""
    generator = torch.Generator().manual_seed(seed)
    counts = []
    for n in sizes:
        times = torch.zeros(n_samples, n, dtype=torch.int16)
        for part in times.split(max(1, 2**20 // n)):  # all at once would take gigabytes
            drawn = torch.randint(n, part.shape, generator=generator)
            part.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.int16))
        counts.append(times)
    return counts
