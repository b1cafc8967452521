"""What a model passes to its decoder layers, noted from a forward pass that ends as soon as it is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lcc_lens.core.errors import RequestError


class _Recorded(Exception):
    """Ends a forward pass once everything wanted from it is known."""


@dataclass(frozen=True)
class LayerCall:
    """How a model calls a decoder layer: everything beside the hidden states (masks, rotary embeddings, ...).

    Args:
        args: positional arguments after the hidden states.
        kwargs: named arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(
        self, layer: nn.Module, hidden: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run a layer on other hidden states of the same shape."""
        output = layer(hidden, *self.args, **self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def has_tensors_of(self, other: LayerCall) -> bool:
        """Whether two calls pass equal tensors beside the hidden states."""
        ours, theirs = (list(_tensors((call.args, call.kwargs))) for call in (self, other))
        return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def record_calls(
    model: nn.Module, layers: nn.ModuleList, tokens: Int[Tensor, "batch pos"], *, n_calls: int
) -> tuple[Float[Tensor, "batch pos d_model"], list[LayerCall]]:
    """Run a model on tokens and note how it calls its first decoder layers; the head never runs.

    Args:
        model: a causal language model.
        layers: its decoder layers.
        tokens: one batch.
        n_calls: how many layers to note. The pass ends where the last of them would begin.

    Returns:
        The hidden states that enter the first layer, and the call of each layer.

    Raises:
        RequestError: the model does not run its layers.
    """
    entering: list[Tensor] = []
    calls: list[LayerCall] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        entering.append(args[0] if args else rest.pop("hidden_states"))
        del entering[1:]
        calls.append(LayerCall(args[1:], rest))
        if len(calls) == n_calls:
            raise _Recorded

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        # A cache would keep what it sees: the second run of a layer would attend to the first one's keys.
        model(input_ids=tokens, use_cache=False)
    except _Recorded:
        return entering[0], calls
    finally:
        for handle in handles:
            handle.remove()
    raise RequestError(
        f"expected {type(model).__name__} to run all its decoder layers, got {len(calls)}; it is not supported"
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among a call's arguments, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
