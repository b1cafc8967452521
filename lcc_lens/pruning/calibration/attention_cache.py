"""Cache the inputs of a layer's output projection, so that further passes skip attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lcc_lens.models.hooked.layer_skipping import replaced_forward


@dataclass(frozen=True)
class _CachedModule:
    """A module within a layer whose output is that of its last projection, with the projection's inputs by batch."""

    name: str
    path: str
    module: nn.Module
    projection: nn.Module
    n_others: int | None
    """For a tuple as output, the number of its other entries, which are all None; None for a single tensor."""
    inputs: dict[int, Tensor] = field(default_factory=dict)

    def run(self, start: int) -> Any:
        """The module's output for the batch that begins with sequence ``start``, from the cached inputs."""
        output = self.projection(self.inputs[start])
        return output if self.n_others is None else (output, *[None] * self.n_others)


class AttentionCache:
    """Caches the inputs of projections that end a module of a layer, so that the module runs from there.

    Self-attention is such a module: while nothing before its output projection changes, attention itself is computed
    once, however often the layer runs. The outputs are the same, bit for bit.

    Args:
        max_bytes: size limit of the cache, for one layer.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._modules: list[_CachedModule] = []

    def clear(self) -> None:
        """Empty the cache, for the next layer."""
        self._modules, self._n_bytes = [], 0

    def forget(self, path: str) -> None:
        """Drop the modules that hold a changed weight, unless it is that of their last projection."""
        self._modules = [m for m in self._modules if path == m.path or not path.startswith(f"{m.name}.")]

    @contextmanager
    def recording(self, layer: nn.Module, path: str, n_batches: int) -> Iterator[Callable[[int], None]]:
        """Cache a projection's inputs while the layer runs inside the block.

        Yields:
            A function to call after every pass, with the first sequence of its batch. The first pass must run the whole
            layer: it shows which module ends in the projection. Without one, or if it takes too much memory, nothing is
            cached.
        """
        inputs: list[Tensor] = []
        outputs: dict[str, Any] = {}
        parts = path.split(".")
        names = [".".join(parts[:n]) for n in range(1, len(parts))]  # the enclosing modules, outermost first
        cached: _CachedModule | None = None
        is_first, projection = True, layer.get_submodule(path)

        def record_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0].clone())  # a layer may go on to change it in place

        def record_output(name: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _, args, output: outputs.__setitem__(name, output.clone() if name == path else output)

        def after_pass(start: int) -> None:
            nonlocal cached, is_first
            if is_first:
                candidates = (_cached_module(layer, name, path, outputs) for name in names)
                cached = next((module for module in candidates if module is not None), None)
                is_first = False
                if len(inputs) != 1 or self._n_bytes + n_batches * inputs[0].nbytes > self._max_bytes:
                    cached = None
            if cached is not None and inputs:
                cached.inputs[start] = inputs[0]
            outputs.clear()
            inputs.clear()

        with ExitStack() as stack:
            stack.callback(projection.register_forward_pre_hook(record_input).remove)
            for name in (*names, path):
                stack.callback(layer.get_submodule(name).register_forward_hook(record_output(name)).remove)
            yield after_pass
        if cached is not None and len(cached.inputs) == n_batches:
            self._modules.append(cached)
            self._n_bytes += sum(tensor.nbytes for tensor in cached.inputs.values())

    @contextmanager
    def applied(self, start: int) -> Iterator[None]:
        """Run cached modules from their cached inputs inside the block, for the batch that begins with ``start``."""
        with ExitStack() as stack:
            for cached in self._modules:
                stack.enter_context(replaced_forward(cached.module, lambda *_, cached=cached, **__: cached.run(start)))
            yield


def _cached_module(layer: nn.Module, name: str, path: str, outputs: dict[str, Any]) -> _CachedModule | None:
    """The module, if its output is exactly the projection's."""
    output, projected = outputs.get(name), outputs.get(path)
    first, *others = output if isinstance(output, tuple) else (output,)
    if not (isinstance(first, Tensor) and isinstance(projected, Tensor) and first.shape == projected.shape):
        return None
    if any(other is not None for other in others) or not torch.equal(first, projected):
        return None
    n_others = len(others) if isinstance(output, tuple) else None
    return _CachedModule(name, path, layer.get_submodule(name), layer.get_submodule(path), n_others)
