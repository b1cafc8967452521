"""Prune a checkpoint layer by layer and write the result."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.config import package_version
from lcc_lens.core.errors import DiskFullError, LensError, RequestError
from lcc_lens.core.files import require_space
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.outputs.folders import reserved
from lcc_lens.core.progress import track
from lcc_lens.core.side_files import side_files
from lcc_lens.models.architecture.anatomy import LayerAnatomy, find_anatomies
from lcc_lens.models.architecture.context import context_of
from lcc_lens.models.architecture.layers import read_config
from lcc_lens.models.architecture.linear_maps import Matrix, StoredWeights, find_matrices
from lcc_lens.models.architecture.sparsity_patterns import require_fit
from lcc_lens.models.architecture.whole_weights import require_complete
from lcc_lens.pruning.calibration.finished_layers import FinishedLayers
from lcc_lens.pruning.calibration.stream import LayerStream
from lcc_lens.pruning.methods.pruners import LayerTask, Removed
from lcc_lens.pruning.methods.settings import INVERTING, PruneConfig
from lcc_lens.pruning.methods.slimgpt import fixed_quota, possible_quotas
from lcc_lens.pruning.output.slicing import allowed_groups, require_sliceable, sliced_config
from lcc_lens.pruning.output.writing import write_pruned

logger = logging.getLogger(__name__)

# Room for tokenizer, configuration and notes beside the weights.
_SIDE_FILES_BYTES = 1 << 25


def prune_checkpoint(
    model_dir: Path,
    out: Path,
    config: PruneConfig,
    *,
    calibration: Int[Tensor, "sequence pos"] | None,
    device: torch.device,
    dtype: torch.dtype,
    overwrite: bool = False,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Prune the linear layers inside a model's decoder layers and write a plain Hugging Face directory.

    Decoder layers are pruned in order, each from inputs computed by the already pruned layers before it. Tensors that
    the method does not change keep their bits. Finished layers are kept beside ``out``: after an interruption the same
    call continues at the first unfinished layer and gives the same result.

    Args:
        model_dir: Hugging Face directory of the dense model.
        out: directory to write; it appears complete or not at all.
        calibration: token ids of equally long sequences without padding; None for methods that use no inputs.
        device: where to compute; ``dtype``: in which format (statistics are float32 or wider).
        overwrite: whether ``out`` may replace an existing directory.
        provenance: where the calibration sequences come from, for the report.

    Returns:
        The contents of ``pruning.json``: request, sparsity (total, per linear layer), pattern, calibration, hash.

    Raises:
        RequestError: the request does not fit the model, data or disk; nothing is written.
        LensError: a weight or an activation is not finite, or the disk is full; no output is written.

    Reference:
        Sun et al. 2023 (Wanda); Frantar & Alistarh 2023 (SparseGPT); Ling et al. 2024 (SlimGPT).
    """
    n_tokens = None if calibration is None else calibration.numel()
    checkpoint, plan, (tasks, anatomies) = require_prunable(model_dir, config, n_tokens)
    tokens = _checked(calibration, model_dir) if config.uses_inputs else None
    with reserved(out, overwrite=overwrite, inputs=[model_dir]) as target:
        # Twice: the finished layers lie beside the output until it is whole.
        require_space(target, 2 * checkpoint.n_bytes + _SIDE_FILES_BYTES)
        request = fingerprint(config, tokens, checkpoint.sha256, dtype, device.type, package_version())
        finished = FinishedLayers(target, request)
        try:
            _prune_layers(model_dir, plan, config, tasks, tokens, device, dtype, finished)
            report = write_pruned(
                checkpoint, target, config, plan, anatomies, finished, tokens=tokens, provenance=provenance,
                dense_sha256=checkpoint.sha256, overwrite=overwrite,
            )  # fmt: skip
        except LensError as error:
            if not isinstance(error, DiskFullError) or finished.n_layers == 0:  # it would fail the same way again
                finished.discard()
            raise
        finished.discard()
    return report


def require_prunable(
    model_dir: Path, config: PruneConfig, n_tokens: int | None
) -> tuple[Checkpoint, list[list[Matrix]], tuple[list[LayerTask], list[LayerAnatomy] | None]]:
    """The model, its matrices and the tasks of its layers; refuses what cannot be served, before any data are read.

    Args:
        n_tokens: tokens of the calibration, for methods that use it.

    Raises:
        RequestError: a pattern or structure that does not fit the model, or no or too few calibration tokens.
    """
    checkpoint = require_complete(Checkpoint(model_dir))
    side_files(model_dir)
    plan = find_matrices(checkpoint)
    for matrix in (matrix for layer in plan for matrix in layer):
        require_fit(config.pattern, matrix.d_in, matrix.name)
    if config.uses_inputs and not n_tokens:
        raise RequestError(f"expected calibration sequences for {config.method}, got none; name calibration data")
    widest = max((matrix for layer in plan for matrix in layer), key=lambda matrix: matrix.d_in)
    if config.uses_inputs and config.method in INVERTING and (n_tokens or 0) < widest.d_in:
        raise RequestError(
            f"expected at least {widest.d_in} calibration tokens for {config.method}, as many as {widest.name} has "
            f"inputs, got {n_tokens}; raise --n-samples or --seq-len"
        )
    return checkpoint, plan, _tasks(model_dir, plan, config)


def _tasks(
    model_dir: Path, plan: Sequence[Sequence[Matrix]], config: PruneConfig
) -> tuple[list[LayerTask], list[LayerAnatomy] | None]:
    """The task of every layer, and its heads and neurons for structured methods; refuses before any work."""
    if not config.is_structured:
        return config.tasks(len(plan)), None
    anatomies = find_anatomies(model_dir, plan)
    allowed = allowed_groups(model_dir, anatomies[0]) if config.sliced else None
    tasks = config.tasks(len(plan), anatomies, allowed)
    quotas = [
        possible_quotas(a, t.pattern.sparsity, t.multiple, allowed) for a, t in zip(anatomies, tasks, strict=True)
    ]
    if config.sliced:
        n_groups = anatomies[0].attention.n_groups
        quota = fixed_quota(quotas[0], config.chosen_split, config.pattern.sparsity, n_groups)
        require_sliceable(model_dir, anatomies, quota, sliced_config(model_dir, anatomies[0], quota))
    return tasks, anatomies


def _checked(tokens: Int[Tensor, "sequence pos"] | None, model_dir: Path) -> Int[Tensor, "sequence pos"]:
    """Refuse tokens that the model cannot read."""
    assert tokens is not None  # as require_prunable has seen
    text_config = read_config(model_dir).get_text_config()
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= text_config.vocab_size:
        raise RequestError(
            f"expected calibration tokens from 0 to {text_config.vocab_size - 1}, got {low} to {high}; "
            "use the model's own tokenizer"
        )
    longest = context_of(text_config) or tokens.shape[1]
    if tokens.shape[1] > longest:
        raise RequestError(f"expected sequences of at most {longest} tokens, got {tokens.shape[1]}; shorten them")
    return tokens


def _prune_layers(
    model_dir: Path,
    plan: Sequence[Sequence[Matrix]],
    config: PruneConfig,
    tasks: Sequence[LayerTask],
    tokens: Int[Tensor, "sequence pos"] | None,
    device: torch.device,
    dtype: torch.dtype,
    finished: FinishedLayers,
) -> None:
    """Prune layer after layer and write each to disk before the next one begins."""
    if finished.n_layers:
        logger.info("continuing at layer %d of %d", finished.n_layers, len(plan))
    if finished.n_layers == len(plan):
        return
    stream = None if tokens is None else LayerStream.of(model_dir, tokens, config.batch_size, device, dtype)
    for index, matrices in enumerate(track(plan, len(plan), "pruning layers")):
        if index < finished.n_layers:
            weights = finished.layer(index)
        else:
            weights, removed = _pruned_layer(matrices, config, tasks[index], stream, device)
            finished.add(weights, removed)
        if stream is not None:
            for matrix in matrices:
                if matrix.name in weights:
                    stream.replace(matrix, weights[matrix.name])
            stream.advance()


def _pruned_layer(
    matrices: Sequence[Matrix],
    config: PruneConfig,
    task: LayerTask,
    stream: LayerStream | None,
    device: torch.device,
) -> tuple[dict[str, Tensor], Removed]:
    """The new weights of one layer, in the checkpoint's layout and format, on the CPU."""
    pruner = config.pruner(task)
    if stream is not None:
        stream.observe(matrices, pruner)
    by_name = {matrix.name: matrix for matrix in matrices}
    weights: dict[str, Tensor] = {}
    for name, weight in pruner.pruned(StoredWeights(matrices, device)):
        if not bool(torch.isfinite(weight).all()):
            raise LensError(f"expected finite pruned weights, got NaN or infinity in {name}; compute in float32")
        weights[name] = by_name[name].stored(weight).cpu()
    return weights, pruner.removed()
