"""Use PyTorch's fused attention kernels under hooks, if a model gives the same results with them.

TransformerBridge computes attention step by step, so that scores and patterns can be read, and stores every head's
weights over all pairs of positions. Fused kernels store no such tensor; the input of the output projection (``hook_z``)
and everything outside attention can still be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lcc_lens.models.hooked.hooked_transformer import is_hooked_transformer
from lcc_lens.models.hooked.hooks import HookedModel, HookFunction, NamedHook, readers, resid_pre_name, z_name
from lcc_lens.models.hooked.layer_skipping import is_replaced, replaced_forward
from lcc_lens.models.hooked.self_checks import OTHER_KERNELS, OTHER_OPERATIONS, check_tokens, is_close, tried_once

_KERNELS = "sdpa"
#: Configuration names of the soft cap of attention scores, which fused kernels do not apply.
_SOFT_CAPS = ("attn_logit_softcapping", "attn_logit_softcap")
#: Settings of TransformerLens under which each head's inputs or results are computed separately.
_STEPWISE_SETTINGS = ("use_split_qkv_input", "use_attn_in", "use_attn_result")


@dataclass(frozen=True)
class _Fusion:
    """The configurations that select a model's kernels, and the hook points of a layer that fused kernels skip."""

    configs: tuple[Any, ...]
    skipped: frozenset[str]


@contextmanager
def fused_attention(model: HookedModel) -> Iterator[bool]:
    """Use fused kernels inside the block, if they give the same results and no hook reads inside attention.

    Yields:
        Whether they are used.
    """
    fusion = _fusion(model)
    if fusion is None or _is_watched(model, fusion):
        yield False
        return
    with _fused(model, fusion.configs):
        yield True


def can_fuse(model: HookedModel) -> bool:
    """Whether fused kernels give the same results, with edited head outputs too; tried once per model."""
    return _fusion(model) is not None


@tried_once(on_failure=0.0)
def default_attention_gap(model: Any) -> float:
    """How far the logits of transformers' default attention are from those of attention step by step; 0 if equal.

    In half precision a whole pass amplifies rounding errors, so that layers which agree one by one count as equal.
    """
    plain: Any = getattr(model, "original_model", None)
    if is_hooked_transformer(model) or not getattr(plain, "_supports_sdpa", False):
        return 0.0
    if model.cfg.dtype != torch.float32 and can_fuse(model):
        return 0.0
    tokens = check_tokens(model)
    stepwise = model.run_with_hooks(tokens).float()
    with _fused(model, _configs(plain)):
        default = model.run_with_hooks(tokens, use_cache=False).float()
    is_same = is_close(default, stepwise, OTHER_OPERATIONS, model.cfg.dtype)
    return 0.0 if is_same else float((default - stepwise).abs().max())


def _configs(plain: nn.Module) -> tuple[Any, ...]:
    """The configurations of a plain model's modules that choose attention kernels."""
    by_id = {id(module.config): module.config for module in plain.modules() if hasattr(module, "config")}
    return tuple(config for config in by_id.values() if hasattr(config, "_attn_implementation"))


def _is_watched(model: HookedModel, fusion: _Fusion) -> bool:
    """Whether there are hooks that fused kernels would skip."""
    cfg = model.cfg
    if any(getattr(cfg, name, False) for name in _STEPWISE_SETTINGS):
        return True
    points = model.hook_dict  # collected anew at every access
    names = (_attention(layer) + name for layer in range(int(cfg.n_layers)) for name in fusion.skipped)
    return any((point := points.get(name)) is not None and (point.fwd_hooks or point.bwd_hooks) for name in names)


@contextmanager
def _fused(model: Any, configs: Sequence[Any]) -> Iterator[None]:
    """Compute attention by transformers' own forward with fused kernels inside the block."""
    attentions = [block.attn for block in model.blocks]
    if any(map(is_replaced, attentions)):  # already inside such a block
        yield
        return
    before = [config._attn_implementation for config in configs]
    with ExitStack() as stack:
        try:
            for config in configs:
                config._attn_implementation = _KERNELS
            for attention in attentions:
                stack.enter_context(replaced_forward(attention, attention.original_component.forward))
            yield
        finally:
            for config, name in zip(configs, before, strict=True):
                config._attn_implementation = name


@tried_once(on_failure=None)
def _fusion(model: Any) -> _Fusion | None:
    """Run both ways with edited head outputs, and compare layer by layer, both with the inputs of the first run."""
    plain = model.original_model
    configs = _configs(plain)
    capped = any(getattr(config, name, None) for config in configs for name in _SOFT_CAPS)
    if capped or not getattr(plain, "_supports_sdpa", False):
        return None
    stepwise = _sample(model)
    with _fused(model, configs):
        fused = _sample(model, stepwise.inputs, use_cache=False)
    pairs = zip(fused.results, stepwise.results, strict=True)
    is_same = all(
        is_close(result, expected, OTHER_KERNELS, model.cfg.dtype, by_norm=True) for result, expected in pairs
    )
    return _Fusion(configs, frozenset(stepwise.fired - fused.fired)) if is_same else None


class _Sample(NamedTuple):
    """Activations of one run."""

    inputs: list[Tensor]
    """Every layer's input, if none were given."""
    results: list[Tensor]
    """Every layer's head outputs, the outputs of the output projections with edited head outputs, and the logits."""
    fired: set[str]
    """The hook points of the first layer's attention that were called."""


def _sample(model: Any, inputs: Sequence[Tensor] = (), **options: Any) -> _Sample:
    """Run a few tokens with edited head outputs.

    Args:
        inputs: every layer's input; otherwise a damaged model may amplify rounding errors of earlier layers.
    """
    n_layers = int(model.cfg.n_layers)
    before, z, out = ([torch.empty(0)] * n_layers for _ in range(3))
    fired: set[str] = set()

    def enter(layer: int) -> HookFunction:
        def replace(resid: Tensor, hook: Any) -> Tensor | None:
            if inputs:
                return inputs[layer]
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
    hooks += readers(
        lambda layer: f"blocks.{layer}.attn.o.hook_out", range(n_layers),
        lambda layer, values: out.__setitem__(layer, values.float()),
    )  # fmt: skip
    with torch.inference_mode(), ExitStack() as stack:
        for name, point in model.hook_dict.items():
            if name.startswith(_attention(0)):  # by PyTorch's own hooks: TransformerLens refuses some names
                record = partial(_record, fired, name.removeprefix(_attention(0)))
                stack.callback(point.register_forward_hook(record).remove)
        logits = model.run_with_hooks(check_tokens(model), fwd_hooks=hooks, **options).float()
    return _Sample(before, [*z, *out, logits], fired)


def _record(fired: set[str], name: str, *_: Any) -> None:
    fired.add(name)


def _attention(layer: int) -> str:
    """The beginning of a layer's hook points within attention."""
    return z_name(layer).removesuffix("hook_z")
