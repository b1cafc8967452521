"""Models by reference, hooked and checked: what loads here is known to compute what plain transformers computes."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lcc_lens.config import compute_dtype, default_device
from lcc_lens.embedded import EMBEDDED_NAME, embedded_model, gguf_model
from lcc_lens.errors import LensError, RequestError
from lcc_lens.files import weight_files, weights_sha256
from lcc_lens.hooks import HookedModel, z_adders, z_name
from lcc_lens.plain_modules import remember_plain_names
from lcc_lens.progress import without_loading_bars
from lcc_lens.pruning.layers import is_transposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(@[\w./-]+)?$")
#: How far the hooked model's logits may lie from plain transformers', relative to the largest logit.
_LOGIT_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
_COARSE_TOLERANCE = 5e-2


@dataclass(frozen=True)
class ModelIdentity:
    """Which weights a model has: what the user named, where they lie, and their SHA-256."""

    reference: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class LoadedModel:
    """A hooked model with its tokenizer, identity, and the plain names of its output projections by layer.

    ``is_transposed`` says that the output projections hold ``[in, out]``, as GPT-2's do; ``removed_heads`` are, by
    layer, the heads whose columns of the output projection are all zero: whatever they compute goes nowhere.
    """

    model: HookedModel
    tokenizer: PreTrainedTokenizerBase
    identity: ModelIdentity
    output_projections: tuple[str, ...]
    is_transposed: bool
    removed_heads: tuple[tuple[int, ...], ...]


def resolve(reference: str | Path) -> Path:
    """The local Hugging Face directory of a model reference.

    Args:
        reference: ``smollm2``, a local directory, a ``.gguf`` file, or a hub id (``owner/name`` with an
            optional ``@revision``).

    Raises:
        RequestError: nothing is there, or it holds no safetensors.
    """
    name, path = str(reference), Path(reference)
    if name == EMBEDDED_NAME and not path.exists():
        return embedded_model()
    if path.suffix == ".gguf":
        return gguf_model(path)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise RequestError(f"wanted a Hugging Face directory in {path}, got one without config.json")
        weight_files(path)
        return path
    if path.exists():
        raise RequestError(f"wanted a model directory or a .gguf file, got the file {path}")
    if not _HUB_ID.match(name) or name.startswith((".", "/")) or (name.count("/") == 0 and path.suffix == ""):
        raise RequestError(
            f"wanted a model ({EMBEDDED_NAME}, a directory, a .gguf file or a hub id owner/name), got {name!r}, "
            "which is not there; check the path"
        )
    return _from_hub(name)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model directory.

    Raises:
        RequestError: none that loads, or none at all: transformers then builds one without words, for which every text
            is empty.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, TypeError, ImportError) as error:  # a file that is not there may be None to a class
        raise RequestError(f"wanted a tokenizer in {path}, got none that loads ({_first_line(error)})") from error
    if not _has_words(tokenizer):
        raise RequestError(
            f"wanted a tokenizer in {path}, got none; copy tokenizer.json or its like from the model it belongs to"
        )
    return cast("PreTrainedTokenizerBase", tokenizer)


def load_plain(
    path: Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """Load a local directory with plain transformers, in evaluation mode, without gradients.

    Args:
        path: a Hugging Face directory.
        device: see :func:`lcc_lens.config.default_device`.
        dtype: see :func:`lcc_lens.config.compute_dtype`.
        attention: transformers' attention implementation; its own choice for the architecture if not given.

    Raises:
        RequestError: the files are damaged or no causal language model.
        LensError: a weight is NaN or infinite.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    device = device or default_device()
    dtype = dtype or compute_dtype(device)
    try:
        with without_loading_bars():
            model = AutoModelForCausalLM.from_pretrained(
                str(path), dtype=dtype, attn_implementation=attention, local_files_only=True
            )
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise RequestError(
            f"wanted a causal language model in {path}, got none that loads ({_first_line(error)})"
        ) from error
    model = model.to(device).eval().requires_grad_(False)
    _refuse_non_finite(model, path)
    return cast("PreTrainedModel", model)


def load_hooked(
    reference: str | Path, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> LoadedModel:
    """Load a model under TransformerLens' hooks and check that it is what it claims to be.

    Checked at once: the hooked logits equal plain transformers', ``hook_z`` has the promised shape, and a change at
    ``hook_z`` changes the logits.

    Raises:
        RequestError: the reference cannot be served, or TransformerLens does not take the architecture.
        LensError: one of the checks fails.
    """
    path = resolve(reference)
    plain = load_plain(path, device=device, dtype=dtype, attention="eager")
    tokenizer = load_tokenizer(path)
    tokens = _probe_tokens(plain.config.vocab_size, plain.device)
    with torch.inference_mode():
        expected = plain(tokens).logits.float()
    names = {id(module): name for name, module in plain.named_modules()}
    model = _bridge(plain, tokenizer, path)
    remember_plain_names(model, names)
    _check_hooked(model, tokens, expected, str(reference))
    modules = [block.attn.o.original_component for block in model.blocks]
    return LoadedModel(
        cast("HookedModel", model),
        tokenizer,
        identify(reference, path),
        tuple(names[id(module)] for module in modules),
        is_transposed(modules[0]),
        tuple(_removed_heads(module, int(model.cfg.n_heads)) for module in modules),
    )


def identify(reference: str | Path, path: Path) -> ModelIdentity:
    """The identity of a local model directory."""
    state = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in weight_files(path))
    return ModelIdentity(str(reference), path, _sha256_of_state(path, state))


@functools.cache
def _sha256_of_state(path: Path, state: tuple[Any, ...]) -> str:
    """A checkpoint's hash, computed once per process and state of its files."""
    return weights_sha256(path)


def device_of(model: HookedModel) -> torch.device:
    """The device that a hooked model takes its tokens on."""
    return next(iter(cast("torch.nn.Module", model).parameters())).device


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise RequestError(
            f"wanted the model {name}, got no such directory here and nothing from the hub ({_first_line(error)}); "
            "check the name or download it first"
        ) from error


def _has_words(tokenizer: Any) -> bool:
    """Whether a tokenizer has two tokens that are not special; without files, SentencePiece's blank may be one."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return len(tokenizer.get_vocab().keys() - special - {*tokenizer.all_special_tokens}) > 1


def _bridge(plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    try:
        return TransformerBridge.boot_transformers(
            str(path), hf_model=plain, tokenizer=tokenizer, device=str(plain.device), dtype=plain.dtype
        )
    except (ValueError, KeyError, AttributeError, NotImplementedError) as error:
        kind = plain.config.model_type
        raise RequestError(
            f"wanted an architecture that TransformerLens takes, got {kind} ({_first_line(error)})"
        ) from error


def _check_hooked(model: Any, tokens: Tensor, expected: Tensor, reference: str) -> None:
    cfg = model.cfg
    shapes: list[tuple[int, ...]] = []
    shift = {0: torch.ones(cfg.n_heads, cfg.d_head, device=tokens.device)}
    with torch.inference_mode():
        got = model.run_with_hooks(
            tokens, fwd_hooks=[(z_name(0), lambda z, hook: shapes.append(tuple(z.shape)))]
        ).float()
        moved = model.run_with_hooks(tokens, fwd_hooks=z_adders(shift)).float()
    wanted = (*tokens.shape, cfg.n_heads, cfg.d_head)
    if shapes != [wanted]:
        raise LensError(
            f"wanted hook_z of shape {wanted} in {reference}, got {shapes}; this architecture is not supported"
        )
    tolerance = _LOGIT_TOLERANCE.get(model.cfg.dtype, _COARSE_TOLERANCE) * float(expected.abs().max().clamp_min(1))
    distance = float((got - expected).abs().max())
    if not distance <= tolerance:
        raise LensError(
            f"wanted hooked logits of {reference} equal to plain transformers', got a difference of {distance:.2g}; "
            "this architecture is not supported"
        )
    if not bool((moved != got).any()):
        raise LensError(f"wanted a change at hook_z of {reference} to change the logits, got none; not supported")


def _removed_heads(output: torch.nn.Module, n_heads: int) -> tuple[int, ...]:
    """The heads whose columns of an output projection are all zero."""
    weight = output.get_parameter("weight")
    columns = weight if is_transposed(output) else weight.T
    is_used = columns.reshape(n_heads, -1).any(dim=1)
    return tuple(head for head in range(n_heads) if not bool(is_used[head]))


def _probe_tokens(d_vocab: int, device: torch.device) -> Tensor:
    """A fixed short sequence spread over the vocabulary."""
    return (torch.arange(1, 17, device=device) * 7919 % d_vocab)[None]


def _refuse_non_finite(model: torch.nn.Module, path: Path) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.sum(dtype=torch.float32))) and not bool(torch.isfinite(parameter).all()):
            raise LensError(
                f"wanted finite weights in {path}, got NaN or infinity in {name}; prune or fetch the model again"
            )


def _first_line(error: BaseException | Sequence[str]) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
