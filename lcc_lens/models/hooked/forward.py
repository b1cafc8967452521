"""Forward passes of hooked models: with the model's own attention kernels where nobody looks inside attention.

TransformerBridge computes attention step by step, so that scores and patterns can be read; that costs a tensor of every
head's weights over all pairs of positions. What enters the output projection (``hook_z``) and everything outside
attention fires as well under the model's own forward with PyTorch's fused kernels, which need no such tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lcc_lens.models.hooked.hooked_transformer import is_hooked_transformer
from lcc_lens.models.hooked.hooks import (
    HookedModel,
    HookFunction,
    NamedHook,
    kept_hooks,
    logits_at,
    readers,
    resid_pre_name,
    z_name,
)
from lcc_lens.models.hooked.offloading import entry_device

_KERNELS = "sdpa"
#: How far fused attention may lie from stepwise, relative to the whole (its norm).
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_COARSE_TOLERANCE = 2e-2
#: What architectures call the soft cap of attention scores, which fused kernels leave out.
_SOFT_CAPS = ("attn_logit_softcapping", "attn_logit_softcap")
#: Settings of TransformerLens under which heads' inputs or results are computed one by one.
_STEPWISE_SETTINGS = ("use_split_qkv_input", "use_attn_in", "use_attn_result")


@dataclass(frozen=True)
class _Fusion:
    """How a model's attention is switched: its configurations, and the hook points of a layer that then are silent."""

    configs: tuple[Any, ...]
    silent: frozenset[str]


_TRIED: WeakKeyDictionary[Any, _Fusion | None] = WeakKeyDictionary()


def forward(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    hooks: list[NamedHook],
    *,
    checkpoint_layers: bool = False,
    **options: Any,
) -> Any:
    """Run forward under hooks outside attention (``hook_z`` included); gives what ``run_with_hooks`` gives.

    Args:
        model: a hooked model.
        tokens: its input.
        hooks: temporary ones.
        checkpoint_layers: gradient checkpointing (arXiv 1604.06174): keep only each layer's input for the backward pass
            and compute the rest again there; the same gradients for less memory and a third more time.
        **options: go to the model (a mask, positions, a cache).
    """
    checkpoint_layers = checkpoint_layers and torch.is_grad_enabled()
    again = checkpointed_layers(model, hooks, fused_attention) if checkpoint_layers else nullcontext()
    with fused_attention(model) as is_fused, again:
        if (is_fused or checkpoint_layers) and not is_hooked_transformer(
            model
        ):  # which keeps no cache unless it is given one
            options.setdefault("use_cache", "past_key_values" in options)
        return model.run_with_hooks(tokens, fwd_hooks=hooks, **options)


def run_without_logits(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], hooks: list[NamedHook], **options: Any
) -> None:
    """Run forward for the sake of the hooks alone; ``options`` go to the model (a mask, positions, a cache)."""
    forward(model, tokens, [*hooks, *logits_at(model, None)], **options)


@contextmanager
def fused_attention(model: HookedModel) -> Iterator[bool]:
    """Let the model's own attention run inside the block where it gives the same and nobody looks inside it.

    Yields:
        Whether it does.
    """
    fusion = _fusion(model)
    if fusion is None or _is_watched(model, fusion):
        yield False
        return
    with _own_attention(model, fusion):
        yield True


def can_fuse(model: HookedModel) -> bool:
    """Whether the model's own attention gives the same head outputs and takes the same edits; tried once."""
    return _fusion(model) is not None


def _fusion(model: HookedModel) -> _Fusion | None:
    known: Any = model
    if known not in _TRIED:
        try:
            _TRIED[known] = _try(model)
        except (AttributeError, RuntimeError, TypeError, ValueError, KeyError, IndexError, NotImplementedError):
            _TRIED[known] = None
    return _TRIED[known]


def _is_watched(model: HookedModel, fusion: _Fusion) -> bool:
    """Whether somebody has hooks where fused kernels show nothing."""
    cfg = model.cfg
    if any(getattr(cfg, name, False) for name in _STEPWISE_SETTINGS):
        return True
    points = model.hook_dict  # collected anew at every access
    names = (_attention(layer) + name for layer in range(int(cfg.n_layers)) for name in fusion.silent)
    return any((point := points.get(name)) is not None and (point.fwd_hooks or point.bwd_hooks) for name in names)


@contextmanager
def _own_attention(model: Any, fusion: _Fusion) -> Iterator[None]:
    attentions = [block.attn for block in model.blocks]
    if any("forward" in attention.__dict__ for attention in attentions):  # already inside such a block
        yield
        return
    before = [config._attn_implementation for config in fusion.configs]
    try:
        for config in fusion.configs:
            config._attn_implementation = _KERNELS
        for attention in attentions:  # not setattr: the bridge hands that on to the component
            attention.__dict__["forward"] = attention.original_component.forward
        yield
    finally:
        for attention in attentions:
            attention.__dict__.pop("forward", None)
        for config, name in zip(fusion.configs, before, strict=True):
            config._attn_implementation = name


def _try(model: Any) -> _Fusion | None:
    """Run both ways with edited head outputs and compare layer by layer, each fed what the first run's was fed."""
    plain = model.original_model
    modules = plain.modules()
    found = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    configs = tuple(config for config in found.values() if hasattr(config, "_attn_implementation"))
    capped = any(getattr(config, name, None) for config in configs for name in _SOFT_CAPS)
    if capped or not getattr(plain, "_supports_sdpa", False):
        return None
    stepwise = _sample(model)
    fusion = _Fusion(configs, frozenset())
    with _own_attention(model, fusion):
        fused = _sample(model, stepwise.entering, use_cache=False)
    tolerance = _TOLERANCE.get(model.cfg.dtype, _COARSE_TOLERANCE)
    is_same = all(
        a.shape == b.shape and float((a - b).norm()) <= tolerance * float(a.norm().clamp_min(1e-6))
        for a, b in zip(stepwise.given, fused.given, strict=True)
    )
    return _Fusion(configs, frozenset(stepwise.fired - fused.fired)) if is_same else None


class _Sample(NamedTuple):
    """What a few tokens' way through a model shows."""

    entering: list[Tensor]
    """What every layer read, where it was not told what to read."""
    given: list[Tensor]
    """Every layer's head outputs and, with these edited, what the output projection gives; last the logits."""
    fired: set[str]
    """Which hook points of the first layer's attention fired."""


def _sample(model: Any, entering: Sequence[Tensor] = (), **options: Any) -> _Sample:
    """Run a few tokens with edited head outputs.

    Args:
        model: the model.
        entering: feed every layer this: rounding in earlier layers, which a damaged model may magnify without bounds,
            then tells nothing.
        **options: go to the model.
    """
    n_layers, device = int(model.cfg.n_layers), entry_device(model.original_model)
    tokens = (torch.arange(1, 33, device=device) * 7919 % int(model.cfg.d_vocab)).reshape(2, 16)
    before, z, out = ([torch.empty(0)] * n_layers for _ in range(3))
    fired: set[str] = set()

    def enter(layer: int) -> HookFunction:
        def replace(resid: Tensor, hook: Any) -> Tensor | None:
            if entering:
                return entering[layer]
            before[layer] = resid.clone()
            return None

        return replace

    def edit(layer: int) -> HookFunction:
        def scale(values: Tensor, hook: Any) -> Tensor:
            z[layer] = values.float()
            return 1.5 * values

        return scale

    hooks: list[NamedHook] = [(resid_pre_name(layer), enter(layer)) for layer in range(n_layers)]
    hooks += [(z_name(layer), edit(layer)) for layer in range(n_layers)]
    hooks += readers(_projected, range(n_layers), lambda layer, values: out.__setitem__(layer, values.float()))
    with torch.inference_mode(), ExitStack() as stack:
        for name, point in model.hook_dict.items():
            if name.startswith(_attention(0)):  # by PyTorch's own hooks: TransformerLens refuses some names
                note = _noting(fired, name.removeprefix(_attention(0)))
                stack.callback(point.register_forward_hook(note).remove)
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks, **options).float()
    return _Sample(before, [*z, *out, logits], fired)


def _noting(fired: set[str], name: str) -> Any:
    return lambda *_: fired.add(name)


def _projected(layer: int) -> str:
    return f"blocks.{layer}.attn.o.hook_out"


def _attention(layer: int) -> str:
    """The beginning of a layer's hook points within attention."""
    return z_name(layer).removesuffix("hook_z")


@contextmanager
def checkpointed_layers(
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
        if "forward" in block.__dict__:  # a layer that is left out (see lcc_lens.restoration.training.reuse)
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
