"""Prune a checkpoint: walk its decoder layers in sequence and write the copy with fewer weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lcc_lens.errors import LensError, RequestError
from lcc_lens.files import atomic_directory, copy_checkpoint, require_space, weight_files, weights_sha256, write_json
from lcc_lens.progress import track, without_loading_bars
from lcc_lens.pruning.layers import decoder_layers, read_config
from lcc_lens.pruning.masks import Pattern, Scope, require_fit
from lcc_lens.pruning.matrices import Matrix, StoredWeights, find_matrices
from lcc_lens.pruning.pruners import Method
from lcc_lens.pruning.report import pruning_report
from lcc_lens.pruning.settings import PruneConfig
from lcc_lens.pruning.stream import LayerStream

# Room for tokenizer, configuration and notes beside the weights.
_SIDE_FILES_BYTES = 1 << 25


def prune(
    model_dir: Path,
    out: Path,
    *,
    method: Method,
    pattern: Pattern,
    calibration: Int[Tensor, "sequence pos"] | None,
    scope: Scope = "row",
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    overwrite: bool = False,
    batch_size: int = 8,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Prune the linear maps inside a model's decoder layers and write a plain Hugging Face directory.

    Layers are pruned in sequence, each from inputs recomputed through the already pruned ones. Surviving weights and
    all other tensors keep their bits. ``pruning.json`` beside the weights holds the returned report.

    Args:
        model_dir: Hugging Face directory of the dense model.
        out: directory to write; it appears whole or not at all.
        method: the pruner.
        pattern: how much goes and where.
        calibration: token ids of equally long sequences without padding; not used by magnitude.
        scope: within what unstructured scores compete; ``matrix`` for magnitude only.
        seed: seed that chose the calibration sequences.
        device: where to compute.
        dtype: format to run the model in; scores are float32 and come from the stored weights whatever it is.
        overwrite: whether ``out`` may replace what is there.
        batch_size: calibration sequences per forward pass.
        provenance: where the calibration sequences come from, for the report.

    Returns:
        The report: the request, the sparsity achieved in total and per matrix, the pattern found, the calibration data,
        and the hash of the dense weights.

    Raises:
        RequestError: the request does not fit the model, the data or the disk; nothing is written.
        LensError: a weight or an activation is not finite, or the disk filled up; nothing is kept.

    Example:
        With a dense model in ``dense`` and token ids from its tokenizer::

            report = prune(Path("dense"), Path("out/wanda24"), method="wanda", pattern=parse_pattern("2:4"),
                           calibration=tokens, seed=0, device=default_device(), dtype=torch.float32,
                           provenance={"data": "c4"})
            report["sparsity"], report["pattern_found"]  # 0.5, "2:4"

    Reference:
        Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models".
    """
    config = PruneConfig(method, pattern, scope, seed, batch_size)
    if model_dir.resolve().is_relative_to(out.resolve()):
        raise RequestError(f"wanted an output folder that does not hold the model, got {out}; name another folder")
    plan = find_matrices(model_dir)
    for matrix in (matrix for layer in plan for matrix in layer):
        require_fit(pattern, matrix.d_in, matrix.name)
    tokens = _checked(calibration, model_dir, method) if config.uses_inputs else None
    require_space(out, sum(file.stat().st_size for file in weight_files(model_dir)) + _SIDE_FILES_BYTES)

    with atomic_directory(out, overwrite=overwrite) as part:
        weights = dict(_pruned(model_dir, plan, config, tokens, device, dtype))
        digest = weights_sha256(model_dir)
        report = pruning_report(config, plan, weights, tokens=tokens, provenance=provenance, dense_sha256=digest)
        copy_checkpoint(model_dir, part, replaced=weights)
        write_json(part / "pruning.json", report)
    return report


def _checked(tokens: Int[Tensor, "sequence pos"] | None, model_dir: Path, method: str) -> Int[Tensor, "sequence pos"]:
    """Refuse calibration tokens that the model cannot read."""
    if tokens is None or tokens.numel() == 0:
        raise RequestError(f"wanted calibration sequences for {method}, got none; name calibration data")
    config = read_config(model_dir).get_text_config()
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise RequestError(
            f"wanted calibration tokens from 0 to {config.vocab_size - 1}, got {low} to {high}; "
            "use the model's own tokenizer"
        )
    longest = getattr(config, "max_position_embeddings", None) or tokens.shape[1]
    if tokens.shape[1] > longest:
        raise RequestError(f"wanted sequences of at most {longest} tokens, got {tokens.shape[1]}; shorten them")
    return tokens


def _pruned(
    model_dir: Path,
    plan: Sequence[Sequence[Matrix]],
    config: PruneConfig,
    tokens: Int[Tensor, "sequence pos"] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Walk the layers and give every new weight in the checkpoint's layout and format, on the CPU."""
    stream = None if tokens is None else _stream(model_dir, tokens, config.batch_size, device, dtype)
    for matrices in track(plan, len(plan), "pruning layers"):
        pruner = config.pruner()
        if stream is not None:
            stream.observe(matrices, pruner)
        by_name = {matrix.name: matrix for matrix in matrices}
        for name, weight in pruner.pruned(StoredWeights(matrices, device)):
            if not bool(torch.isfinite(weight).all()):
                raise LensError(f"wanted finite pruned weights, got NaN or infinity in {name}; compute in float32")
            stored = by_name[name].stored(weight).cpu()
            if stream is not None:
                stream.replace(by_name[name], stored)
            yield name, stored
        if stream is not None:
            stream.advance()


def _stream(
    model_dir: Path, tokens: Int[Tensor, "sequence pos"], batch_size: int, device: torch.device, dtype: torch.dtype
) -> LayerStream:
    """Load the model and bring the calibration data to its first layer."""
    from transformers import AutoModelForCausalLM

    # No attention is named: transformers takes sdpa, or eager for architectures that sdpa cannot compute (Gemma 2).
    with without_loading_bars():
        model: nn.Module = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    model.to(device).eval()
    return LayerStream(model, decoder_layers(model, read_config(model_dir))[1], tokens, batch_size)
