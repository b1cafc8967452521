"""The public functions `prune` and `refit`: from names of models and data to a checkpoint on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcc_lens.core.config import compute_dtype, default_device
from lcc_lens.core.errors import RequestError
from lcc_lens.core.outputs.folders import reserved
from lcc_lens.core.ranges import Count, Fraction, Length, Positive, Seed, Sparsity, ranged
from lcc_lens.core.reading import read_json
from lcc_lens.data.batches import require_tokens
from lcc_lens.data.checks import or_mix
from lcc_lens.data.datasets import Data, joined, load_data, text_sequences
from lcc_lens.data.registry import part_names
from lcc_lens.models.architecture.context import context_of, fitting_length
from lcc_lens.models.architecture.layers import read_config
from lcc_lens.models.architecture.sparsity_patterns import Pattern, Unstructured, parse_pattern
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.self_written import DenseWriter
from lcc_lens.pruning.methods.pruners import Choice, Split
from lcc_lens.pruning.methods.settings import PruneConfig
from lcc_lens.pruning.methods.structured import Schedule
from lcc_lens.pruning.output.report import PruningReport
from lcc_lens.pruning.prune import prune_checkpoint, require_prunable
from lcc_lens.pruning.refit.checks import require_refittable
from lcc_lens.pruning.refit.refit import REFIT_RECORD, RefitConfig, refit_checkpoint
from lcc_lens.pruning.refit.report import RefitReport

logger = logging.getLogger(__name__)
#: Data, names of data (several joined by ``+``), or a sequence of them, from which equally many sequences are cut.
Calibration = str | Path | Data | Sequence[str | Path | Data]
PRUNE_DATA = ("c4",)
#: What a refit is calibrated on: instructions, web text and an encyclopedia.
REFIT_DATA = ("alpaca", "c4", "wikitext")
REFIT_SAMPLES = 288


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
    with reserved(Path(out), overwrite=overwrite, inputs=[path, *_files_of([model, *named])]) as folder:
        if config.uses_inputs:
            data = _calibration_data(named, model, folder, n_samples, length, seed)
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
    named = named_calibration(calibration)
    check_calibration(named, n_samples)
    config = RefitConfig(follow, ridge, mend)
    paths = resolve(dense), resolve(pruned)
    require_refittable(*paths)
    with reserved(Path(out), overwrite=overwrite, inputs=[*paths, *_files_of([dense, pruned, *named])]) as target:
        seq_len = calibration_length(paths[1], seq_len)
        data = _calibration_data(named, dense, target, n_samples, seq_len, seed)
        tokens = calibration_tokens(data, paths[1], n_samples, seq_len, seed)
        # data that the pruned model was already refitted on count too
        groups = recorded_groups(paths[1] / REFIT_RECORD) | data.groups
        source = [part.source for part in data.parts or (data,)]
        provenance = {"data": data.name, "source": source, "groups": sorted(groups)}
        device = default_device()
        report = refit_checkpoint(
            *paths, target, tokens=tokens, config=config, device=device, dtype=compute_dtype(device),
            overwrite=overwrite, provenance={**provenance, "dense": str(dense), "pruned": str(pruned), "seed": seed},
        )  # fmt: skip
    return RefitReport(report)


def named_calibration(calibration: Calibration | None, default: tuple[str, ...] = REFIT_DATA) -> list[str | Data]:
    """The data that a calibration names, or those that replace its default where that cannot be had."""
    chosen = or_mix(*default) if calibration is None else calibration
    parts = [chosen] if isinstance(chosen, str | Path | Data) else chosen
    return [part if isinstance(part, Data) else str(part) for part in parts]


def _calibration_data(
    named: Sequence[str | Data], dense: str | Path, out: Path, n_samples: int, seq_len: int, seed: int
) -> Data:
    """Load data to calibrate on, enough for all parts; what the dense model writes itself is kept beside the output."""
    writer = DenseWriter(dense, out.with_name(f"{out.name}_self_written"), n_samples, seq_len).divided(len(named))
    return joined([
        load_data(part, role="calibration", seed=seed, as_text=True, writer=writer) if isinstance(part, str) else part
        for part in named
    ])  # fmt: skip


def check_calibration(calibration: Calibration | None, n_samples: int, *, option: str = "--n-samples") -> None:
    """Refuse, before any data are read, a calibration without data, or with too few sequences for each set.

    Args:
        option: what the message names to get more.
    """
    named = named_calibration(calibration)
    if not named:
        raise RequestError("expected data to calibrate on, got none; name some")
    first = part_names(named[0]) if isinstance(named[0], str) else named[0].parts
    n_sets = max(len(named), len(first) if len(named) == 1 else 0)
    if n_samples < n_sets:
        raise RequestError(
            f"expected at least one calibration sequence of each data set, got {n_samples} for {n_sets}; raise {option}"
        )


def _files_of(references: Iterable[Any]) -> list[Path]:
    """The references that are files: models of one file, and data."""
    return [Path(name) for name in references if isinstance(name, str | Path) and Path(name).is_file()]


def calibration_length(model: Path, seq_len: int | None) -> int:
    """Tokens of a calibration sequence: as many as were asked for, or 512, or the model's context if shorter."""
    return fitting_length(seq_len, context_of(read_config(model)), option="--seq-len")


def calibration_tokens(data: Data, model: Path, n_samples: int, seq_len: int, seed: int) -> torch.Tensor:
    """Equally long token blocks ``[sequence, pos]`` from shuffled documents."""
    tokenizer = load_tokenizer(model)
    blocks = text_sequences(data, tokenizer, seq_len, n_samples, seed=seed)
    if len(blocks) < n_samples:
        require_tokens(tokenizer, data.examples[0].prompt + data.examples[0].response, data.source)
        raise RequestError(
            f"expected {n_samples} calibration sequences of {seq_len} tokens from {data.source}, got text for "
            f"{len(blocks)}; name more data, or fewer or shorter sequences"
        )
    return torch.stack([block.tokens for block in blocks])


@dataclass(frozen=True)
class _Calibration:
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Record:
    calibration: _Calibration | None = None


def recorded_groups(file: Path) -> frozenset[str]:
    """The groups of the calibration data in a record beside the weights; none where there is no record."""
    record = read_json(file, _Record, "prune or refit again") if file.exists() else _Record()
    return frozenset(record.calibration.groups if record.calibration else ())
