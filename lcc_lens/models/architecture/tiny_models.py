"""Build a tiny random model of the same architecture, to test how it behaves without a list of families."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.models.architecture.layers import head_size
from lcc_lens.models.architecture.retyping import split_tensor

_N_TOKENS, _VOCABULARY, _WIDTH = 16, 61, 24
#: Window of local attention in a tiny model: short enough to act on its few tokens.
_WINDOW = 4
_INNER_SIZES = ("intermediate_size", "moe_intermediate_size", "ffn_dim")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")


def shrink(config: Any) -> Any:
    """A copy of a transformers configuration with few, narrow layers: one of every kind that the model has.

    Heads keep their size and the way they share key-value heads; local attention gets a window of a few tokens.
    """
    small = copy.deepcopy(config)
    _keep_layers(small)
    n_heads = int(config.num_attention_heads)
    names = [name for name in _KEY_VALUE_HEADS if getattr(config, name, None)]
    n_groups = int(getattr(config, names[0])) if names else n_heads
    few = min(2, n_groups)
    small.num_attention_heads = few * min(3, n_heads // n_groups)
    small.hidden_size = small.num_attention_heads * head_size(config)
    for name in names:
        setattr(small, name, few)
    for name in _INNER_SIZES:
        if isinstance(getattr(config, name, None), int):
            setattr(small, name, _WIDTH)
    if getattr(config, "sliding_window", None):
        small.sliding_window = _WINDOW
    small.vocab_size, small.pad_token_id = _VOCABULARY, None
    return small


def build_tiny(config: Any, weights: Mapping[str, Tensor] | None = None) -> nn.Module | None:
    """A model of a small configuration, on the CPU in float32.

    Args:
        config: see :func:`shrink`.
        weights: parameters by name, as this model or one with fused layers names them; random ones if not given.
            Biases that are not among them are zero.

    Returns:
        None if the weights do not fit the model.
    """
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM  # from_config has no types
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = factory.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    if weights is None:
        _randomise(parameters)
        return model
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    weights = {n: v for name, value in weights.items() for n, v in split_tensor(name, value, shapes).items()}
    absent = parameters.keys() - weights.keys()
    shapes_fit = all(name in parameters and parameters[name].shape == value.shape for name, value in weights.items())
    if not shapes_fit or not all(name.endswith(".bias") for name in absent):
        return None
    for name, parameter in parameters.items():
        parameter.copy_(weights[name]) if name in weights else parameter.zero_()
    return model


def tiny_logits(
    model: nn.Module, shifts: Mapping[str, Float[Tensor, " d_in"]] | None = None
) -> Float[Tensor, "pos d_vocab"]:
    """A tiny model's logits of a few tokens, with constants added to the inputs of named modules."""

    def adder(shift: Tensor) -> Any:
        return lambda module, inputs: (inputs[0] + shift, *inputs[1:])

    handles = [
        model.get_submodule(name).register_forward_pre_hook(adder(shift)) for name, shift in (shifts or {}).items()
    ]
    tokens = torch.arange(1, 1 + _N_TOKENS)[None] * 7919 % _VOCABULARY
    try:
        with torch.no_grad():
            logits: Tensor = model(tokens, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits


def _keep_layers(config: Any) -> None:
    """Keep the first layer of every kind, as told apart by the lists with one entry per layer; at least two layers."""
    n_layers = int(config.num_hidden_layers)
    lists = {n: v for n, v in vars(config).items() if isinstance(v, list) and len(v) == n_layers}
    kinds = [tuple(str(values[layer]) for values in lists.values()) for layer in range(n_layers)]
    kept = sorted({kinds.index(kind) for kind in kinds} | set(range(min(2, n_layers))))
    config.num_hidden_layers = len(kept)
    for name, values in lists.items():
        setattr(config, name, [values[layer] for layer in kept])


def _randomise(parameters: Mapping[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.2 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
        centre = parameter if parameter.ndim < 2 else 0.0  # the gains of norms stay near their initial value
        parameter.copy_(centre + scale * noise)
