"""A hooked model run layer by layer: each layer once per batch and question, with the layers before it as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.models.hooked.forward import can_fuse, forward
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook, logits_at
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.self_checks import check_tokens

#: How far hidden states may lie from a whole pass's, relative to the largest.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
_COARSE_TOLERANCE = 2e-2

_TRIED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class LayerWalk:
    """Batches on their way through a model; hooks of a finished layer act on all later ones.

    The hidden states before the current layer are kept, in the model's format, and that layer alone is computed. A
    model whose layers see more than hidden states runs as a whole instead, with the same results.

    Args:
        model: the hooked model.
        batches: right-padded tokens.
        alone: compute layers alone; tried out if not given.
    """

    def __init__(self, model: HookedModel, batches: Sequence[Int[Tensor, "_ _"]], *, alone: bool | None = None) -> None:
        self.model, self.layer = model, 0
        self._batches = [tokens.to(device_of(model)) for tokens in batches]
        can_fuse(model)  # tried on whole passes once, before any layer runs alone
        self._is_alone = can_run_layers_alone(model) if alone is None else alone
        self._entering: list[Tensor | None] = [None] * len(self._batches)
        self._finished: list[NamedHook] = []

    @property
    def n_batches(self) -> int:
        """How many batches are on their way."""
        return len(self._batches)

    def run(self, batch: int, hooks: Sequence[NamedHook]) -> Float[Tensor, "batch pos d_model"]:
        """What the current layer gives for a batch under hooks within that layer."""
        tokens = self._batches[batch]
        with torch.no_grad():
            if self._is_alone:
                return _layer_alone(self.model, self.layer, tokens, self._entering[batch], hooks)
            return _layer_of_whole(self.model, self.layer, tokens, [*self._finished, *hooks])

    def advance(self, hooks: Sequence[NamedHook], watch: Callable[[int], Sequence[NamedHook]] | None = None) -> None:
        """Go on to the next layer; the hooks of this one keep acting.

        Args:
            hooks: what is changed in the current layer from here on.
            watch: gives, by batch, hooks that look on in this pass alone.
        """
        is_last = self.layer + 1 == int(self.model.cfg.n_layers)  # nobody reads what the last layer gives
        for batch in range(self.n_batches):
            if watch is not None or (self._is_alone and not is_last):
                output = self.run(batch, [*hooks, *(watch(batch) if watch is not None else ())])
                self._entering[batch] = output if self._is_alone else None
        self._finished += hooks
        self.layer += 1


def can_run_layers_alone(model: HookedModel) -> bool:
    """Whether layers computed alone give what a whole pass gives; tried once per model, at every layer."""
    key: Any = model
    if key not in _TRIED:
        try:
            _TRIED[key] = _walks(model)
        except (AttributeError, RuntimeError, TypeError, ValueError, KeyError, IndexError):
            _TRIED[key] = False
    return _TRIED[key]


@torch.no_grad()
def _walks(model: HookedModel) -> bool:
    can_fuse(model)
    tokens = check_tokens(model)
    entering: Tensor | None = None
    for layer in range(int(model.cfg.n_layers)):
        whole = _layer_of_whole(model, layer, tokens, [])
        alone = _layer_alone(model, layer, tokens, entering, [])
        tolerance = _TOLERANCE.get(whole.dtype, _COARSE_TOLERANCE) * float(whole.abs().max())
        if alone.shape != whole.shape or not float((alone - whole).abs().max()) <= tolerance:
            return False
        entering = alone
    return True


def _layer_of_whole(model: Any, layer: int, tokens: Tensor, hooks: Sequence[NamedHook]) -> Tensor:
    kept: list[Tensor] = []
    handle = model.blocks[layer].register_forward_hook(lambda module, inputs, output: kept.append(_hidden(output)))
    try:
        forward(model, tokens, [*hooks, *logits_at(model, None)])
    finally:
        handle.remove()
    return kept[0]


def _layer_alone(model: Any, layer: int, tokens: Tensor, entering: Tensor | None, hooks: Sequence[NamedHook]) -> Tensor:
    with _others_pass_on(model, layer, entering):
        return _layer_of_whole(model, layer, tokens, hooks)


@contextmanager
def _others_pass_on(model: Any, layer: int, entering: Tensor | None) -> Iterator[None]:
    """Let all layers but one pass on what they get inside the block, the one before it what shall enter."""
    others = [block for index, block in enumerate(model.blocks) if index != layer]
    handle = None
    if layer > 0:
        kept = cast("Tensor", entering)  # handed over as a copy: a layer may add to its input in place
        handle = model.blocks[layer - 1].register_forward_hook(lambda module, inputs, output: kept.clone())
    try:
        for block in others:  # not setattr: the bridge hands that on to the component
            block.__dict__["forward"] = _pass_on
        yield
    finally:
        for block in others:
            block.__dict__.pop("forward", None)
        if handle is not None:
            handle.remove()


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden.detach()
