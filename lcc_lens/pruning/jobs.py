"""The public functions `prune`, `refit` and `reconstruct`: from names of models and data to a checkpoint on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from lcc_lens.core.config import compute_dtype, default_device
from lcc_lens.core.errors import RequestError
from lcc_lens.core.outputs.folders import reserved
from lcc_lens.core.ranges import Count, Fraction, Length, Positive, Seed, Sparsity, ranged
from lcc_lens.data.checks import MIX
from lcc_lens.data.datasets import Data
from lcc_lens.models.architecture.sparsity_patterns import Pattern, Unstructured, parse_pattern
from lcc_lens.models.loading.references import resolve
from lcc_lens.pruning.calibration.texts import (
    PRUNE_DATA,
    REFIT_SAMPLES,
    Calibration,
    calibrated_groups,
    calibration_data,
    calibration_length,
    calibration_tokens,
    check_calibration,
    files_of,
    named_calibration,
)  # fmt: skip
from lcc_lens.pruning.methods.pruners import Choice, Split
from lcc_lens.pruning.methods.settings import PruneConfig
from lcc_lens.pruning.methods.structured import Schedule
from lcc_lens.pruning.output.report import PruningReport
from lcc_lens.pruning.prune import prune_checkpoint, require_prunable
from lcc_lens.pruning.reconstruct.reconstruct import ReconstructConfig, reconstruct_checkpoint, require_reconstructable
from lcc_lens.pruning.reconstruct.report import ReconstructionReport
from lcc_lens.pruning.refit.checks import require_refittable
from lcc_lens.pruning.refit.refit import RefitConfig, refit_checkpoint
from lcc_lens.pruning.refit.report import RefitReport

logger = logging.getLogger(__name__)
RECONSTRUCT_SAMPLES = 128


@ranged
def prune(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "wanda",
    sparsity: Sparsity | None = None,
    pattern: str | None = None,
    calibration: Calibration | None = None,
    n_samples: Count = 128,
    seq_len: Length | None = None,
    seed: Seed = 0,
    sliced: bool = False,
    schedule: Schedule | None = None,
    choice: Choice = "error",
    split: Split | None = None,
    overwrite: bool = False,
) -> PruningReport:
    """Prune a model into a plain Hugging Face directory with ``pruning.json`` beside the weights.

    Args:
        model: reference of the dense model.
        out: the directory to write.
        method: ``magnitude``, ``wanda`` or ``sparsegpt`` (single weights), ``slimgpt`` (whole heads and neurons), or
            the name of a pruner that was added with :func:`lcc_lens.register_pruner`.
        sparsity: fraction of the weights to remove; 0.5 by default (0.2 for slimgpt).
        pattern: N:M such as ``2:4`` instead of a fraction: N of every M weights stay.
        calibration: data whose activations the method reads (loaded in the role ``calibration``); ``c4`` if not given,
            or ``mix`` where that cannot be had. What the dense model writes (``self``) is kept beside ``out``.
        n_samples: calibration sequences.
        seq_len: tokens per calibration sequence; 512, or the model's context if shorter.
        seed: seed of the draw of calibration data.
        sliced: write a smaller model of standard configuration instead of zeros (slimgpt only).
        schedule: how slimgpt distributes the sparsity over the layers; ``log`` by default, ``uniform`` if sliced.
        choice: how slimgpt chooses heads and neurons: by ``error``, or the controls ``magnitude`` and ``random``.
        split: how many heads slimgpt removes per layer: their fraction rounded down (``spared``, the default), to the
            nearest (``proportional``), or by ``error``; neurons make up the difference.
        overwrite: replace an existing directory.

    Raises:
        RequestError: the method is unknown, both a sparsity and a pattern are given, or the request does not fit the
            model; nothing is written.

    Returns:
        The contents of ``pruning.json``.
    """
    target = _target(method, sparsity, pattern)
    config = PruneConfig(method, target, seed=seed, sliced=sliced, schedule=schedule, choice=choice, split=split)
    path, device, named = resolve(model), default_device(), _data_read(config, calibration, n_samples, seq_len)
    length = calibration_length(path, seq_len) if config.uses_inputs else 0
    require_prunable(path, config, n_samples * length)
    tokens, provenance = None, dict[str, Any](dense=str(model))
    with reserved(Path(out), overwrite=overwrite, inputs=[path, *files_of([model, *named])]) as folder:
        if config.uses_inputs:
            data = calibration_data(named, model, folder, n_samples, length, seed)
            tokens = calibration_tokens(data, path, n_samples, length, seed)
            provenance |= {"data": data.name, "source": data.source, "groups": sorted(data.groups)}
        return PruningReport(prune_checkpoint(
            path, folder, config, calibration=tokens, device=device, dtype=compute_dtype(device), overwrite=overwrite,
            provenance=provenance,
        ))  # fmt: skip


def _data_read(
    config: PruneConfig, calibration: Calibration | None, n_samples: int, seq_len: int | None
) -> list[str | Data]:
    """The data that a method reads, none for one that needs none."""
    if config.uses_inputs:
        named = named_calibration(calibration, PRUNE_DATA)
        check_calibration(named, n_samples)
        return named
    if calibration is not None or seq_len is not None:
        logger.warning("%s reads no calibration data: ignored what was named for it, and its length", config.method)
    return []


def _target(method: str, sparsity: float | None, pattern: str | None) -> Pattern:
    """How many weights to remove, and where."""
    if sparsity is not None and pattern is not None:
        raise RequestError(f"expected a sparsity or a pattern, got both ({sparsity} and {pattern}); leave one out")
    fraction = sparsity if sparsity is not None else 0.2 if method == "slimgpt" else 0.5
    return Unstructured(fraction) if pattern is None else parse_pattern(pattern)


@ranged
def refit(
    dense: str | Path,
    pruned: str | Path,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    n_samples: Count = REFIT_SAMPLES,
    seq_len: Length | None = None,
    follow: Fraction = RefitConfig.follow,
    ridge: Positive = RefitConfig.ridge,
    mend: Fraction = RefitConfig.mend,
    seed: Seed = 0,
    overwrite: bool = False,
) -> RefitReport:
    """Fit the surviving weights of a pruned model by least squares; nothing is trained, and all zeros stay.

    Args:
        dense: reference of the dense model.
        pruned: reference of the same model with zeros.
        out: the directory to write.
        calibration: data whose activations are fitted (their role is ``calibration``); several sets in equal parts.
            :data:`REFIT_DATA` if not given, or ``mix`` where one of them cannot be had.
        n_samples: calibration sequences in all.
        seq_len: tokens per sequence; 512, or the model's context if shorter.
        follow: interpolates the regression inputs between the pruned model's (0) and the dense model's (1).
        ridge: strength of the pull towards the dense weights, as a fraction of the inputs' mean square.
        mend: fraction of the residual-stream error that output projections correct.
        seed: seed of the draw of calibration data; ``overwrite``: replace an existing directory.

    Returns:
        The contents of ``refit.json``; see :func:`lcc_lens.pruning.refit.refit.refit_checkpoint`.

    Raises:
        RequestError: the two are not a dense model and its zeroed version, or too little text; nothing is written.

    Example:
        >>> refit("smollm2", "out/wanda50", "out/wanda50-refit")  # doctest: +SKIP
    """
    config = RefitConfig(follow, ridge, mend)
    with _calibrated(dense, pruned, Path(out), calibration, n_samples, seq_len, seed, overwrite) as job:
        device = default_device()
        report = refit_checkpoint(
            *job.models, job.out, tokens=job.tokens, config=config, device=device, dtype=compute_dtype(device),
            overwrite=overwrite, provenance=job.provenance,
        )  # fmt: skip
    return RefitReport(report)


@ranged
def reconstruct(
    dense: str | Path,
    pruned: str | Path,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    n_samples: Count = RECONSTRUCT_SAMPLES,
    seq_len: Length | None = None,
    window: Count = ReconstructConfig.window,
    epochs: Count = ReconstructConfig.epochs,
    lr: Positive = ReconstructConfig.lr,
    batch_size: Count = ReconstructConfig.batch_size,
    seed: Seed = 0,
    overwrite: bool = False,
) -> ReconstructionReport:
    """Train a pruned model's decoder layers, some at a time, to give the dense model's hidden states; zeros stay.

    For models that do not fit for a training as a whole: the training state of ``window`` layers alone is in memory.
    Best after :func:`refit`. Where the model fits, ``best`` recovers more.

    Args:
        dense: reference of the dense model.
        pruned: reference of the same model with zeros, pruned or refitted.
        out: the directory to write.
        calibration: data whose hidden states are matched (their role is ``calibration``); several sets in equal parts.
            ``mix`` if not given.
        n_samples: sequences in all, of which one in sixteen is held out.
        seq_len: tokens per sequence; 512, or the model's context if shorter.
        window: decoder layers that are trained together.
        epochs: passes over the sequences, for each window.
        lr: learning rate at the first step; it falls to zero.
        batch_size: sequences of an optimiser step.
        seed: seed of the draws of data, of held-out sequences and of their order.
        overwrite: replace an existing directory.

    Returns:
        The contents of ``reconstruction.json``; see
        :func:`lcc_lens.pruning.reconstruct.reconstruct.reconstruct_checkpoint`.

    Raises:
        RequestError: the two are not a dense model and its zeroed version, or too little text or memory; nothing is
            written.

    Example:
        >>> reconstruct("smollm2", "out/wanda50-refit", "out/wanda50-reconstructed")  # doctest: +SKIP
    """
    config = ReconstructConfig(window, epochs, lr, batch_size, seed)
    device, chosen = default_device(), MIX if calibration is None else calibration
    require_reconstructable(resolve(dense), resolve(pruned), n_samples, config, device)
    with _calibrated(dense, pruned, Path(out), chosen, n_samples, seq_len, seed, overwrite) as job:
        report = reconstruct_checkpoint(
            *job.models, job.out, tokens=job.tokens, config=config, device=device, dtype=compute_dtype(device),
            overwrite=overwrite, provenance=job.provenance,
        )  # fmt: skip
    return ReconstructionReport(report)


class _Job(NamedTuple):
    """What a job on a dense model and its pruned version reads and writes."""

    models: tuple[Path, Path]
    out: Path
    tokens: Int[Tensor, "sequence pos"]
    provenance: dict[str, Any]


@contextmanager
def _calibrated(
    dense: str | Path,
    pruned: str | Path,
    out: Path,
    calibration: Calibration | None,
    n_samples: int,
    seq_len: int | None,
    seed: int,
    overwrite: bool,
) -> Iterator[_Job]:
    """Check a pair, hold the folder to write, and read the data to calibrate on."""
    named = named_calibration(calibration)
    check_calibration(named, n_samples)
    models = resolve(dense), resolve(pruned)
    require_refittable(*models)
    with reserved(out, overwrite=overwrite, inputs=[*models, *files_of([dense, pruned, *named])]) as target:
        length = calibration_length(models[1], seq_len)
        data = calibration_data(named, dense, target, n_samples, length, seed)
        tokens = calibration_tokens(data, models[1], n_samples, length, seed)
        # What the pruned model was calibrated on before counts too.
        groups = calibrated_groups(models[1]) | data.groups
        source = [part.source for part in data.parts or (data,)]
        yield _Job(models, target, tokens, {
            "data": data.name, "source": source, "groups": sorted(groups), "dense": str(dense), "pruned": str(pruned),
            "seed": seed,
        })  # fmt: skip
