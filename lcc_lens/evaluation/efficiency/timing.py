"""Time plain transformers models in interleaved rounds: prefill, decoding, and 2:4 models on sparse GPU kernels."""

from __future__ import annotations

import functools
import inspect
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lcc_lens.core.config import compute_dtype, default_device
from lcc_lens.core.errors import RequestError
from lcc_lens.core.progress import track
from lcc_lens.core.ranges import Count, check_numbers
from lcc_lens.evaluation.efficiency.semi_structured import require_kernels, to_semi_structured
from lcc_lens.models.architecture.caches import cache_name, cache_of
from lcc_lens.models.architecture.context import context_of
from lcc_lens.models.architecture.layers import read_config
from lcc_lens.models.loading.plain import load_plain

#: Tokens in the KV cache before decoding is timed.
DECODE_PROMPT = 16
#: Rounds before the timed ones, in which caches fill, kernels are chosen and clocks rise.
WARM_UP = 2
#: Probability with which an interval covers the true median.
CONFIDENCE = 0.95
#: Times by kind and model, one per round.
Durations = dict[str, dict[str, list[float]]]
K = TypeVar("K")


@dataclass(frozen=True)
class SpeedConfig:
    """What is timed, and how often.

    Raises:
        RequestError: a number is below one.
    """

    repeats: Count = 15
    """Timed rounds."""
    prompt_tokens: Count = 256
    """Tokens of the timed forward pass."""
    new_tokens: Count = 24
    """Tokens generated one by one after a short prompt."""

    def __post_init__(self) -> None:
        check_numbers(self)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that a model reads."""
        return max(self.prompt_tokens, DECODE_PROMPT + self.new_tokens)


@dataclass(frozen=True)
class Speed:
    """Times by model; kinds are ``prefill``, ``decode`` and, where it ran, ``prefill_semi_structured``."""

    milliseconds: dict[str, dict[str, dict[str, Any]]]
    """By name and kind: median and interval, ``repeats``, and the ``tokens`` that were timed."""
    ratios: dict[str, dict[str, dict[str, float]]]
    """By name and kind: time as a multiple of the first model's on dense kernels in the same round."""
    notes: dict[str, str]
    """For every 2:4 model, whether it ran on sparse kernels."""


def require_context(paths: Mapping[str, Path], n_tokens: int) -> None:
    """Refuse sequences longer than a model's position table."""
    for name, path in paths.items():
        longest = context_of(read_config(path))
        if longest is not None and n_tokens > longest:
            raise RequestError(f"expected at most {longest} tokens for {name}, got {n_tokens}; ask for fewer tokens")


def measure_speed(paths: Mapping[str, Path], config: SpeedConfig, *, semi_structured: Collection[str] = ()) -> Speed:
    """Load every model into memory at once and time them in interleaved rounds, in one format on one device.

    Args:
        paths: local Hugging Face directories by name; the first is the reference of the ratios.
        semi_structured: names of exactly 2:4 models, timed once more on the GPU's sparse kernels where it has them.

    Raises:
        RequestError: a model does not load.
        LensError: a weight is NaN or infinite.
    """
    models: dict[str, nn.Module] = {
        name: load_plain(path) for name, path in track(paths.items(), len(paths), "loading")
    }
    sparse: dict[str, nn.Module] = {}
    notes: dict[str, str] = {}
    for name in semi_structured:
        try:
            sparse[name], notes[name] = _on_sparse_kernels(paths[name])
        except RequestError as refusal:
            notes[name] = f"not run: {refusal}"
    d_vocab = min(read_config(path).get_text_config().vocab_size for path in paths.values())
    durations = time_models(models, config, d_vocab, default_device(), sparse=sparse)
    return _summarise(durations, config, notes)


def time_models(
    models: Mapping[str, nn.Module],
    config: SpeedConfig,
    d_vocab: int,
    device: torch.device,
    *,
    sparse: Mapping[str, nn.Module] | None = None,
) -> Durations:
    """Milliseconds of ``prefill`` and ``decode`` (per token) by kind and name, in interleaved rounds.

    Args:
        sparse: models on 2:4 kernels, whose prefill is timed in the same rounds as ``prefill_semi_structured``.
    """
    prompt, start = (spread_tokens(n, d_vocab, device) for n in (config.prompt_tokens, DECODE_PROMPT))
    prefill = {("prefill", name): functools.partial(time_prefill, m, prompt) for name, m in models.items()}
    for name, model in (sparse or {}).items():
        prefill["prefill_semi_structured", name] = functools.partial(time_prefill, model, prompt)
    decode = {
        ("decode", name): functools.partial(time_decode, m, start, config.new_tokens) for name, m in models.items()
    }
    durations: Durations = {}
    for jobs, description in ((prefill, "prefill"), (decode, "decode")):
        for (kind, name), values in interleaved(jobs, config.repeats, description).items():
            durations.setdefault(kind, {})[name] = values
    return durations


def interleaved(jobs: Mapping[K, Callable[[], float]], repeats: int, description: str) -> dict[K, list[float]]:
    """Run every job once per round in rotating order, so that a drift of the machine affects all alike.

    Args:
        repeats: timed rounds, after :data:`WARM_UP` others.

    Returns:
        Durations by name, the i-th of every job from the same round.
    """
    names = list(jobs)
    durations: dict[K, list[float]] = {name: [] for name in names}
    for number in track(range(WARM_UP + repeats), WARM_UP + repeats, description):
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            duration = jobs[name]()
            if number >= WARM_UP:
                durations[name].append(duration)
    return durations


def median_interval(values: Sequence[float]) -> dict[str, float]:
    r"""The median with the interval between two order statistics that covers the true median.

    For sorted values $x_1 \le \dots \le x_n$, $[x_k, x_{n+1-k}]$ covers the median of any continuous distribution with
    probability $1 - 2 P(B \le k - 1)$, $B$ binomial with $n$ trials of one half. $k$ is the largest for which that is
    at least 95 %. Fewer than six values have none: the interval is the whole range, with a lower ``coverage``.

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


def median_ratio(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """The :func:`median_interval` of the ratios to ``base`` round by round."""
    return median_interval([value / reference for value, reference in zip(values, base, strict=True)])


def time_prefill(model: nn.Module, tokens: Int[Tensor, "1 pos"]) -> float:
    """Milliseconds of one forward pass over a prompt that fills the KV cache and gives the last position's logits."""
    with torch.inference_mode():
        start = now(tokens.device)
        model(tokens, use_cache=True, **_last_logits(model))
        return 1000 * (now(tokens.device) - start)


def time_decode(model: nn.Module, tokens: Int[Tensor, "1 pos"], new_tokens: int) -> float:
    """Milliseconds per token of greedy decoding with the KV cache, without the pass over the prompt."""
    name = cache_name(model.forward)
    with torch.inference_mode():
        output: Any = model(tokens, use_cache=True, **_last_logits(model))
        start = now(tokens.device)
        for _ in range(new_tokens):
            chosen = output.logits[:, -1:].argmax(dim=-1)
            output = model(chosen, **{name: cache_of(output)}, use_cache=True)
        return 1000 * (now(tokens.device) - start) / new_tokens


def spread_tokens(n_tokens: int, d_vocab: int, device: torch.device) -> Int[Tensor, "1 pos"]:
    """A fixed sequence spread over the vocabulary; the time of dense kernels does not depend on it."""
    return (torch.arange(1, n_tokens + 1, device=device) * 7919 % d_vocab)[None]


def _summarise(durations: Durations, config: SpeedConfig, notes: dict[str, str]) -> Speed:
    names = list(durations["prefill"])
    milliseconds: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    ratios: dict[str, dict[str, dict[str, float]]] = {name: {} for name in names}
    for kind, by_name in durations.items():
        base, n_tokens = ("decode", config.new_tokens) if kind == "decode" else ("prefill", config.prompt_tokens)
        for name, values in by_name.items():
            milliseconds[name][kind] = {**median_interval(values), "repeats": len(values), "tokens": n_tokens}
            ratios[name][kind] = median_ratio(values, durations[base][names[0]])
    return Speed(milliseconds, ratios, notes)


def _on_sparse_kernels(path: Path) -> tuple[nn.Module, str]:
    """A second copy of a 2:4 model on sparse kernels, and a note on it."""
    device = default_device()
    require_kernels(device, compute_dtype(device))
    model = load_plain(path)
    return model, f"{to_semi_structured(model)} matrices on semi-structured kernels"


def _last_logits(model: nn.Module) -> dict[str, int]:
    """The argument that computes logits at the last position only, for models that have it."""
    has = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if has else {}


def now(device: torch.device) -> float:
    """Seconds on the clock once the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _coverage(n: int, k: int) -> float:
    below = sum(math.comb(n, i) for i in range(k))
    return float(max(0, 2**n - 2 * below) / 2**n)
