"""The dense model beside one that is refitted: all that is asked of a layer from one pass, where memory suffices."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

from jaxtyping import Float
from torch import Tensor

from lcc_lens.models.architecture.linear_maps import Matrix
from lcc_lens.pruning.calibration.stream import MOST_BYTES, LayerStream, Observer
from lcc_lens.pruning.methods.moments import is_same


class Guide:
    """The way of the calibration data through the dense model, whose layers stay as they are.

    The first question about a layer runs it once to its end and keeps what its maps read and what it gives; further
    questions, and the next layer's inputs, are answered from there. Where that would take more memory than allowed,
    every question runs the layer again. Both give the same bits.

    Args:
        stream: the dense model's stream; it belongs to the guide from now on.
        max_bytes: what may be kept.
    """

    def __init__(self, stream: LayerStream, *, max_bytes: int = MOST_BYTES) -> None:
        self._stream, self._max_bytes = stream, max_bytes
        self._matrices: Sequence[Matrix] = ()
        self._kept: list[_Kept] | None = None

    def enter(self, matrices: Sequence[Matrix]) -> None:
        """Say which maps of the current layer questions will be about."""
        self._matrices, self._kept = matrices, None

    def batches_observed(self, matrices: Sequence[Matrix], observe: Observer) -> Generator[None, None, None]:
        """See :meth:`LayerStream.batches_observed`; some of the maps named in :meth:`enter`."""
        kept = self._all_kept()
        if kept is None:
            yield from self._stream.batches_observed(matrices, observe)
            return
        names = {matrix.name for matrix in matrices}
        for batch in kept:
            for name, inputs in batch.reads:
                if name in names:
                    observe(name, inputs)
            yield

    def hidden_batches(self) -> Iterator[Float[Tensor, "batch pos d_model"]]:
        """See :meth:`LayerStream.hidden_batches`."""
        return self._stream.hidden_batches()

    def adds_up(self, outputs: Sequence[Matrix]) -> bool:
        """See :meth:`LayerStream.adds_up`."""
        return self._stream.adds_up(outputs)

    def advance(self) -> None:
        """See :meth:`LayerStream.advance`."""
        self._stream.advance(None if self._kept is None else [batch.given for batch in self._kept])
        self._kept = None

    def _all_kept(self) -> list[_Kept] | None:
        """What the layer's maps read and what it gives, by batch; None where that is too much."""
        if self._kept is None and self._max_bytes:
            kept: list[_Kept] = []
            for batch in self._passes():
                kept.append(batch)
                if batch.n_bytes * self._stream.n_batches > self._max_bytes:
                    self._max_bytes = 0  # the next layers are no smaller
                    return None
            self._kept = kept
        return self._kept

    def _passes(self) -> Iterator[_Kept]:
        reads: list[tuple[str, Tensor]] = []
        last: list[Tensor] = []  # held, so that equal addresses mean the same inputs

        def note(name: str, inputs: Tensor) -> None:
            is_shared = bool(last) and is_same(inputs, last[0])
            # A copy, since a layer may go on to change it in place.
            reads.append((name, reads[-1][1] if is_shared else inputs.clone()))
            last[:] = [inputs]

        for given in self._stream.whole_batches(self._matrices, note):
            yield _Kept(tuple(reads), given)
            reads.clear()
            last.clear()


class _Kept:
    """What the maps of a layer read in one batch, in the order of the computation, and what the layer gives."""

    def __init__(self, reads: tuple[tuple[str, Tensor], ...], given: Tensor) -> None:
        self.reads, self.given = reads, given
        distinct = {id(tensor): tensor.nbytes for tensor in (*(inputs for _, inputs in reads), given)}
        self.n_bytes = sum(distinct.values())
