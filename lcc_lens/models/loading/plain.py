"""Load models of plain transformers, and check that their files are complete and of the right architecture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.config import DeviceMap, compute_dtype, default_device, default_device_map
from lcc_lens.core.errors import LensError, RequestError, first_line
from lcc_lens.core.machine.garbage import uncollected
from lcc_lens.core.machine.threads import settle_threads
from lcc_lens.core.progress import loading_models
from lcc_lens.models.architecture.layers import read_config
from lcc_lens.models.architecture.whole_weights import require_complete
from lcc_lens.models.hooked.offloading import each_parameter, placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@uncollected()
def load_plain(
    path: Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    device_map: DeviceMap | None = None,
) -> PreTrainedModel:
    """Load a local directory with plain transformers, in evaluation mode, without gradients.

    Args:
        device: see :func:`lcc_lens.core.config.default_device`.
        dtype: see :func:`lcc_lens.core.config.compute_dtype`.
        attention: transformers' attention implementation; its own choice for the architecture if not given.
        device_map: see :func:`lcc_lens.models.hooked.offloading.placement`;
            :func:`lcc_lens.core.config.default_device_map` if not given.

    Raises:
        RequestError: the files are damaged, not all of the model that ``config.json`` describes or more than that (see
            :func:`lcc_lens.models.architecture.whole_weights.require_complete`), or no causal language model.
        LensError: a weight is NaN or infinite.
    """
    from transformers import AutoModelForCausalLM

    device = device or default_device()
    settle_threads(device)
    dtype = dtype or compute_dtype(device)
    checkpoint = require_complete(Checkpoint(path))
    places = placement(path, device, device_map or default_device_map())
    config = read_config(path)
    try:
        with loading_models(), checkpoint.read_at_once():
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(path), config=config, dtype=dtype, attn_implementation=attention, local_files_only=True,
                trust_remote_code=False, use_safetensors=True, **places,
            )  # fmt: skip
    except Exception as error:  # every class fails on damaged files in its own way
        raise RequestError(
            f"expected a causal language model in {path}, got none that loads ({first_line(error)}); check the files"
        ) from error
    model = (model if places else model.to(device)).eval().requires_grad_(False)
    _refuse_non_finite(model, path)
    return cast("PreTrainedModel", model)


def _refuse_non_finite(model: torch.nn.Module, path: Path) -> None:
    for name, parameter in each_parameter(model):
        if not bool(torch.isfinite(parameter.sum(dtype=torch.float32))) and not bool(torch.isfinite(parameter).all()):
            raise LensError(
                f"expected finite weights in {path}, got NaN or infinity in {name}; prune or fetch the model again"
            )
