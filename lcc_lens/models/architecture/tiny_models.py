"""Twins: an architecture in small, with random weights, asked what it computes; so no list of families is needed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.models.architecture.retyping import split_tensor

_N_TOKENS, _VOCABULARY, _WIDTH = 16, 61, 24
#: Window of local attention in a twin: short enough to act on its few tokens.
_WINDOW = 4
_INNER_SIZES = ("intermediate_size", "moe_intermediate_size", "ffn_dim")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")


def shrink(config: Any) -> Any:
    """A copy of a transformers configuration with few and narrow layers, one of every kind that the model has.

    Heads keep their size and the way they share key-value heads; local attention gets a window of a few tokens.
    """
    small = copy.deepcopy(config)
    _keep_layers(small)
    n_heads = int(config.num_attention_heads)
    d_head = int(getattr(config, "head_dim", None) or config.hidden_size // n_heads)
    names = [name for name in _KEY_VALUE_HEADS if getattr(config, name, None)]
    n_groups = int(getattr(config, names[0])) if names else n_heads
    few = min(2, n_groups)
    small.num_attention_heads = few * min(3, n_heads // n_groups)
    small.hidden_size = small.num_attention_heads * d_head
    for name in names:
        setattr(small, name, few)
    for name in _INNER_SIZES:
        if isinstance(getattr(config, name, None), int):
            setattr(small, name, _WIDTH)
    if getattr(config, "sliding_window", None):
        small.sliding_window = _WINDOW
    small.vocab_size, small.pad_token_id = _VOCABULARY, None
    return small


def build_twin(config: Any, weights: Mapping[str, Tensor] | None = None) -> nn.Module | None:
    """A model of a small configuration, on the CPU in float32.

    Args:
        config: see :func:`shrink`.
        weights: parameters by name, as the model or one with fused maps names them; random ones if not given. Biases
            that are not among them are zero.

    Returns:
        None where the weights do not fit the model.
    """
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM  # from_config has no types
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = factory.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.eval().requires_grad_(False)
    own = dict(model.named_parameters())
    if weights is None:
        _randomise(own)
        return model
    shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
    weights = {n: v for name, value in weights.items() for n, v in split_tensor(name, value, shapes).items()}
    absent = own.keys() - weights.keys()
    shapes_fit = all(name in own and own[name].shape == value.shape for name, value in weights.items())
    if not shapes_fit or not all(name.endswith(".bias") for name in absent):
        return None
    for name, parameter in own.items():
        parameter.copy_(weights[name]) if name in weights else parameter.zero_()
    return model


def twin_logits(
    model: nn.Module, shifts: Mapping[str, Float[Tensor, " d_in"]] | None = None
) -> Float[Tensor, "pos d_vocab"]:
    """A twin's logits of a few tokens, with constants added to the inputs of named modules."""

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
    """Keep the first layer of every kind, by the lists that say something of each layer; two at least."""
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
        centre = parameter if parameter.ndim < 2 else 0.0  # gains of norms stay about what they begin with
        parameter.copy_(centre + scale * noise)
