"""Second moments of the inputs of linear layers, summed batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.errors import LensError

# Block size; only blocks on and below the diagonal are computed, as the moment is symmetric.
_BLOCK = 384


class InputMoments:
    """Sums $X^T X$ in float32 by matrix; matrices that read the same inputs (q, k and v; gate and up) share one."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._leader: dict[str, str] = {}
        # Kept alive, so that equal addresses mean the same inputs.
        self._last: tuple[str, Tensor] | None = None

    def add(self, name: str, inputs: Float[Tensor, "token in"]) -> None:
        """Add a batch of inputs of a matrix, in the format the model computes in."""
        if self._last is not None and is_same(inputs, self._last[1]):
            self._leader[name] = self._last[0]
            return
        self._last = (name, inputs)
        self._leader[name] = name
        if name not in self._sums:
            self._sums[name] = inputs.new_zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float32)
        _add_lower_blocks(self._sums[name], inputs)

    def __getitem__(self, name: str) -> Float[Tensor, "in in"]:
        """The sum over all inputs of a matrix."""
        if name not in self._leader:
            raise LensError(f"expected calibration inputs of {name}, got none; the architecture is not supported")
        self._last = None
        lower = self._sums[self._leader[name]].tril()
        if not bool(torch.isfinite(lower).all()):
            raise LensError(f"expected finite inputs of {name}, got NaN or infinity; compute in float32")
        return lower + lower.tril(-1).T

    def same_input(self, name: str) -> str:
        """The first matrix that reads the same inputs."""
        return self._leader[name]


def is_same(first: Tensor, second: Tensor) -> bool:
    """Whether two live tensors share their memory, shape and format."""
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape and first.dtype == second.dtype


def _add_lower_blocks(total: Float[Tensor, "in in"], inputs: Float[Tensor, "token in"]) -> None:
    precise = inputs.float()
    with exact_products(inputs.dtype):
        for start in range(0, len(total), _BLOCK):
            stop = start + _BLOCK
            total[start:, start:stop].addmm_(precise[:, start:].T, precise[:, start:stop])


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Multiply bfloat16 inputs as bfloat16, which is exact and faster; sums are float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
