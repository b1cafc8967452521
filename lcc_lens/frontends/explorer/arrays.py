"""Tensors as JSON: little-endian bytes in base64, which the page reads as typed arrays."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
from torch import Tensor

ArrayType = Literal["float32", "uint8", "int32"]
_FORMATS = {"float32": "<f4", "uint8": "|u1", "int32": "<i4"}


def packed(tensor: Tensor, dtype: ArrayType = "float32") -> dict[str, Any]:
    """A tensor's shape, number format and bytes.

    Example:
        >>> import torch
        >>> packed(torch.tensor([1.0, 2.0]))["data"]
        'AACAPwAAAEA='
    """
    values = np.ascontiguousarray(tensor.detach().cpu().numpy().astype(_FORMATS[dtype]))
    return {"dtype": dtype, "shape": list(values.shape), "data": base64.b64encode(values.tobytes()).decode("ascii")}
