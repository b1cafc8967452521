"""Convert 2:4 sparse weights to the GPU's sparse kernels, which skip their zeros."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from lcc_lens.core.errors import RequestError
from lcc_lens.models.architecture.layers import decoder_layers
from lcc_lens.models.architecture.sparsity_patterns import detect_pattern

_FORMATS = (torch.float16, torch.bfloat16)
# What both of PyTorch's kernels (cuSPARSELt and CUTLASS) take in 16-bit formats.
_ROWS, _COLUMNS = 32, 64
# NVIDIA's sparse tensor cores came with Ampere.
_CAPABILITY = (8, 0)


def to_semi_structured(model: nn.Module) -> int:
    """Convert a model's 2:4 matrices in place with ``torch.sparse.to_sparse_semi_structured``.

    The ``nn.Linear`` weights in the decoder layers are converted if the kernels take their shapes (multiples of 32
    outputs and 64 inputs); the others stay dense. The converted model takes prompts of any length but no gradients.

    Args:
        model: a plain transformers model on a CUDA device, in float16 or bfloat16.

    Returns:
        How many matrices were converted.
    """
    linears = _linear_layers(model)
    first = next(iter(linears.values())).weight
    require_kernels(first.device, first.dtype)
    others = [name for name, layer in linears.items() if detect_pattern(layer.weight) != "2:4"]
    if others:
        raise RequestError(
            f"expected every linear weight exactly 2:4, got {len(others)} of {len(linears)} that are not ({others[0]} "
            "first); prune with --pattern 2:4"
        )
    fitting = [m for m in linears.values() if m.out_features % _ROWS == 0 and m.in_features % _COLUMNS == 0]
    if not fitting:
        raise RequestError(
            f"expected matrices of a multiple of {_ROWS} outputs and {_COLUMNS} inputs for 2:4 kernels, got none; "
            "run the dense kernels"
        )
    convert: Any = torch.sparse.to_sparse_semi_structured
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor is in prototype stage")
        for layer in fitting:
            layer.weight = nn.Parameter(convert(layer.weight.detach().contiguous()), requires_grad=False)
    return len(fitting)


def require_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a device or format for which PyTorch has no 2:4 kernels."""
    if device.type != "cuda":
        raise RequestError(
            f"expected a CUDA device for 2:4 kernels, got {device}; run on an NVIDIA GPU, Ampere or newer"
        )
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        raise RequestError(
            f"expected a GPU with sparse tensor cores, got {torch.cuda.get_device_name(device)}; "
            "run on an NVIDIA GPU, Ampere or newer"
        )
    if dtype not in _FORMATS:
        raise RequestError(f"expected float16 or bfloat16 for 2:4 kernels, got {dtype}; set LCC_LENS_DTYPE=bfloat16")


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The ``nn.Linear`` layers inside the decoder layers, by name."""
    prefix, layers = decoder_layers(model, model.config)
    linears = {f"{prefix}.{name}": layer for name, layer in layers.named_modules() if isinstance(layer, nn.Linear)}
    if not linears:
        raise RequestError(
            f"expected linear layers for 2:4 kernels, got none in {type(model).__name__}; name another model"
        )
    return linears
