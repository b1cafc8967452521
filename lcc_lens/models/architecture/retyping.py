"""Describe a model as another architecture that computes the same and has biases where the model's own has none."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from lcc_lens.models.architecture.layers import head_size

# Entries that name the class of a configuration, not what the model computes.
_OF_THE_CLASS = {"model_type", "architectures", "auto_map", "transformers_version"}
_LOCAL = "sliding_attention"
#: Linear layers that some architectures (Phi-3) store as one, rows below rows.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def retyped_configs(config: Any, switches: Sequence[str] = ("attention_bias",)) -> Iterator[Any]:
    """Configurations of other architectures that may compute what this one does, with biases in more linear layers.

    Most decoders without output biases (Mistral, Qwen2) compute what Llama does; SmolLM3 is Llama with local attention
    in chosen layers. The caller must test whether a candidate really computes the same.

    Args:
        switches: settings of the other architecture to turn on: ``attention_bias``, ``mlp_bias``.
    """
    from transformers import LlamaConfig, SmolLM3Config

    entries = {name: copy.deepcopy(value) for name, value in vars(config).items() if not name.startswith("_")}
    entries |= dict.fromkeys(switches, True)
    yield from _filled(LlamaConfig, "LlamaForCausalLM", entries)
    n_layers = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    local = {
        "no_rope_layers": [1] * n_layers,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": entries.get("layer_types") or n_layers * ["full_attention" if window is None else _LOCAL],
    }
    for retyped in _filled(SmolLM3Config, "SmolLM3ForCausalLM", {**entries, **local}):
        retyped.head_dim = head_size(config)
        yield retyped


def config_entries(config: Any) -> dict[str, Any]:
    """A configuration as ``config.json`` holds it, with every default written out."""
    entries: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return entries


def split_names(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The names of a stored tensor in another architecture: its own, or those of the layers that are fused in it."""
    for fused, parts in _FUSED.items():
        names = tuple(name.replace(f".{fused}.", f".{part}.") for part in parts)
        if name not in shapes and f".{fused}." in name and all(part in shapes for part in names):
            return names
    return (name,)


def split_tensor(name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A tensor, or the parts of a fused one, by new name; empty if the numbers of rows do not add up."""
    names = split_names(name, shapes)
    if len(names) == 1:
        return {name: tensor}
    rows = [shapes[part][0] for part in names]
    return dict(zip(names, tensor.split(rows), strict=True)) if sum(rows) == len(tensor) else {}


def _filled(kind: Any, architecture: str, entries: dict[str, Any]) -> Iterator[Any]:
    """The configuration of a class with those entries that it knows; none if the class refuses the sizes."""
    from huggingface_hub.errors import StrictDataclassError

    known = {field.name for field in fields(kind)} - _OF_THE_CLASS
    try:
        retyped = kind(**{name: value for name, value in entries.items() if name in known})
    except (StrictDataclassError, ValueError, TypeError):
        return
    retyped.architectures = [architecture]
    yield retyped
