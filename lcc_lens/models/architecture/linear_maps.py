"""Find the matrices that pruning may touch: the weights of the linear layers inside the decoder layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.models.architecture.layers import decoder_layers, is_linear, is_transposed, read_config, skeleton

# Formats that float32 holds exactly, so that a surviving weight returns to disk bit for bit.
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Matrix:
    """The weight of a linear layer inside a decoder layer."""

    name: str
    """The tensor's name in the checkpoint."""
    path: str
    """The module's name within the decoder layer."""
    d_in: int
    """Number of input features."""
    d_out: int
    """Number of output features."""
    is_transposed: bool
    """Whether model and checkpoint hold ``[in, out]``."""
    checkpoint: Checkpoint
    """The model on disk that stores the tensor."""
    dtype: torch.dtype
    """The stored format."""

    def read(self) -> Float[Tensor, "out in"]:
        """Read the weight from disk in its stored format, one row per output."""
        return self.rows(self.checkpoint.read(self.name))

    def rows(self, stored: Tensor) -> Float[Tensor, "out in"]:
        """View a tensor in the checkpoint's layout with one row per output."""
        return stored.T if self.is_transposed else stored

    def stored(self, rows: Float[Tensor, "out in"]) -> Tensor:
        """Convert a weight to the checkpoint's layout and format."""
        return (rows.T if self.is_transposed else rows).to(self.dtype).contiguous()


class StoredWeights(Mapping[str, Tensor]):
    """Weights ``[out, in]`` in float32 by name, each read from disk when it is looked up; none is kept.

    Args:
        matrices: the matrices to read.
        device: where to put the weights.
    """

    def __init__(self, matrices: Sequence[Matrix], device: torch.device) -> None:
        self._matrices = {matrix.name: matrix for matrix in matrices}
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        weight = self._matrices[name].read().to(device=self._device, dtype=torch.float32)
        if not bool(torch.isfinite(weight).all()):
            raise LensError(f"expected finite weights, got NaN or infinity in {name}; fetch the checkpoint again")
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


def find_matrices(checkpoint: Checkpoint) -> list[list[Matrix]]:
    """List the matrices of every decoder layer, from names and shapes alone: no weight is read."""
    config = read_config(checkpoint.path)
    prefix, layers = decoder_layers(skeleton(checkpoint.path, config), config)
    matrices: list[list[Matrix]] = []
    for index, layer in enumerate(layers):
        place = f"{prefix}.{index}"
        _require_plain_matrices(layer, place)
        linears = {path: module for path, module in layer.named_modules() if is_linear(module)}
        if not linears:
            raise RequestError(f"expected linear layers in {place}, got none; the architecture is not supported")
        matrices.append(
            [_locate(checkpoint, f"{place}.{path}.weight", path, module) for path, module in linears.items()]
        )
    return matrices


def _require_plain_matrices(layer: nn.Module, place: str) -> None:
    """Refuse fused experts and convolutions: leaving them out would report a wrong sparsity."""
    for path, parameter in layer.named_parameters():
        if parameter.ndim > 2:
            raise RequestError(
                f"expected decoder layers of plain matrices, got {place}.{path} of shape {tuple(parameter.shape)}; "
                "use a model without fused experts or convolutions"
            )


def _locate(checkpoint: Checkpoint, full_name: str, path: str, module: nn.Module) -> Matrix:
    """Find a module's weight in the checkpoint."""
    name = checkpoint.stored_name(full_name)
    if name not in checkpoint.tensors:
        raise RequestError(f"expected the tensor {full_name} in the checkpoint, got none; the layout is not supported")
    _, shape, dtype = checkpoint.tensors[name]
    expected = tuple(module.get_parameter("weight").shape)
    if dtype not in STORED_DTYPES or shape != expected:
        raise RequestError(
            f"expected {name} of shape {expected} as {', '.join(STORED_DTYPES)}, got {shape} as {dtype}; "
            "use a checkpoint that is not quantised"
        )
    transposed = is_transposed(module)
    d_in, d_out = shape if transposed else shape[::-1]
    return Matrix(name, path, d_in, d_out, transposed, checkpoint, STORED_DTYPES[dtype])
