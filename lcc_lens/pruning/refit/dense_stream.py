"""Hidden states of the dense model, layer by layer, used as regression targets."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

from jaxtyping import Float
from torch import Tensor

from lcc_lens.models.architecture.linear_maps import Matrix
from lcc_lens.pruning.calibration.stream import MOST_BYTES, LayerStream, Observer
from lcc_lens.pruning.methods.moments import is_same


class DenseStream:
    """A :class:`LayerStream` of the dense model that runs each layer once and caches its inputs and outputs.

    Where the cache would exceed ``max_bytes``, the layer runs again for every request. Both give the same bits.

    Args:
        stream: the dense model's stream; use it only through this object.
        max_bytes: size limit of the cache.
    """

    def __init__(self, stream: LayerStream, *, max_bytes: int = MOST_BYTES) -> None:
        self._stream, self._max_bytes = stream, max_bytes
        self._matrices: Sequence[Matrix] = ()
        self._cache: list[_CachedBatch] | None = None

    def enter(self, matrices: Sequence[Matrix]) -> None:
        """Name the linear layers of the current decoder layer whose inputs will be requested."""
        self._matrices, self._cache = matrices, None

    def batches_observed(self, matrices: Sequence[Matrix], observe: Observer) -> Generator[None, None, None]:
        """See :meth:`LayerStream.batches_observed`; the matrices must be among those of :meth:`enter`."""
        cache = self._filled_cache()
        if cache is None:
            yield from self._stream.batches_observed(matrices, observe)
            return
        names = {matrix.name for matrix in matrices}
        for batch in cache:
            for name, inputs in batch.inputs:
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
        self._stream.advance(None if self._cache is None else [batch.output for batch in self._cache])
        self._cache = None

    def _filled_cache(self) -> list[_CachedBatch] | None:
        """The cache of the current layer; None where it would be too large."""
        if self._cache is None and self._max_bytes:
            cache: list[_CachedBatch] = []
            for batch in self._passes():
                cache.append(batch)
                if batch.n_bytes * self._stream.n_batches > self._max_bytes:
                    self._max_bytes = 0  # the next layers are no smaller
                    return None
            self._cache = cache
        return self._cache

    def _passes(self) -> Iterator[_CachedBatch]:
        all_inputs: list[tuple[str, Tensor]] = []
        last: list[Tensor] = []  # held, so that equal addresses mean the same inputs

        def record(name: str, inputs: Tensor) -> None:
            is_shared = bool(last) and is_same(inputs, last[0])
            # A copy, since a layer may go on to change it in place.
            all_inputs.append((name, all_inputs[-1][1] if is_shared else inputs.clone()))
            last[:] = [inputs]

        for output in self._stream.whole_batches(self._matrices, record):
            yield _CachedBatch(tuple(all_inputs), output)
            all_inputs.clear()
            last.clear()


class _CachedBatch:
    """The inputs of a decoder layer's linear layers in one batch, in order of computation, and its output."""

    def __init__(self, inputs: tuple[tuple[str, Tensor], ...], output: Tensor) -> None:
        self.inputs, self.output = inputs, output
        distinct = {id(tensor): tensor.nbytes for tensor in (*(tensor for _, tensor in inputs), output)}
        self.n_bytes = sum(distinct.values())
