"""TransformerLens' HookedTransformer (up to version 3): made from a checkpoint as it is, or checked against one.

It computes with its own code and with copies of the weights. Its loading knows families by name, drops biases that a
family rarely has, reads some sizes from elsewhere than the configuration, and by default folds and centres weights.
Here nothing is processed, sizes and biases are the checkpoint's, and every parameter is compared with it.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lcc_lens.core.errors import RequestError, first_line
from lcc_lens.models.architecture.anatomy import ATTENTION_OUTPUTS, MLP_OUTPUTS
from lcc_lens.models.architecture.layers import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Where a layer keeps biases, and what they are called in HookedTransformer (of grouped keys and values with ``_``).
_BIASES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("self_attn.q_proj",), ("attn.b_Q",)),
    (("self_attn.k_proj",), ("attn._b_K", "attn.b_K")),
    (("self_attn.v_proj",), ("attn._b_V", "attn.b_V")),
    (ATTENTION_OUTPUTS, ("attn.b_O",)),
    (MLP_OUTPUTS, ("mlp.b_out",)),
)
#: By first word, who owns the models that TransformerLens names without an owner.
_OWNERS = {"gpt2": "openai-community", "distilgpt2": "distilbert"}
#: HookedTransformer adds its one bias after the gate, where these act before it.
_GATED = ("mlp.gate_proj", "mlp.up_proj")
#: How TransformerLens' loading ends where it does not know a family or takes it for another one.
_NOT_BUILT = (AssertionError, AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
_HOW = "load it by HookedTransformer.from_pretrained_no_processing, and name its directory in cfg.tokenizer_name"


def is_hooked_transformer(model: Any) -> bool:
    """Whether a model is TransformerLens' HookedTransformer; nothing is imported to find out."""
    kind = getattr(sys.modules.get("transformer_lens.HookedTransformer"), "HookedTransformer", None)
    return kind is not None and isinstance(model, kind)


def checkpoint_of(model: Any) -> str:
    """What a HookedTransformer in memory was loaded from: a directory or a hub id."""
    norm, name = model.cfg.normalization_type, model.cfg.tokenizer_name
    if norm not in ("LN", "RMS"):
        raise RequestError(f"expected a HookedTransformer as its checkpoint is, got folded norms ({norm}); {_HOW}")
    if not name:
        raise RequestError(
            "expected a HookedTransformer of a checkpoint, got one that names none; hand over a directory"
        )
    owner = _OWNERS.get(str(name).partition("-")[0])
    return str(name) if owner is None or Path(name).exists() else f"{owner}/{name}"


def make_hooked_transformer(plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> Any:
    """A HookedTransformer with a plain model's weights: nothing folded or centred, all biases there.

    Text given to it is tokenised as the tokenizer does by itself, with no beginning-of-sequence token added.

    Args:
        plain: the model of transformers; its device and format are taken over.
        path: the checkpoint, for error messages and for ``cfg.tokenizer_name``.
    """
    try:
        from transformer_lens import HookedTransformer
        from transformer_lens.loading_from_pretrained import fill_missing_keys
    except ImportError as error:
        raise RequestError(
            "expected TransformerLens 3 for HookedTransformer, got a version without it; pip install "
            "'transformer-lens>=3.9,<4', or use its successor (LCC_LENS_HOOKS=bridge)"
        ) from error
    try:
        cfg = _configuration(plain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it says so of itself
            model: Any = HookedTransformer(cfg, move_to_device=False).to(plain.device, print_details=False)
        weights = fill_missing_keys(model, _converted(plain, cfg))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name].reshape(parameter.shape))
    except _NOT_BUILT as error:
        raise RequestError(
            f"expected an architecture that HookedTransformer takes, got {plain.config.model_type} "
            f"({first_line(error)}); use LCC_LENS_HOOKS=bridge"
        ) from error
    model.tokenizer, model.cfg.tokenizer_name = tokenizer, str(path)
    model.cfg.tokenizer_prepends_bos = model.cfg.default_prepend_bos = bool(tokenizer.encode(""))
    return model.eval().requires_grad_(False)


def check_weights(model: Any, plain: PreTrainedModel, path: Path) -> Any:
    """Refuse a HookedTransformer in memory whose parameters are not those of its checkpoint.

    Equal logits would not tell: centred writing weights and folded value biases leave them, and change head outputs.

    Args:
        model: the model; it comes back in evaluation mode, without gradients of its weights.
        plain: the checkpoint's model of transformers, in the same format.
    """
    try:
        wanted = _converted(plain, model.cfg)
    except _NOT_BUILT as error:
        raise RequestError(
            f"expected a HookedTransformer of {path}, got another model ({first_line(error)})"
        ) from error
    for name, parameter in model.named_parameters():
        weight = wanted.get(name)
        if weight is None or torch.equal(parameter, weight.to(parameter).reshape(parameter.shape)):
            continue
        if ".b_" in name and not bool(parameter.any()):
            raise RequestError(
                f"expected {name} of {path}, got zeros: TransformerLens drops it on loading; hand over the directory "
                "instead (LCC_LENS_HOOKS=hooked-transformer keeps it)"
            )
        raise RequestError(f"expected the weights of {path}, got others in {name}; {_HOW}")
    return model.eval().requires_grad_(False)


def plain_norm(module: Any, eps: float) -> nn.Module:
    """PyTorch's own module for a norm of HookedTransformer, in float32."""
    has_shift = hasattr(module, "b")
    made: nn.Module = (nn.LayerNorm if has_shift else nn.RMSNorm)(len(module.w), eps=eps).to(module.w.device)
    made.load_state_dict({"weight": module.w, **({"bias": module.b} if has_shift else {})})
    return made.requires_grad_(False)


def logit_transform(model: Any) -> Callable[[Tensor], Tensor]:
    """What HookedTransformer does to logits: its soft cap, if any."""
    cap = float(model.cfg.output_logits_soft_cap or 0.0)
    return (lambda logits: cap * torch.tanh(logits / cap)) if cap > 0 else (lambda logits: logits)


def _configuration(plain: PreTrainedModel) -> Any:
    """TransformerLens' configuration of a model, with the sizes that it takes from elsewhere put right."""
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config

    architecture = type(plain).__name__
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:  # a path's name may stand for an architecture
        config = copy.deepcopy(plain.config)
        config.architectures = [architecture]
        for name, value in _older_names(config).items():
            setattr(config, name, value)
        config.save_pretrained(folder)
        found = get_pretrained_model_config(
            folder, hf_cfg=config.to_dict(), device=str(plain.device), dtype=plain.dtype, default_prepend_bos=False
        )
    if found.original_architecture != architecture:
        raise ValueError(f"taken for {found.original_architecture}; rename the temporary folder")
    cfg = {**found.to_dict(), "tokenizer_name": None, **_sizes(plain.config, found)}
    return HookedTransformerConfig.from_dict(cfg)


def _older_names(config: Any) -> Mapping[str, Any]:
    """What TransformerLens reads by names that transformers has given up."""
    names = {"n_ctx": getattr(config, "n_positions", None)}
    names["partial_rotary_factor"] = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor")
    return {name: value for name, value in names.items() if value is not None and not hasattr(config, name)}


def _sizes(config: Any, found: Any) -> Mapping[str, Any]:
    """Sizes by the configuration of transformers."""
    sizes: dict[str, Any] = {"n_ctx": int(getattr(config, "max_position_embeddings", found.n_ctx))}
    d_head = getattr(config, "head_dim", None)
    if d_head and d_head != found.d_head:
        sizes |= {"d_head": d_head, "attn_scale": -1.0}
        if found.rotary_dim == found.d_head:
            sizes["rotary_dim"] = d_head
    if getattr(config, "n_inner", None):
        sizes["d_mlp"] = config.n_inner
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if theta and found.positional_embedding_type == "rotary":
        sizes["rotary_base"] = theta
    return sizes


def _converted(plain: PreTrainedModel, cfg: Any) -> dict[str, Tensor]:
    """A plain model's weights by the names of HookedTransformer, with the biases that TransformerLens leaves out."""
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    weights: dict[str, Tensor] = get_pretrained_state_dict(".", cfg, plain, dtype=plain.dtype)
    _, layers = decoder_layers(plain, plain.config)
    for index, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        for name in _GATED:
            bias = getattr(modules.get(name), "bias", None)
            if bias is not None and bool(bias.any()) and _GATED[0] in modules:
                raise ValueError(f"biases before the gate of the MLP, {name}, which it adds after it")
        for readers, names in _BIASES:
            bias = next((getattr(modules[name], "bias", None) for name in readers if name in modules), None)
            wanted = next((name for name in names if f"blocks.{index}.{name}" in weights), None)
            if bias is not None and wanted is not None:
                place = f"blocks.{index}.{wanted}"
                weights[place] = bias.reshape(weights[place].shape)
    return weights
