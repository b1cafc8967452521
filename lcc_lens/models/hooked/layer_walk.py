"""Run a hooked model one layer at a time, or from a later layer on, from cached hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.models.hooked.forward import forward
from lcc_lens.models.hooked.fused_attention import can_fuse
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook, logits_at, readers, resid_pre_name
from lcc_lens.models.hooked.layer_skipping import only_layers
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.self_checks import SAME_OPERATIONS, check_tokens, is_close, tried_once


class LayerWalk:
    """Runs batches through a model layer by layer; the hooks of finished layers stay in effect.

    The hidden states before the current layer are cached in the model's format, so that only this layer is computed. A
    model whose layers need more than hidden states runs as a whole instead, with the same results.

    Args:
        model: the hooked model.
        batches: right-padded tokens.
        alone: whether to compute layers alone; tested if not given.
    """

    def __init__(self, model: HookedModel, batches: Sequence[Int[Tensor, "_ _"]], *, alone: bool | None = None) -> None:
        self.model, self.layer = model, 0
        self._batches = [tokens.to(device_of(model)) for tokens in batches]
        can_fuse(model)  # tested on whole passes, before any layer runs alone
        self._is_alone = can_run_layers_alone(model) if alone is None else alone
        self._hidden: list[Tensor | None] = [None] * len(self._batches)
        self._finished: list[NamedHook] = []

    @property
    def n_batches(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def run(self, batch: int, hooks: Sequence[NamedHook]) -> Float[Tensor, "batch pos d_model"]:
        """The current layer's output for a batch, under hooks in that layer."""
        tokens = self._batches[batch]
        with torch.no_grad():
            if self._is_alone:
                return _output_alone(self.model, self.layer, tokens, self._hidden[batch], hooks)
            return layer_output(self.model, self.layer, tokens, [*self._finished, *hooks])

    def advance(self, hooks: Sequence[NamedHook], watch: Callable[[int], Sequence[NamedHook]] | None = None) -> None:
        """Go on to the next layer.

        Args:
            hooks: hooks in the current layer, which stay in effect.
            watch: returns, for a batch, hooks that only read, for this pass.
        """
        is_last = self.layer + 1 == int(self.model.cfg.n_layers)  # the last layer's output is not needed
        for batch in range(self.n_batches):
            if watch is not None or (self._is_alone and not is_last):
                output = self.run(batch, [*hooks, *(watch(batch) if watch is not None else ())])
                self._hidden[batch] = output if self._is_alone else None
        self._finished += hooks
        self.layer += 1


def layer_output(
    model: Any, layer: int, tokens: Int[Tensor, "batch pos"], hooks: Sequence[NamedHook] = ()
) -> Float[Tensor, "batch pos d_model"]:
    """A layer's output, without the unembedding."""
    return _outputs(model, [layer], tokens, hooks)[0]


def _outputs(model: Any, layers: Sequence[int], tokens: Tensor, hooks: Sequence[NamedHook] = ()) -> list[Tensor]:
    """Several layers' outputs from one pass."""
    kept: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        values = (output[0] if isinstance(output, tuple) else output).detach()
        kept.append(values.clone() if len(layers) > 1 else values)  # a later layer may change its input in place

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(model.blocks[layer].register_forward_hook(keep).remove)
        forward(model, tokens, [*hooks, *logits_at(model, None)])
    return kept


def run_from_layer(
    model: HookedModel,
    layer: int,
    hidden: Float[Tensor, "batch pos d_model"],
    tokens: Int[Tensor, "batch pos"],
    hooks: list[NamedHook],
) -> Any:
    """Run a model from a layer on, with that layer's input; see :func:`can_start_at_layers`."""
    with only_layers(model, range(layer, int(model.cfg.n_layers)), hidden):
        return forward(model, tokens, hooks)


@tried_once(on_failure=False)
def can_run_layers_alone(model: HookedModel) -> bool:
    """Whether every layer computed alone gives the same output as in a whole pass; tried once per model."""
    can_fuse(model)
    tokens = check_tokens(model)
    hidden: Tensor | None = None
    for layer, whole in enumerate(_outputs(model, range(int(model.cfg.n_layers)), tokens)):
        hidden = _output_alone(model, layer, tokens, hidden, [])
        if not is_close(hidden, whole, SAME_OPERATIONS, whole.dtype):
            return False
    return True


@tried_once(on_failure=False)
def can_start_at_layers(model: HookedModel) -> bool:
    """Whether a pass that starts at a layer gives the logits of a whole one; tried once per model.

    False if a layer needs more than hidden states (keys and values of another layer, for example), or if layers cannot
    be skipped. Tested at the second, the middle and the last layer.
    """
    tokens, n_layers = check_tokens(model), int(model.cfg.n_layers)
    hidden: list[Tensor] = []
    whole = forward(model, tokens, readers(resid_pre_name, range(n_layers), lambda _, x: hidden.append(x.clone())))
    return all(
        is_close(run_from_layer(model, layer, hidden[layer], tokens, []), whole, SAME_OPERATIONS, whole.dtype)
        for layer in sorted({1, n_layers // 2, n_layers - 1} & set(range(1, n_layers)))
    )


def _output_alone(model: Any, layer: int, tokens: Tensor, hidden: Tensor | None, hooks: Sequence[NamedHook]) -> Tensor:
    with only_layers(model, range(layer, layer + 1), hidden):
        return layer_output(model, layer, tokens, hooks)
