"""Temporarily replace what modules compute: skip layers, or start at a later one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute ``forward`` inside the block; its hooks are still called."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward  # setattr of a TransformerBridge would set it on the wrapped module
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        if before is not None:
            module.__dict__["forward"] = before


def is_replaced(module: nn.Module) -> bool:
    """Whether a module is inside such a block."""
    return "forward" in module.__dict__


@contextmanager
def only_layers(model: Any, layers: range, hidden: Float[Tensor, "batch pos d_model"] | None = None) -> Iterator[None]:
    """Compute only some layers inside the block; the others return their input.

    The model still takes the tokens, so positions, rotations and masks are as usual. TransformerLens'
    ``start_at_layer`` has the same result, but computes the layers below.

    Args:
        model: a hooked model with ``blocks``.
        layers: a range of layers.
        hidden: the input of the first of them; the embedding's output if that is layer 0.
    """
    with ExitStack() as stack:
        if layers.start > 0 and hidden is not None:
            before = model.blocks[layers.start - 1]  # it returns a copy: a layer may change its input in place
            stack.callback(before.register_forward_hook(lambda module, inputs, output: hidden.clone()).remove)
        for index, block in enumerate(model.blocks):
            if index not in layers:
                stack.enter_context(replaced_forward(block, _pass_on))
        yield


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states
