"""How long plain transformers models take, measured side by side: interleaved rounds, medians with intervals."""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lcc_lens.core.progress import track

#: Tokens that are in the cache before decoding is timed.
DECODE_PROMPT = 16
#: Rounds that are run and not counted: caches fill, kernels are chosen, clocks rise.
WARM_UP = 2
#: What an interval should cover.
CONFIDENCE = 0.95


def interleaved(jobs: Mapping[str, Callable[[], float]], repeats: int, description: str) -> dict[str, list[float]]:
    """Run every job once a round and rotate their order, so that a drift of the machine meets all of them alike.

    Args:
        jobs: by name, each returns its own duration.
        repeats: rounds that count; :data:`WARM_UP` rounds go before them.
        description: a few words beside the progress bar.

    Returns:
        Durations by name, the i-th of every job from the same round.
    """
    names = list(jobs)
    durations: dict[str, list[float]] = {name: [] for name in names}
    for number in track(range(WARM_UP + repeats), WARM_UP + repeats, description):
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            duration = jobs[name]()
            if number >= WARM_UP:
                durations[name].append(duration)
    return durations


def median_interval(values: Sequence[float]) -> dict[str, float]:
    r"""The median with the interval between two order statistics that covers the true median.

    For the sorted values $x_1 \le \dots \le x_n$, $[x_k, x_{n+1-k}]$ covers the median of whatever distribution they
    come from with probability $1 - 2 P(B \le k - 1)$, $B$ binomial with $n$ trials of one half. Taken is the largest
    $k$ for which that is at least 95 %; fewer than six values have none, and the interval then runs from the smallest
    to the largest with the lower coverage that is reported.

    Args:
        values: independent measurements, at least one.

    Returns:
        ``median``, ``low``, ``high`` in the values' unit, and ``coverage``, a probability.

    Example:
        >>> median_interval([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
        {'median': 3.5, 'low': 1.0, 'high': 6.0, 'coverage': 0.96875}
    """
    ordered, n = sorted(values), len(values)
    k = 1
    while k + 1 <= n // 2 and _coverage(n, k + 1) >= CONFIDENCE:
        k += 1
    return {
        "median": statistics.median(ordered),
        "low": ordered[k - 1],
        "high": ordered[n - k],
        "coverage": _coverage(n, k),
    }


def time_prefill(model: nn.Module, tokens: Int[Tensor, "1 pos"]) -> float:
    """Milliseconds of one forward pass over a prompt: it fills the cache and gives the last position's logits."""
    with torch.inference_mode():
        start = _now(tokens.device)
        model(tokens, use_cache=True, **_last_logits(model))
        return 1000 * (_now(tokens.device) - start)


def time_decode(model: nn.Module, tokens: Int[Tensor, "1 pos"], new_tokens: int) -> float:
    """Milliseconds per generated token: greedy, one at a time through the cache, without the prompt's pass."""
    with torch.inference_mode():
        output: Any = model(tokens, use_cache=True, **_last_logits(model))
        start = _now(tokens.device)
        for _ in range(new_tokens):
            chosen = output.logits[:, -1:].argmax(dim=-1)
            output = model(chosen, past_key_values=output.past_key_values, use_cache=True)
        return 1000 * (_now(tokens.device) - start) / new_tokens


def spread_tokens(n_tokens: int, d_vocab: int, device: torch.device) -> Int[Tensor, "1 pos"]:
    """A fixed sequence spread over the vocabulary; what dense kernels cost does not depend on it."""
    return (torch.arange(1, n_tokens + 1, device=device) * 7919 % d_vocab)[None]


def _last_logits(model: nn.Module) -> dict[str, int]:
    """The argument that keeps the output projection to the last position, for models that have it."""
    has = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if has else {}


def _now(device: torch.device) -> float:
    """Seconds, once everything that was started on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _coverage(n: int, k: int) -> float:
    below = sum(math.comb(n, i) for i in range(k))
    return float(max(0, 2**n - 2 * below) / 2**n)
