"""Gradient checkpointing under hooks: a backward pass runs each layer again as the forward pass ran it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from lcc_lens.hooks import HookedModel, NamedHook, kept_hooks


@contextmanager
def recomputed_layers(
    model: HookedModel,
    hooks: Sequence[NamedHook],
    surroundings: Callable[[HookedModel], AbstractContextManager[Any]],
) -> Iterator[None]:
    """Let forward passes inside the block keep only what enters each layer.

    Backward passes come after the block, when temporary hooks are gone; so they put back the hooks of the layer that
    they run again. Transformers' own switch would not do: it needs a model in training mode, with its dropout.

    Args:
        model: a hooked model with ``blocks``, such as TransformerBridge.
        hooks: the temporary hooks of the forward passes.
        surroundings: what else the forward passes run in.
    """
    blocks: list[Any] = list(getattr(model, "blocks", ()))
    for index, block in enumerate(blocks):
        if "forward" in block.__dict__:  # a layer that is left out (see lcc_lens.reuse)
            continue
        own = [hook for hook in hooks if hook[0].startswith(f"blocks.{index}.")]
        block.__dict__["forward"] = partial(  # not setattr: the bridge hands that on to the component
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False,
            context_fn=partial(_contexts, model, own, surroundings),
        )  # fmt: skip
    try:
        yield
    finally:
        for block in blocks:
            if isinstance(block.__dict__.get("forward"), partial):
                del block.__dict__["forward"]


def _contexts(
    model: HookedModel, hooks: list[NamedHook], surroundings: Callable[[HookedModel], AbstractContextManager[Any]]
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What a layer runs in at first, and again."""
    return nullcontext(), _again(model, hooks, surroundings)


@contextmanager
def _again(
    model: HookedModel, hooks: list[NamedHook], surroundings: Callable[[HookedModel], AbstractContextManager[Any]]
) -> Iterator[None]:
    with surroundings(model), kept_hooks(model, hooks) if hooks else nullcontext():
        yield
