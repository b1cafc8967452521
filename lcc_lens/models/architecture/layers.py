"""The decoder layers of a Hugging Face model, found from its configuration and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError, first_line
from lcc_lens.core.machine.garbage import uncollected
from lcc_lens.core.side_files import UNTRUSTED_ENTRIES


@uncollected()
def read_config(model_dir: Path) -> Any:
    """The transformers configuration of a checkpoint."""
    from transformers import AutoConfig

    _ = Checkpoint(model_dir).config  # there, and an object
    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    except Exception as error:  # every family has checks and errors of its own
        raise _unknown_model(model_dir, error) from error
    _forget_choices(config)
    return config


def _forget_choices(config: Any) -> None:
    """Leave code, kernels and the kind of output to us: a configuration may name some that the hub would send."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        if part is not None:
            part.return_dict = True
        for name in UNTRUSTED_ENTRIES:
            if getattr(part, name, None) is not None:
                delattr(part, name) if name in vars(part) else setattr(part, name, None)


@uncollected()
def skeleton(model_dir: Path, config: Any) -> nn.Module:
    """Build a model on the ``meta`` device, without memory for its weights: for names and shapes.

    Raises:
        RequestError: transformers has no causal language model for the configuration.
    """
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM  # from_config has no types
    try:
        with torch.device("meta"):
            model: nn.Module = factory.from_config(config)
    except Exception as error:  # sizes that do not fit fail within a family's own code
        raise _unknown_model(model_dir, error) from error
    return model


def decoder_layers(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """Find a model's decoder layers: the outermost module list as long as the configuration says.

    Returns:
        The list's name within the model, and the list.
    """
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers}
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        raise RequestError(
            f"expected one list of {n_layers} decoder layers, got {len(outermost)} in {type(model).__name__}; "
            "use a decoder-only language model"
        )
    return outermost[0], lists[outermost[0]]


def head_size(config: Any) -> int:
    """The width of a head by transformers' configuration of a (text) model."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a plain weight matrix."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is GPT-2's ``Conv1D``, a linear layer that holds its weight as ``[in, out]``."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_weight(module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """The weight of a linear layer with one row per output, whatever its layout."""
    weight = cast("Tensor", module.weight)  # no parameter while a change of it is applied
    return weight.T if is_transposed(module) else weight


def _unknown_model(model_dir: Path, error: Exception) -> RequestError:
    """One line for an error of transformers, whose messages run over many lines."""
    return RequestError(
        f"expected a causal language model in {model_dir}, got none that loads ({first_line(error)}); "
        "name another model"
    )
