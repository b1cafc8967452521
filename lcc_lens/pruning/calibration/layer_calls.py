"""Record the arguments that a model passes to its decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lcc_lens.core.errors import RequestError


class _Recorded(Exception):
    """Ends a forward pass once all requested calls are recorded."""


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a decoder layer other than the hidden states: masks, rotary embeddings, ...

    Args:
        args: positional arguments after the hidden states.
        kwargs: named arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(
        self, layer: Callable[..., Any], hidden: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run a layer on other hidden states of the same shape."""
        output = layer(hidden, *self.args, **self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def has_tensors_of(self, other: LayerCall) -> bool:
        """Whether both calls pass equal tensors."""
        ours, theirs = (list(_tensors((call.args, call.kwargs))) for call in (self, other))
        return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def record_calls(
    model: nn.Module, layers: nn.ModuleList, tokens: Int[Tensor, "batch pos"], *, n_calls: int
) -> tuple[Float[Tensor, "batch pos d_model"], list[LayerCall]]:
    """Run a model on tokens and record the calls of its first decoder layers; the unembedding never runs.

    Args:
        n_calls: how many layers; the pass ends where the last of them would begin.

    Returns:
        The hidden states at the input of the first layer, and the call of each layer.
    """
    hidden_in: list[Tensor] = []
    calls: list[LayerCall] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden_in.append(args[0] if args else rest.pop("hidden_states"))
        del hidden_in[1:]
        calls.append(LayerCall(args[1:], rest))
        if len(calls) == n_calls:
            raise _Recorded

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        # With a KV cache, the second run of a layer would attend to the keys of the first.
        model(input_ids=tokens, use_cache=False)
    except _Recorded:
        return hidden_in[0], calls
    finally:
        for handle in handles:
            handle.remove()
    raise RequestError(
        f"expected {type(model).__name__} to run all its decoder layers, got {len(calls)}; the architecture is not "
        "supported"
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
