"""Choose what a preset trains by the memory of the machine."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.config import compute_dtype, default_device
from lcc_lens.core.errors import RequestError
from lcc_lens.core.machine.memory import total_memory
from lcc_lens.models.loading.references import resolve
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.injections.weights import IN_LAYER

logger = logging.getLogger(__name__)
#: Of a trained weight: its change, gradient, two moments of AdamW and best value so far in float32, and what the model
#: computes with.
BYTES_PER_WEIGHT = 24
#: Fraction of the memory that models and training may take; the rest is for activations.
_SHARE = 0.75


def method_in_memory(method: str | MethodSpec, pruned: str | Path, *, low_rank: int | None = None) -> MethodSpec:
    """The method or, where its training takes more memory than the machine has, the preset that it names instead.

    It depends on the memory there is in all, free or not, so that a resumed run trains what it began with.

    Args:
        pruned: reference of the pruned model.
        low_rank: a rank that is asked for, so that a low-rank change is trained.
    """
    spec = MethodSpec.parse(method)
    if spec.leaner is spec or low_rank is not None:
        return spec.leaner
    there = total_memory(default_device())
    try:
        needed = training_bytes(Checkpoint(resolve(pruned)))
    except RequestError:  # told where the models are checked
        return spec
    if there is None or needed <= _SHARE * there:
        return spec
    logger.warning(
        "%s would train all remaining weights, which takes about %.0f GiB with both models, and this machine has %.0f; "
        "training a low-rank change instead", spec.name, needed / 2**30, there / 2**30,
    )  # fmt: skip
    return spec.leaner


def training_bytes(checkpoint: Checkpoint) -> int:
    """What training every weight of the decoder layers takes, both models included, activations not.

    The models count in the format that they compute in, whatever the files hold.
    """
    sizes = {name: math.prod(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    inside = sum(size for name, size in sizes.items() if IN_LAYER.search(name))
    return 2 * compute_dtype(default_device()).itemsize * sum(sizes.values()) + BYTES_PER_WEIGHT * inside
