"""Account for every tensor of a checkpoint before anything runs: the model's weights, all of them and nothing else.

Transformers fills what is missing with random numbers, ignores what it does not know, and casts whatever is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lcc_lens.core.checkpoint import Checkpoint, StoredTensor
from lcc_lens.core.errors import RequestError, first_line
from lcc_lens.core.machine.garbage import uncollected
from lcc_lens.core.progress import loading_models
from lcc_lens.models.architecture.layers import read_config, skeleton

_FORMATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
#: Masks and tables that old checkpoints store although they follow from the configuration.
_COMPUTED = ("masked_bias", "position_ids", "inv_freq")


@uncollected()
def require_complete(checkpoint: Checkpoint) -> Checkpoint:
    """Refuse a checkpoint whose tensors are not exactly those of the model that its configuration describes.

    Names and shapes are compared as transformers itself would load them, without memory for the weights; then every
    weight is read once, to see that it is a finite number. The verdict is kept per process and state of the files.

    Returns:
        The checkpoint.

    Raises:
        RequestError: a tensor is missing, unknown, of another shape or format, or not finite; or settings beside the
            weights do not load.
    """
    checkpoint.require_whole()
    _refuse_generation_settings(checkpoint.path)
    _require_complete(checkpoint.path, checkpoint.state)
    return checkpoint


@functools.cache
def _require_complete(path: Path, state: tuple[tuple[int, ...], ...]) -> None:
    checkpoint = Checkpoint(path)
    _refuse_formats(checkpoint)
    report = _loading_report(checkpoint)
    _refuse_other_shapes(path, report)
    _refuse_other_tensors(checkpoint, report)
    _refuse_non_finite(checkpoint)


def _refuse_generation_settings(path: Path) -> None:
    """Refuse a ``generation_config.json`` with which transformers loads no model."""
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(path, local_files_only=True)
    except OSError:  # there is none
        return
    except Exception as error:
        raise RequestError(
            f"expected settings that transformers takes in {path / 'generation_config.json'}, got others "
            f"({first_line(error)}); correct or delete the file"
        ) from error


def _loading_report(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What transformers says of missing, unknown and misshapen tensors when it loads shapes in place of weights."""
    config = read_config(checkpoint.path)
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(n_layers, int) and n_layers > len(checkpoint.tensors):  # building that many could take minutes
        raise RequestError(
            f"expected weights of {n_layers} layers, as {checkpoint.path / 'config.json'} says, got "
            f"{len(checkpoint.tensors)} tensors in all; name the directory with the right config.json"
        )
    kind: Any = type(skeleton(checkpoint.path, config))
    shapes = {
        name: torch.empty(stored.shape, dtype=_FORMATS.get(stored.dtype, torch.float32), device="meta")
        for name, stored in checkpoint.tensors.items()
    }
    try:
        with loading_models(), _silent_reports():
            _, report = kind.from_pretrained(
                None, config=config, state_dict=shapes, device_map="meta", local_files_only=True,
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except (RuntimeError, ValueError, KeyError, TypeError) as error:  # parts of a fused tensor that do not fit together
        raise RequestError(
            f"expected the weights of the model that {checkpoint.path / 'config.json'} describes, got tensors that do "
            f"not fit together ({first_line(error)}); fetch the checkpoint again"
        ) from error
    found: Mapping[str, Any] = report
    return found


@contextmanager
def _silent_reports() -> Iterator[None]:
    """Leave out transformers' table of what did not fit: the error says it in one line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _refuse_other_shapes(path: Path, report: Mapping[str, Any]) -> None:
    for name, stored, expected in sorted(report["mismatched_keys"], key=lambda entry: str(entry[0])):
        raise RequestError(
            f"expected {name} of shape {tuple(expected)}, as {path / 'config.json'} says, got {tuple(stored)}; "
            "name the directory with the right config.json"
        )


def _refuse_other_tensors(checkpoint: Checkpoint, report: Mapping[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise RequestError(
            f"expected all weights of the model that {checkpoint.path / 'config.json'} describes, got none named "
            f"{missing[0]} ({len(missing)} are missing); fetch the checkpoint again"
        )
    unread = [name for name in report["unexpected_keys"] if not _is_computed(name, checkpoint.tensors)]
    if unread:
        raise RequestError(
            f"expected weights that the model in {checkpoint.path} reads, got {min(unread)}, which it ignores "
            f"({len(unread)} in all); name the directory with the right config.json"
        )


def _refuse_formats(checkpoint: Checkpoint) -> None:
    for name, stored in checkpoint.tensors.items():
        if stored.dtype == "F64":
            raise RequestError(
                f"expected weights in float32, bfloat16 or float16, got float64 in {name} of {checkpoint.path}; save a "
                "float32 copy (model.float(), save_pretrained)"
            )
        if stored.dtype not in _FORMATS and not _is_computed(name, checkpoint.tensors):
            raise RequestError(
                f"expected weights in float32, bfloat16 or float16, got {stored.dtype} in {name} of {checkpoint.path}, "
                "as quantised checkpoints have; name the original, or save a dequantised copy"
            )


def _refuse_non_finite(checkpoint: Checkpoint) -> None:
    for name in checkpoint.tensors:
        tensor = checkpoint.read(name)
        is_finite = bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
        if not is_finite and not _is_computed(name, checkpoint.tensors):
            raise RequestError(
                f"expected finite weights, got NaN or infinity in {name} of {checkpoint.path}; fetch the model again"
            )


def _is_computed(name: str, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether a tensor is an old checkpoint's mask (called "bias", with no weight beside it) or table."""
    is_mask = name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" not in stored
    return is_mask or name.endswith(_COMPUTED)
