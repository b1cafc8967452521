"""TransformerLens' HookedTransformer (up to version 3): built from a checkpoint, or checked against one.

It has its own code and copies of the weights. Its loading knows families by name, drops biases that a family rarely
has, does not read all sizes from the configuration, and by default folds and centres weights. Here the weights are not
processed, sizes and biases are the checkpoint's, and every parameter is compared with the checkpoint.
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

#: Modules of a layer with biases, and the biases' names in HookedTransformer (with ``_`` for grouped keys and values).
_BIASES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("self_attn.q_proj",), ("attn.b_Q",)),
    (("self_attn.k_proj",), ("attn._b_K", "attn.b_K")),
    (("self_attn.v_proj",), ("attn._b_V", "attn.b_V")),
    (ATTENTION_OUTPUTS, ("attn.b_O",)),
    (MLP_OUTPUTS, ("mlp.b_out",)),
)
#: By first word, the hub owners of the models that TransformerLens names without an owner.
_OWNERS = {"gpt2": "openai-community", "distilgpt2": "distilbert"}
#: Layers whose biases act before the gate; HookedTransformer has one bias, after the gate.
_GATED = ("mlp.gate_proj", "mlp.up_proj")
#: Errors of TransformerLens' loading if it does not know a family or takes it for another one.
_NOT_BUILT = (AssertionError, AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
_HOW = "load it by HookedTransformer.from_pretrained_no_processing, and name its directory in cfg.tokenizer_name"


def is_hooked_transformer(model: Any) -> bool:
    """Whether a model is TransformerLens' HookedTransformer; imports nothing."""
    kind = getattr(sys.modules.get("transformer_lens.HookedTransformer"), "HookedTransformer", None)
    return kind is not None and isinstance(model, kind)


def checkpoint_of(model: Any) -> str:
    """The directory or hub id that a HookedTransformer in memory was loaded from."""
    norm, name = model.cfg.normalization_type, model.cfg.tokenizer_name
    if norm not in ("LN", "RMS"):
        raise RequestError(f"expected a HookedTransformer with unprocessed weights, got folded norms ({norm}); {_HOW}")
    if not name:
        raise RequestError(
            "expected a HookedTransformer of a checkpoint, got one that names none; pass its directory instead"
        )
    owner = _OWNERS.get(str(name).partition("-")[0])
    return str(name) if owner is None or Path(name).exists() else f"{owner}/{name}"


def make_hooked_transformer(plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> Any:
    """A HookedTransformer with a plain model's weights, device and format: nothing folded or centred, with all biases.

    It tokenises text as the tokenizer does, and adds no beginning-of-sequence token. ``path`` is the checkpoint.
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
            warnings.simplefilter("ignore", DeprecationWarning)  # HookedTransformer itself is deprecated
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

    Equal logits are not enough: centred weights and folded value biases change head outputs but not logits.

    Args:
        model: the model; it is returned in evaluation mode, without gradients of its weights.
        plain: the checkpoint's model of transformers, in the same format.
    """
    try:
        expected = _converted(plain, model.cfg)
    except _NOT_BUILT as error:
        raise RequestError(
            f"expected a HookedTransformer of {path}, got another model ({first_line(error)})"
        ) from error
    for name, parameter in model.named_parameters():
        weight = expected.get(name)
        if weight is None or torch.equal(parameter, weight.to(parameter).reshape(parameter.shape)):
            continue
        if ".b_" in name and not bool(parameter.any()):
            raise RequestError(
                f"expected {name} of {path}, got zeros: TransformerLens drops it on loading; pass the directory "
                "instead (LCC_LENS_HOOKS=hooked-transformer keeps it)"
            )
        raise RequestError(f"expected the weights of {path}, got others in {name}; {_HOW}")
    return model.eval().requires_grad_(False)


def plain_norm(module: Any, eps: float) -> nn.Module:
    """PyTorch's module for a norm of HookedTransformer, in float32."""
    has_shift = hasattr(module, "b")
    norm: nn.Module = (nn.LayerNorm if has_shift else nn.RMSNorm)(len(module.w), eps=eps).to(module.w.device)
    norm.load_state_dict({"weight": module.w, **({"bias": module.b} if has_shift else {})})
    return norm.requires_grad_(False)


def logit_transform(model: Any) -> Callable[[Tensor], Tensor]:
    """HookedTransformer's soft cap of the logits; the identity if there is none."""
    cap = float(model.cfg.output_logits_soft_cap or 0.0)
    return (lambda logits: cap * torch.tanh(logits / cap)) if cap > 0 else (lambda logits: logits)


def _configuration(plain: PreTrainedModel) -> Any:
    """TransformerLens' configuration of a model, with the sizes of transformers' configuration."""
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config

    architecture = type(plain).__name__
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:  # TransformerLens may guess from a path's name
        config = copy.deepcopy(plain.config)
        config.architectures = [architecture]
        for name, value in _older_names(config).items():
            setattr(config, name, value)
        config.save_pretrained(folder)
        cfg = get_pretrained_model_config(
            folder, hf_cfg=config.to_dict(), device=str(plain.device), dtype=plain.dtype, default_prepend_bos=False
        )
    if cfg.original_architecture != architecture:
        raise ValueError(f"taken for {cfg.original_architecture}; rename the temporary folder")
    entries = {**cfg.to_dict(), "tokenizer_name": None, **_sizes(plain.config, cfg)}
    return HookedTransformerConfig.from_dict(entries)


def _older_names(config: Any) -> Mapping[str, Any]:
    """Entries under older names of transformers, which TransformerLens reads."""
    names = {"n_ctx": getattr(config, "n_positions", None)}
    names["partial_rotary_factor"] = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor")
    return {name: value for name, value in names.items() if value is not None and not hasattr(config, name)}


def _sizes(config: Any, cfg: Any) -> Mapping[str, Any]:
    """Entries of TransformerLens' configuration ``cfg`` that must follow transformers' ``config``."""
    sizes: dict[str, Any] = {"n_ctx": int(getattr(config, "max_position_embeddings", cfg.n_ctx))}
    d_head = getattr(config, "head_dim", None)
    if d_head and d_head != cfg.d_head:
        sizes |= {"d_head": d_head, "attn_scale": -1.0}
        if cfg.rotary_dim == cfg.d_head:
            sizes["rotary_dim"] = d_head
    if getattr(config, "n_inner", None):
        sizes["d_mlp"] = config.n_inner
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if theta and cfg.positional_embedding_type == "rotary":
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
                raise ValueError(f"biases before the gate of the MLP, {name}, which HookedTransformer cannot have")
        for readers, names in _BIASES:
            bias = next((getattr(modules[name], "bias", None) for name in readers if name in modules), None)
            present = (f"blocks.{index}.{name}" for name in names)
            target = next((name for name in present if name in weights), None)
            if bias is not None and target is not None:
                weights[target] = bias.reshape(weights[target].shape)
    return weights
