"""Plain transformers models timed against each other: prefill, decoding, and 2:4 models on the GPU's sparse kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lcc_lens.core.config import compute_dtype, default_device
from lcc_lens.core.errors import RequestError
from lcc_lens.core.progress import track
from lcc_lens.latency import DECODE_PROMPT, interleaved, median_interval, spread_tokens, time_decode, time_prefill
from lcc_lens.models.architecture.layers import read_config
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.pruning.semi_structured import require_kernels, to_semi_structured

Durations = dict[str, list[float]]


@dataclass(frozen=True)
class SpeedConfig:
    """What is timed, and how often.

    Raises:
        RequestError: a number is below one.
    """

    repeats: int = 15
    """Timed rounds."""
    prompt_tokens: int = 256
    """Tokens of the timed forward pass."""
    new_tokens: int = 24
    """Tokens generated one by one after a short prompt."""

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if number < 1:
                raise RequestError(
                    f"wanted {name.replace('_', ' ')} of at least 1, got {number}; give a positive number"
                )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that a model will see."""
        return max(self.prompt_tokens, DECODE_PROMPT + self.new_tokens)


@dataclass(frozen=True)
class Speed:
    """Times by model; kinds are ``prefill``, ``decode`` and, where it ran, ``prefill_semi_structured``."""

    milliseconds: dict[str, dict[str, dict[str, Any]]]
    """By name and kind: median and interval, ``repeats``, and the ``tokens`` that were timed."""
    ratios: dict[str, dict[str, dict[str, float]]]
    """By name and kind: time as a multiple of the first model's on dense kernels, formed within each round."""
    notes: dict[str, str]
    """What came of the sparse kernels, for every 2:4 model."""


def require_context(paths: Mapping[str, Path], n_tokens: int) -> None:
    """Refuse sequences longer than a model's position table before anything is measured.

    Raises:
        RequestError: a model takes fewer tokens.
    """
    for name, path in paths.items():
        longest = getattr(read_config(path).get_text_config(), "max_position_embeddings", None)
        if longest is not None and n_tokens > longest:
            raise RequestError(f"wanted at most {longest} tokens for {name}, got {n_tokens}; ask for fewer tokens")


def measure_speed(paths: Mapping[str, Path], config: SpeedConfig, *, semi_structured: Collection[str] = ()) -> Speed:
    """Load every model into memory at once and time them in interleaved rounds, in one format on one device.

    Args:
        paths: local Hugging Face directories by name, the one that the others are held to first.
        config: what is timed.
        semi_structured: names of exactly 2:4 models, timed once more on the GPU's sparse kernels where it has them.

    Raises:
        RequestError: a model does not load.
        LensError: a weight is NaN or infinite.
    """
    device = default_device()
    models: dict[str, nn.Module] = {
        name: load_plain(path, strict=False) for name, path in track(paths.items(), len(paths), "loading")
    }
    sparse: dict[str, nn.Module] = {}
    notes: dict[str, str] = {}
    for name in semi_structured:
        try:
            sparse[name], notes[name] = _on_sparse_kernels(paths[name])
        except RequestError as refusal:
            notes[name] = f"not run: {refusal}"
    d_vocab = min(read_config(path).get_text_config().vocab_size for path in paths.values())
    prompt, start = (spread_tokens(n, d_vocab, device) for n in (config.prompt_tokens, DECODE_PROMPT))
    jobs: dict[str, Callable[[], float]] = {
        _job(kind, name): functools.partial(time_prefill, model, prompt)
        for kind, group in (("prefill", models), ("prefill_semi_structured", sparse))
        for name, model in group.items()
    }
    durations = interleaved(jobs, config.repeats, "prefill")
    durations |= interleaved(
        {
            _job("decode", name): functools.partial(time_decode, model, start, config.new_tokens)
            for name, model in models.items()
        },
        config.repeats,
        "decode",
    )
    return _summarise(durations, list(models), config, notes)


def _summarise(durations: Durations, names: list[str], config: SpeedConfig, notes: dict[str, str]) -> Speed:
    milliseconds: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    ratios: dict[str, dict[str, dict[str, float]]] = {name: {} for name in names}
    for kind, base, n_tokens in (
        ("prefill", "prefill", config.prompt_tokens),
        ("prefill_semi_structured", "prefill", config.prompt_tokens),
        ("decode", "decode", config.new_tokens),
    ):
        first = durations[_job(base, names[0])]
        for name in names:
            values = durations.get(_job(kind, name))
            if values is not None:
                milliseconds[name][kind] = {**median_interval(values), "repeats": len(values), "tokens": n_tokens}
                ratios[name][kind] = median_interval([v / f for v, f in zip(values, first, strict=True)])
    return Speed(milliseconds, ratios, notes)


def _on_sparse_kernels(path: Path) -> tuple[nn.Module, str]:
    """A second copy of a 2:4 model, converted, and a note on it."""
    device = default_device()
    require_kernels(device, compute_dtype(device))
    model = load_plain(path, strict=False)
    return model, f"{to_semi_structured(model)} matrices on semi-structured kernels"


def _job(kind: str, name: str) -> str:
    return f"{kind} {name}"
