"""Parts of a layer that end in one map: what the map read stands for all that comes before it in the part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lcc_lens.models.hooked.layer_skipping import replaced_forward


@dataclass(frozen=True)
class _Part:
    """A module within a layer that gives what its map gives, and what the map read by batch."""

    name: str
    path: str
    module: nn.Module
    map: nn.Module
    n_others: int | None
    """How many entries its output has beside that one, all None; None where the output is that one itself."""
    read: dict[int, Tensor] = field(default_factory=dict)

    def run(self, start: int) -> Any:
        """The part's output from what the map read in the batch that begins with this sequence."""
        output = self.map(self.read[start])
        return output if self.n_others is None else (output, *[None] * self.n_others)


class Shortcuts:
    """What the last maps of a layer's parts read, kept so that further passes begin there; with the same bits.

    Self-attention is such a part, its output projection the map: once everything before the projection stays as it is,
    attention need not be computed again, however often the layer runs.

    Args:
        max_bytes: what may be kept of a layer.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._parts: list[_Part] = []

    def clear(self) -> None:
        """Forget everything: another layer begins."""
        self._parts, self._n_bytes = [], 0

    def forget(self, path: str) -> None:
        """A map has changed: a part that holds it has to run again, unless it ends in it."""
        self._parts = [part for part in self._parts if path == part.path or not path.startswith(f"{part.name}.")]

    @contextmanager
    def noting(self, layer: nn.Module, path: str, n_batches: int) -> Iterator[Callable[[int], None]]:
        """Note what a map of the layer reads while the layer runs inside the block.

        Args:
            layer: the layer.
            path: the map's name within it.
            n_batches: how many passes there will be.

        Yields:
            What is called after every pass with the first sequence of its batch. The part is found in the first one,
            which has to go through the whole layer; where there is none, or it takes too much memory, nothing is kept.
        """
        read: list[Tensor] = []
        given: dict[str, Any] = {}
        names = _within(path)
        part: _Part | None = None
        is_first, map_ = True, layer.get_submodule(path)

        def note_read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            read.append(args[0].clone())  # a layer may go on to change it in place

        def note_given(name: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _, args, output: given.__setitem__(name, output.clone() if name == path else output)

        def after(start: int) -> None:
            nonlocal part, is_first
            if is_first:
                part = next((p for name in names if (p := _part(layer, name, path, given)) is not None), None)
                is_first = False
                if len(read) != 1 or self._n_bytes + n_batches * read[0].nbytes > self._max_bytes:
                    part = None
            if part is not None and read:
                part.read[start] = read[0]
            given.clear()
            read.clear()

        with ExitStack() as stack:
            stack.callback(map_.register_forward_pre_hook(note_read).remove)
            for name in (*names, path):
                stack.callback(layer.get_submodule(name).register_forward_hook(note_given(name)).remove)
            yield after
        if part is not None and len(part.read) == n_batches:
            self._parts.append(part)
            self._n_bytes += sum(tensor.nbytes for tensor in part.read.values())

    @contextmanager
    def taken(self, start: int) -> Iterator[None]:
        """Let the parts begin at their maps inside the block, in a pass of the batch that begins with this sequence."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(replaced_forward(part.module, lambda *_, part=part, **__: part.run(start)))
            yield


def _within(path: str) -> list[str]:
    """The modules that hold a map, below the layer, the outermost first."""
    names = path.split(".")[:-1]
    return [".".join(names[: n + 1]) for n in range(len(names))]


def _part(layer: nn.Module, name: str, path: str, given: dict[str, Any]) -> _Part | None:
    """The module as a part that ends in the map, if its output is the map's and nothing else."""
    output, wanted = given.get(name), given.get(path)
    first, *others = output if isinstance(output, tuple) else (output,)
    if not (isinstance(first, Tensor) and isinstance(wanted, Tensor) and first.shape == wanted.shape):
        return None
    if any(other is not None for other in others) or not torch.equal(first, wanted):
        return None
    n_others = len(others) if isinstance(output, tuple) else None
    return _Part(name, path, layer.get_submodule(name), layer.get_submodule(path), n_others)
