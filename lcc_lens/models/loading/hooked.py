"""Load models under hooks, and check that they compute what plain transformers computes."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.config import DeviceMap, HookKind, default_device, default_device_map, hook_kind
from lcc_lens.core.errors import LensError, RequestError, first_line
from lcc_lens.core.machine.garbage import uncollected
from lcc_lens.core.showing import Shown
from lcc_lens.data.batches import limit_tokens
from lcc_lens.models.architecture.context import context_of
from lcc_lens.models.architecture.layers import is_transposed
from lcc_lens.models.hooked.copied_weights import copied_projection_names, remember_copied_projections
from lcc_lens.models.hooked.fused_attention import default_attention_gap
from lcc_lens.models.hooked.hooked_transformer import (
    check_weights,
    checkpoint_of,
    is_hooked_transformer,
    make_hooked_transformer,
)
from lcc_lens.models.hooked.hooks import HookedModel, z_adders, z_name
from lcc_lens.models.hooked.offloading import device_of, weight_in_memory
from lcc_lens.models.hooked.self_checks import SAME_LOGITS, run_with_activations, spread_tokens
from lcc_lens.models.hooked.weights import remember_own_hooks, remember_plain_names
from lcc_lens.models.loading.in_memory import stored_model
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
#: By hooked model, its weights' identity.
_IDENTITIES: WeakKeyDictionary[Any, ModelIdentity] = WeakKeyDictionary()


@dataclass(frozen=True)
class ModelIdentity:
    """A model's weights: the reference that the user gave, their directory, and their SHA-256."""

    reference: str
    path: Path
    sha256: str

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The model on disk."""
        return Checkpoint(self.path)


@dataclass(frozen=True, repr=False)
class LoadedModel(Shown):
    """A hooked model with its tokenizer, identity, and the plain names of its output projections by layer.

    ``is_transposed`` says that the output projections are stored as ``[in, out]``, as GPT-2's are; ``removed_heads``
    are, by layer, the heads whose columns of the output projection are all zero, so that their output is not used.
    """

    model: HookedModel
    tokenizer: PreTrainedTokenizerBase
    identity: ModelIdentity
    output_projections: tuple[str, ...]
    is_transposed: bool
    removed_heads: tuple[tuple[int, ...], ...]
    context: int
    """Tokens that a sequence may have at most."""


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model directory."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # every class fails on missing and damaged files in its own way
        raise RequestError(f"expected a tokenizer in {path}, got none that loads ({first_line(error)})") from error
    if not _has_words(tokenizer):
        raise RequestError(
            f"expected a tokenizer in {path}, got none; copy tokenizer.json or its like from the model it belongs to"
        )
    config = Checkpoint(path).config if (path / "config.json").exists() else {}
    n_embeddings = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if isinstance(n_embeddings, int):
        limit_tokens(tokenizer, n_embeddings)
    return cast("PreTrainedTokenizerBase", tokenizer)


@uncollected()
def load_hooked(
    reference: str | Path | torch.nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    hooks: HookKind | None = None,
) -> LoadedModel:
    """Load a model under TransformerLens' hooks, and check it.

    A model of transformers in memory is first stored in the cache (see
    :func:`lcc_lens.models.loading.in_memory.stored_model`), since results name weights on disk, and hooks rename a
    model's keys. A HookedTransformer (TransformerLens 3) in memory is used itself, if its weights are its checkpoint's,
    unprocessed (see :mod:`lcc_lens.models.hooked.hooked_transformer`).

    Checked: the hooked logits equal plain transformers', ``hook_z`` has the expected shape, and a change at ``hook_z``
    changes the logits.

    Args:
        reference: see :func:`resolve`, or a model of transformers, or a HookedTransformer.
        tokenizer: of a model in memory; a directory has its own.
        device: see :func:`lcc_lens.core.config.default_device`.
        dtype: see :func:`lcc_lens.core.config.compute_dtype`.
        device_map: for models larger than memory, see :func:`lcc_lens.models.hooked.offloading.placement`.
        hooks: see :func:`lcc_lens.core.config.hook_kind`.

    Raises:
        RequestError: the reference cannot be served, or TransformerLens does not take the architecture.
        LensError: one of the checks fails.
    """
    in_memory: Any = reference if is_hooked_transformer(reference) else None
    if in_memory is not None:
        reference, device, dtype = checkpoint_of(in_memory), device_of(in_memory), in_memory.cfg.dtype
    reference = as_reference(reference, tokenizer)
    path = resolve(reference)
    is_bridge = in_memory is None and (hooks or hook_kind()) == "bridge"
    _check_device_map(device or default_device(), device_map or default_device_map(), is_bridge=is_bridge)
    plain, sha256 = _read(path, device=device, dtype=dtype, device_map=device_map)
    tokenizer = _own_tokenizer(path, plain.get_input_embeddings().num_embeddings)
    tokens = spread_tokens(plain.config.get_text_config().vocab_size, plain.device, context_of(plain.config))
    expected = _plain_logits(plain, tokens, path)
    names = {id(module): name for name, module in plain.named_modules()}
    if is_bridge:
        model = _bridge(plain, tokenizer, path)
        remember_plain_names(model, names)
    else:
        built = in_memory is None
        model = make_hooked_transformer(plain, tokenizer, path) if built else check_weights(in_memory, plain, path)
        remember_copied_projections(model, plain)
    _check_hooked(model, tokens, expected, str(reference))
    remember_own_hooks(model)
    modules = _output_projections(model, plain)
    identity = _IDENTITIES[model] = ModelIdentity(str(reference), path, sha256)
    removed = tuple(_removed_heads(module, int(model.cfg.n_heads)) for module in modules)
    return LoadedModel(
        cast("HookedModel", model), tokenizer, identity, tuple(names[id(module)] for module in modules),
        is_transposed(modules[0]), removed, context_of(plain.config) or int(model.cfg.n_ctx),
    )  # fmt: skip


def _read(path: Path, **settings: Any) -> tuple[PreTrainedModel, str]:
    """A plain model that computes attention step by step, and the SHA-256 of its weights as they were read."""
    checkpoint = Checkpoint(path)
    with checkpoint.read_at_once():
        return load_plain(path, attention="eager", **settings), checkpoint.sha256


def as_reference(
    reference: str | Path | torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None = None
) -> str | Path:
    """A reference itself; of a model in memory, the directory in the cache where it is stored."""
    if isinstance(reference, str | Path):
        return reference
    return stored_model(reference, tokenizer)


def identity_of(model: HookedModel) -> ModelIdentity | None:
    """The identity of a hooked model's weights; None if :func:`load_hooked` did not load it."""
    return _IDENTITIES.get(model)


def _has_words(tokenizer: Any) -> bool:
    """Whether a tokenizer has at least two tokens that are not special; without files it may have one, a blank."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return len(tokenizer.get_vocab().keys() - special - {*tokenizer.all_special_tokens}) > 1


def _bridge(plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    try:
        bridge = TransformerBridge.boot_transformers(
            str(path), hf_model=plain, tokenizer=tokenizer, device=str(plain.device), dtype=plain.dtype
        )
        return bridge.requires_grad_(False)  # TransformerLens 3 adds an output bias of its own
    except Exception as error:  # every adapter fails on what it does not know in its own way
        kind = plain.config.model_type
        raise RequestError(
            f"expected an architecture that TransformerLens takes, got {kind} ({first_line(error)}); use another model"
        ) from error


def _output_projections(model: Any, plain: PreTrainedModel) -> list[torch.nn.Module]:
    """The plain model's output projections, by layer."""
    if is_hooked_transformer(model):
        return [plain.get_submodule(name) for name in copied_projection_names(model, "z")]
    return [block.attn.o.original_component for block in model.blocks]


def _plain_logits(plain: PreTrainedModel, tokens: Tensor, path: Path) -> Tensor:
    """The logits that a model under hooks is held to."""
    try:
        with torch.inference_mode():
            logits: Tensor = plain(tokens).logits.float()
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise LensError(
            f"expected the model in {path} to run in plain transformers, got an error ({first_line(error)}); check its "
            "config.json"
        ) from error
    return logits


def _check_hooked(model: Any, tokens: Tensor, expected: Tensor, reference: str) -> None:
    cfg = model.cfg
    names = [z_name(layer) for layer in range(int(cfg.n_layers))]
    shape = (*tokens.shape, cfg.n_heads, cfg.d_head)
    try:
        logits, seen = run_with_activations(model, tokens, names)
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise LensError(
            f"expected {reference} to run under hooks, got an error ({first_line(error)}); this architecture is not "
            "supported"
        ) from error
    for layer, name in enumerate(names):
        if tuple(seen[name].shape) != shape:
            raise LensError(
                f"expected hook_z of shape {shape} in every layer of {reference}, got {tuple(seen[name].shape)} in "
                f"layer {layer}; this architecture is not supported"
            )
    logits = logits.float()
    shift = {0: torch.ones(cfg.n_heads, cfg.d_head, device=tokens.device)}
    with torch.inference_mode():
        shifted = model.run_with_hooks(tokens, fwd_hooks=z_adders(shift)).float()
    distance = float((logits - expected).abs().max())
    if not distance <= SAME_LOGITS.of(cfg.dtype) * float(expected.abs().max().clamp_min(1)):
        raise LensError(
            f"expected hooked logits of {reference} equal to plain transformers', got a difference of {distance:.2g}; "
            "this architecture is not supported"
        )
    if not bool((shifted != logits).any()):
        raise LensError(f"expected a change at hook_z of {reference} to change the logits, got none; not supported")
    if gap := default_attention_gap(model):
        logger.warning(
            "transformers' default attention gives %s other logits, by up to %.2g, than step-by-step attention, which "
            "hooks and exports are checked with", reference, gap,
        )  # fmt: skip


def _removed_heads(output: torch.nn.Module, n_heads: int) -> tuple[int, ...]:
    """The heads whose columns of an output projection are all zero."""
    weight = weight_in_memory(output)
    columns = weight if is_transposed(output) else weight.T
    if len(columns) % n_heads:
        raise LensError(f"expected an output projection of {n_heads} equal heads, got {len(columns)} inputs")
    is_removed = ~columns.reshape(n_heads, -1).any(dim=1)
    return tuple(is_removed.nonzero().flatten().tolist())


def _check_device_map(device: torch.device, device_map: DeviceMap | None, *, is_bridge: bool) -> None:
    """TransformerLens runs models with layers on disk on the CPU alone, and HookedTransformer copies all weights."""
    if device_map is not None and not is_bridge:
        raise RequestError(
            f"expected a TransformerBridge for the device map {device_map}, got HookedTransformer; set "
            "LCC_LENS_HOOKS=bridge"
        )
    if device_map == "disk" and device.type != "cpu":
        raise RequestError(
            f"expected the CPU for a model with its layers on disk, got {device}; set LCC_LENS_DEVICE=cpu, or spread "
            "the model over GPUs by the device map auto"
        )


def _own_tokenizer(path: Path, n_embeddings: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, whose words have embeddings."""
    tokenizer = load_tokenizer(path)
    added = tokenizer.get_added_vocab().keys()  # added padding often has no embedding, which does no harm
    largest = max(number for token, number in tokenizer.get_vocab().items() if token not in added)
    if largest >= n_embeddings:
        raise RequestError(
            f"expected a tokenizer whose tokens the model in {path} knows, got token {largest} for {n_embeddings} "
            "embeddings; copy the tokenizer that belongs to it"
        )
    limit_tokens(tokenizer, n_embeddings)
    return tokenizer
