"""Models of plain transformers, loaded from directories whose files are all of them and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.config import DeviceMap, compute_dtype, default_device, default_device_map
from lcc_lens.core.errors import LensError, RequestError, first_line
from lcc_lens.core.progress import loading_models
from lcc_lens.models.hooked.offloading import each_parameter, placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IN_LAYER = re.compile(r"\.\d+\..*\.(weight|bias)$")


def load_plain(
    path: Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    strict: bool = True,
    device_map: DeviceMap | None = None,
) -> PreTrainedModel:
    """Load a local directory with plain transformers, in evaluation mode, without gradients.

    Args:
        device: see :func:`lcc_lens.core.config.default_device`.
        dtype: see :func:`lcc_lens.core.config.compute_dtype`.
        attention: transformers' attention implementation; its own choice for the architecture if not given.
        strict: refuse files that are not all of this architecture; transformers itself fills what is missing with
            random numbers and passes over what it does not know.
        device_map: see :func:`lcc_lens.models.hooked.offloading.placement`;
            :func:`lcc_lens.core.config.default_device_map` if not given.

    Raises:
        RequestError: the files are damaged, of another model than ``config.json`` says, or no causal language model.
        LensError: a weight is NaN or infinite.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    device = device or default_device()
    dtype = dtype or compute_dtype(device)
    places = placement(path, device, device_map or default_device_map())
    try:
        with loading_models():
            model, report = AutoModelForCausalLM.from_pretrained(
                str(path), dtype=dtype, attn_implementation=attention, local_files_only=True, trust_remote_code=False,
                output_loading_info=True, ignore_mismatched_sizes=True, **places,
            )  # fmt: skip
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError, ImportError, StrictDataclassError) as error:
        raise RequestError(
            f"expected a causal language model in {path}, got none that loads ({first_line(error)})"
        ) from error
    _refuse_other_shapes(path, report)
    if strict:
        _refuse_other_tensors(path, report)
    model = (model if places else model.to(device)).eval().requires_grad_(False)
    _refuse_non_finite(model, path)
    return cast("PreTrainedModel", model)


def _refuse_other_shapes(path: Path, report: Mapping[str, Any]) -> None:
    """Refuse tensors of other shapes than the configuration says; transformers filled them with random numbers."""
    for name, stored, wanted in sorted(report["mismatched_keys"], key=lambda entry: str(entry[0])):
        raise RequestError(
            f"expected {name} of shape {tuple(wanted)}, as {path / 'config.json'} says, got {tuple(stored)}; name the "
            "directory with the right config.json"
        )


def _refuse_other_tensors(path: Path, report: Mapping[str, Any]) -> None:
    """Refuse weights that are not those of the configuration beside them."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise RequestError(
            f"expected all weights of the model that {path / 'config.json'} describes, got none named {missing[0]} "
            f"({len(missing)} are missing); fetch the checkpoint again"
        )
    unread = {name for name in report["unexpected_keys"] if _IN_LAYER.search(name)}
    stored = Checkpoint(path).tensors  # masks that old checkpoints keep as "bias" have no weight beside them
    unread = {n for n in unread if n.endswith(".weight") or f"{n.removesuffix('.bias')}.weight" in stored}
    if unread:
        raise RequestError(
            f"expected weights that the model in {path} reads, got {min(unread)}, which it passes over ({len(unread)} "
            "in all); name the directory with the right config.json"
        )


def _refuse_non_finite(model: torch.nn.Module, path: Path) -> None:
    for name, parameter in each_parameter(model):
        if not bool(torch.isfinite(parameter.sum(dtype=torch.float32))) and not bool(torch.isfinite(parameter).all()):
            raise LensError(
                f"expected finite weights in {path}, got NaN or infinity in {name}; prune or fetch the model again"
            )
