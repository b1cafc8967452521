"""One tensor per token sequence, computed once: kept in memory, beyond that on disk, beyond that computed again."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.data.datasets import Batch

logger = logging.getLogger(__name__)
_MEMORY = 2**30
#: What of the free disk may be filled if no number is given.
_DISK_SHARE = 0.5


class KeptStates:
    """Tensors ``[pos, width]`` by token sequence.

    Every sequence is computed on its own, so what is kept does not depend on the batch that it was first met in: a
    training that reuses it gives the same bits whether it is computed, kept or read back, and after an interruption
    too. What lies on disk are temporary files (in ``TMPDIR``) that are mapped into memory and have no name any more:
    nothing is left behind, even if the process is killed.

    Args:
        max_bytes: of memory, on the device of the tensors.
        max_disk_bytes: of disk; half of what is free if not given.
    """

    def __init__(self, *, max_bytes: int = _MEMORY, max_disk_bytes: int | None = None) -> None:
        self.max_bytes, self._max_disk_bytes = max_bytes, max_disk_bytes
        self.n_bytes = self.n_disk_bytes = 0
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def of(
        self,
        batch: Batch,
        device: torch.device,
        compute: Callable[[Int[Tensor, "1 pos"]], Float[Tensor, "1 pos width"]],
    ) -> Float[Tensor, "batch pos width"]:
        """A batch's tensors, zero where it is padded.

        Args:
            batch: the sequences.
            device: where the tensors are wanted.
            compute: gives the tensor of one sequence's tokens, which lie there.
        """
        rows = zip(batch.tokens, batch.lengths.tolist(), strict=True)
        states = [self._one(tokens[:n], device, compute) for tokens, n in rows]
        return torch.nn.utils.rnn.pad_sequence(states, batch_first=True)

    def _one(
        self, tokens: Int[Tensor, " pos"], device: torch.device, compute: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "pos width"]:
        key = tuple(tokens.tolist())
        if key in self._kept:
            return self._kept[key].to(device)
        with torch.inference_mode(mode=False), torch.no_grad():  # what is kept may enter a backward pass
            computed = compute(tokens[None].to(device))[0].detach().clone()
            size = computed.numel() * computed.element_size()
            if self.n_bytes + size <= self.max_bytes:
                self._kept[key], self.n_bytes = computed, self.n_bytes + size
            elif self.n_disk_bytes + size <= self._disk_bytes():
                self._spill(key, computed, size)
        return computed

    def _spill(self, key: tuple[int, ...], computed: Tensor, size: int) -> None:
        try:
            self._kept[key] = _mapped(computed)
            self.n_disk_bytes += size
        except OSError as error:
            logger.warning("nothing more is kept on disk (%s); it is computed again each time", error.strerror)
            self._max_disk_bytes = 0

    def _disk_bytes(self) -> int:
        if self._max_disk_bytes is None:
            self._max_disk_bytes = int(shutil.disk_usage(tempfile.gettempdir()).free * _DISK_SHARE)
        return self._max_disk_bytes


def _mapped(tensor: Tensor) -> Tensor:
    """The tensor's values in a file that is mapped into memory and deleted: the system frees it with the mapping."""
    values = tensor.cpu().contiguous().view(torch.uint8).reshape(-1)
    with tempfile.NamedTemporaryFile(prefix="lcc-lens-") as file:
        file.write(values.numpy().data)
        file.flush()
        mapped = torch.from_file(file.name, size=values.numel(), dtype=torch.uint8)
    return mapped.view(tensor.dtype).reshape(tensor.shape)
