"""The matrices that pruning may touch: the linear maps inside the decoder layers, in the model and in its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import tensor_names
from lcc_lens.models.architecture.layers import decoder_layers, is_linear, is_transposed, read_config, skeleton

# Formats that float32 holds exactly, so that a surviving weight returns to disk bit for bit.
_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Matrix:
    """A linear map inside a decoder layer."""

    name: str
    """Its tensor in the checkpoint."""
    path: str
    """Its module, seen from the decoder layer."""
    d_in: int
    """How many features it reads."""
    d_out: int
    """How many it gives."""
    is_transposed: bool
    """Whether model and checkpoint hold ``[in, out]``."""
    file: Path
    """The file that holds the tensor."""
    dtype: torch.dtype
    """The stored format."""

    def rows(self, stored: Tensor) -> Float[Tensor, "out in"]:
        """See a tensor in the checkpoint's layout as one row per output."""
        return stored.T if self.is_transposed else stored

    def stored(self, rows: Float[Tensor, "out in"]) -> Tensor:
        """Bring a weight into the checkpoint's layout and format."""
        return (rows.T if self.is_transposed else rows).to(self.dtype).contiguous()


class StoredWeights(Mapping[str, Tensor]):
    """Weights ``[out, in]`` in float32 by name, each read from disk when asked for: one at a time is in memory.

    Args:
        matrices: what to offer.
        device: where the weights go.
    """

    def __init__(self, matrices: Sequence[Matrix], device: torch.device) -> None:
        self._matrices = {matrix.name: matrix for matrix in matrices}
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        matrix = self._matrices[name]
        with safe_open(matrix.file, framework="pt") as handle:
            weight = matrix.rows(handle.get_tensor(name).to(device=self._device, dtype=torch.float32))
        if not bool(torch.isfinite(weight).all()):
            raise LensError(f"expected finite weights, got NaN or infinity in {name}; fetch the checkpoint again")
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


def find_matrices(model_dir: Path) -> list[list[Matrix]]:
    """List the matrices of every decoder layer, from names and shapes alone: no weight is read.

    Raises:
        RequestError: the checkpoint is unreadable, its architecture is not supported, or it is quantised.
    """
    config = read_config(model_dir)
    model = skeleton(model_dir, config)
    prefix, layers = decoder_layers(model, config)
    files = tensor_names(model_dir)
    base = f"{getattr(model, 'base_model_prefix', '')}."
    found: list[list[Matrix]] = []
    for index, layer in enumerate(layers):
        place = f"{prefix}.{index}"
        _require_plain_matrices(layer, place)
        linears = {path: module for path, module in layer.named_modules() if is_linear(module)}
        if not linears:
            raise RequestError(f"expected linear layers in {place}, got none; the architecture is not supported")
        found.append([_locate(files, f"{place}.{path}.weight", base, path, module) for path, module in linears.items()])
    return found


def _require_plain_matrices(layer: nn.Module, place: str) -> None:
    """Refuse fused experts and convolutions: passing over them would report a sparsity that is not there."""
    for path, parameter in layer.named_parameters():
        if parameter.ndim > 2:
            raise RequestError(
                f"expected decoder layers of plain matrices, got {place}.{path} of shape {tuple(parameter.shape)}; "
                "use a model without fused experts or convolutions"
            )


def _locate(files: Mapping[str, Path], full_name: str, base: str, path: str, module: nn.Module) -> Matrix:
    """Find a module's weight in the checkpoint."""
    from safetensors import safe_open

    # Saved from the base model, as the original GPT-2 is, a checkpoint's names lack the base model's prefix.
    name = next((name for name in (full_name, full_name.removeprefix(base)) if name in files), None)
    if name is None:
        raise RequestError(f"expected the tensor {full_name} in the checkpoint, got none; the layout is not supported")
    with safe_open(files[name], framework="pt") as handle:
        stored = handle.get_slice(name)
        shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
    expected = tuple(module.get_parameter("weight").shape)
    if dtype not in _STORED_DTYPES or shape != expected:
        raise RequestError(
            f"expected {name} of shape {expected} as {', '.join(_STORED_DTYPES)}, got {shape} as {dtype}; "
            "use a checkpoint that is not quantised"
        )
    transposed = is_transposed(module)
    d_in, d_out = shape if transposed else shape[::-1]
    return Matrix(name, path, d_in, d_out, transposed, files[name], _STORED_DTYPES[dtype])
