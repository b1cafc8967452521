"""Train a pruned model's decoder layers, window by window, to give the dense model's hidden states."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.config import package_version
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import require_space
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.machine.memory import total_memory
from lcc_lens.core.outputs.folders import reserved
from lcc_lens.core.progress import track
from lcc_lens.core.ranges import Count, Positive, Seed, check_numbers
from lcc_lens.pruning.calibration.finished_layers import FinishedLayers
from lcc_lens.pruning.calibration.stream import LayerStream
from lcc_lens.pruning.methods.pruners import Removed
from lcc_lens.pruning.output.zeros_kept import write_with_zeros
from lcc_lens.pruning.reconstruct.window import StoredNames, Window, put, stored_parameters
from lcc_lens.pruning.refit.checks import require_refittable

logger = logging.getLogger(__name__)
RECONSTRUCTION = "reconstruction.json"
#: One of this many sequences is held out.
_HELD_OUT = 16
#: Of every trained parameter: itself, its gradient and Adam's two moments, in float32.
BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class ReconstructConfig:
    """How to reconstruct.

    Args:
        window: decoder layers that are trained together.
        epochs: passes over the training sequences, for each window.
        lr: Adam's learning rate at the first step; it falls to zero linearly.
        batch_size: sequences of an optimiser step.
        seed: seed of the draw of held-out sequences and of the training sequences' order.
    """

    window: Count = 5
    epochs: Count = 3
    lr: Positive = 3e-4
    batch_size: Count = 2
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_numbers(self)


def reconstruct_checkpoint(
    dense: Path,
    pruned: Path,
    out: Path,
    *,
    tokens: Int[Tensor, "sequence pos"],
    config: ReconstructConfig | None = None,
    device: torch.device,
    dtype: torch.dtype,
    overwrite: bool = False,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    r"""Train the surviving parameters of a pruned checkpoint's decoder layers, window by window; write the result.

    From the hidden states that the windows before it now give, a window learns to give the dense model's $h$ behind it:
    $\min \lVert \hat h - h \rVert^2 / \lVert h \rVert^2$, mean over tokens. Where that error does not fall on held-out
    sequences, the window stays as it was. Zeros stay zeros, bit for bit. Finished windows are kept beside ``out`` until
    all are written; after an interruption the same call continues there.

    Args:
        pruned: the dense model with zeros, pruned or refitted; ``out``: what to write, whole or not at all.
        tokens: sequences of equal length, without padding; one in sixteen is held out.
        dtype: format of products of matrices; parameters and sums are float32.
        provenance: where the tokens come from, for the record.

    Returns:
        The contents of ``reconstruction.json``: settings and, by window, the held-out error before and after.

    Raises:
        RequestError: not a dense model and its zeroed version, too few sequences, or too little memory for a window.
        LensError: an activation or a weight is not finite; nothing is written.

    Reference:
        Shin et al. 2024 (arXiv 2406.15524); arXiv 2510.14444.
    """
    config = config or ReconstructConfig()
    windows = require_reconstructable(dense, pruned, len(tokens), config, device)
    checkpoints = Checkpoint(dense), Checkpoint(pruned)
    split = _Split.of(len(tokens), config)
    with reserved(out, overwrite=overwrite, inputs=[dense, pruned]) as target:
        require_space(target, 2 * checkpoints[1].n_bytes)
        digests = {"dense_sha256": checkpoints[0].sha256, "pruned_sha256": checkpoints[1].sha256}
        finished = FinishedLayers(
            target, fingerprint("reconstruct", config, tokens, digests, dtype, device.type, package_version())
        )  # fmt: skip
        if finished.n_layers < len(windows):
            dense_stream, pruned_stream = (
                LayerStream.of(path, tokens, config.batch_size, device, dtype) for path in (dense, pruned)
            )
            _train_windows(dense_stream, pruned_stream, checkpoints[1], windows, split, config, finished)
        report = {
            **vars(config), **digests, "lcc_lens_version": package_version(),
            "calibration": {**provenance, "sequences": len(tokens), "length": tokens.shape[1]},
            "held_out_sequences": len(split.held_out), "windows": _recorded(windows, finished.notes),
        }  # fmt: skip
        report = write_with_zeros(*checkpoints, target, finished, (RECONSTRUCTION, report), overwrite=overwrite)
        finished.discard()
    return report


def require_reconstructable(
    dense: Path, pruned: Path, n_sequences: int, config: ReconstructConfig, device: torch.device
) -> list[list[StoredNames]]:
    """The windows of layers with the parameters to train; refuses what cannot be served, before any data are read.

    Raises:
        RequestError: see :func:`reconstruct_checkpoint`.
    """
    require_refittable(dense, pruned)
    _Split.of(n_sequences, config)
    checkpoint = Checkpoint(pruned)
    stored = stored_parameters(checkpoint)
    windows = [stored[start : start + config.window] for start in range(0, len(stored), config.window)]
    _require_memory(checkpoint, windows, device)
    return windows


@dataclass(frozen=True)
class _Split:
    """Which sequences train, as many as whole batches take, and which are held out."""

    training: Int[Tensor, " training"]
    held_out: Int[Tensor, " held_out"]
    batch_size: int

    @classmethod
    def of(cls, n_sequences: int, config: ReconstructConfig) -> _Split:
        least = config.batch_size + 1
        if n_sequences < least:
            raise RequestError(
                f"expected at least {least} sequences, {config.batch_size} of a step and one held out, got "
                f"{n_sequences}; raise --n-samples"
            )
        order = torch.randperm(n_sequences, generator=torch.Generator().manual_seed(config.seed))
        n_training = (n_sequences - max(1, n_sequences // _HELD_OUT)) // config.batch_size * config.batch_size
        return cls(order[:n_training], order[n_training:], config.batch_size)

    def training_batches(self, config: ReconstructConfig) -> list[Int[Tensor, " _"]]:
        generator = torch.Generator().manual_seed(config.seed)
        orders = (torch.randperm(len(self.training), generator=generator) for _ in range(config.epochs))
        return [self.training[batch] for order in orders for batch in order.split(self.batch_size)]

    def held_out_batches(self) -> list[Int[Tensor, " _"]]:
        return list(self.held_out.split(self.batch_size))


def _require_memory(checkpoint: Checkpoint, windows: Sequence[Sequence[StoredNames]], device: torch.device) -> None:
    """Refuse windows whose parameters, gradients and moments take more memory than the device has."""
    sizes = [
        sum(math.prod(checkpoint.tensors[name].shape) for names in window for name in names.values())
        for window in windows
    ]
    needed, there = max(sizes) * BYTES_PER_PARAMETER, total_memory(device)
    if there is not None and needed > there:
        raise RequestError(
            f"expected memory for the training of {len(windows[0])} layers, {needed / 2**30:.0f} GiB, got "
            f"{there / 2**30:.0f} GiB; choose --window {max(1, len(windows[0]) * there // needed)}"
        )


def _train_windows(
    dense: LayerStream,
    pruned: LayerStream,
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[StoredNames]],
    split: _Split,
    config: ReconstructConfig,
    finished: FinishedLayers,
) -> None:
    """Train the windows in order; each is on disk before the next begins."""
    batches = split.training_batches(config)
    progress = iter(track(range(len(windows) * len(batches)), len(windows) * len(batches), "reconstructing layers"))
    for index, stored in enumerate(windows):
        for _ in stored:
            dense.advance(past_last=True)
        if index < finished.n_layers:
            weights: Mapping[str, Tensor] = finished.layer(index)
            _skip(progress, len(batches))
        else:
            window = Window(pruned, checkpoint, stored)
            before = window.mean_error(dense, split.held_out_batches())
            n_steps = sum(1 for _ in zip(window.train(dense, batches, config.lr), progress, strict=False))
            _skip(progress, len(batches) - n_steps)
            weights = window.round()
            is_whole = n_steps == len(batches)  # it ended early where an error was not finite
            after = window.mean_error(dense, split.held_out_batches()) if is_whole else math.nan
            first = index * config.window
            if not after < before:
                weights = {}
                logger.warning(
                    "layers %d to %d stay as they were: training took their error on held-out sequences from %.3g to "
                    "%.3g", first, first + len(stored) - 1, before, after,
                )  # fmt: skip
            finished.add(weights, Removed(), {f"{index} before": before, f"{index} after": after})
            del window
        put(pruned.layers_ahead(len(stored)), stored, weights)
        for _ in stored:
            pruned.advance()
    _skip(progress, 1)


def _skip(progress: Any, n: int) -> None:
    """Pass over some steps."""
    for _ in islice(progress, n):
        pass


def _recorded(windows: Sequence[Sequence[StoredNames]], notes: Mapping[str, float]) -> list[dict[str, Any]]:
    """What the record says of each window."""
    found: list[dict[str, Any]] = []
    for index, window in enumerate(windows):
        first = found[-1]["last_layer"] + 1 if found else 0
        before, after = notes[f"{index} before"], notes[f"{index} after"]
        found.append({
            "first_layer": first, "last_layer": first + len(window) - 1, "error_before": before,
            "error_after": after if math.isfinite(after) else None, "is_kept": after < before,
        })  # fmt: skip
    return found
