"""Sentence embeddings from an encoder in a local directory, to find the most similar wrong answers."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.config import compute_dtype, default_device
from lcc_lens.core.errors import LensError, RequestError, first_line
from lcc_lens.core.progress import loading_models, track
from lcc_lens.core.reading import read_json
from lcc_lens.data.batches import Batch, TokenSequence, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDER_VARIABLE = "LCC_LENS_EMBEDDER"
Pooling = Literal["mean", "cls"]
_POOLINGS: dict[str, Pooling] = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}


@dataclass(frozen=True)
class Embedder:
    """A sentence encoder: its directory's name, the hash of its weights, and how token states become one vector."""

    name: str
    sha256: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: Pooling
    max_length: int


def local_embedder() -> Embedder | None:
    """The encoder in the directory that ``LCC_LENS_EMBEDDER`` names; None if the variable is not set.

    Raises:
        RequestError: the directory holds no encoder that loads.
    """
    path = os.environ.get(EMBEDDER_VARIABLE)
    return load_embedder(Path(path).expanduser()) if path else None


def load_embedder(path: Path) -> Embedder:
    """Load a local Hugging Face directory of an encoder (BERT, MPNet, XLM-RoBERTa, ...).

    The files of sentence-transformers choose mean or CLS pooling; without them it is the mean. Normalisation, which
    :func:`embed_texts` always does, is the only other stage that they may name.

    Raises:
        RequestError: no safetensors, no tokenizer, no encoder, weights that do not fit, or another pooling.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    expected = f"expected a sentence encoder in {path} ({EMBEDDER_VARIABLE})"
    if not (path / "config.json").is_file():
        raise RequestError(f"{expected}, got no Hugging Face directory there; check the path")
    pooling, sha256, device = _pooling(path), Checkpoint(path).sha256, default_device()
    offline = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), **offline)
        with loading_models():
            model, report = AutoModel.from_pretrained(
                str(path), dtype=compute_dtype(device), use_safetensors=True, output_loading_info=True, **offline
            )
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise RequestError(f"{expected}, got none that loads ({first_line(error)})") from error
    problem = _problem(model, tokenizer, report["missing_keys"])
    if problem:
        raise RequestError(f"{expected}, got {problem}")
    model = model.to(device).eval().requires_grad_(False)
    return Embedder(path.name, sha256, model, tokenizer, pooling, _max_length(path, model, tokenizer))


def embed_texts(texts: Sequence[str], embedder: Embedder | None = None) -> Float[Tensor, "text d_embed"]:
    r"""Embed texts as unit vectors, whose products are cosines.

    With token states $h_t$ of the last layer, mean pooling gives $e = \sum_t h_t / T$ over the $T$ tokens that are not
    padding, CLS pooling $e = h_1$; the result is $e / \lVert e \rVert$, in float32 on the CPU. A text without a token
    becomes zero.

    Args:
        texts: in any order; each is cut at the encoder's longest input.
        embedder: the encoder; the one that ``LCC_LENS_EMBEDDER`` names if not given.

    Raises:
        RequestError: no encoder is given or named.
        LensError: an embedding is not finite.
    """
    embedder = embedder or local_embedder()
    if embedder is None:
        raise RequestError(f"expected a sentence encoder, got none; set {EMBEDDER_VARIABLE} to a directory with one")
    ids = embedder.tokenizer(list(texts), truncation=True, max_length=embedder.max_length)["input_ids"] if texts else []
    filled = [number for number, tokens in enumerate(ids) if tokens]
    grouped = batches([TokenSequence(torch.tensor(ids[n]), 1) for n in filled], max_tokens=8192, max_batch=128)
    embeddings = torch.zeros(len(texts), int(embedder.model.config.hidden_size))
    for batch in track(grouped, len(grouped), "embed answers"):
        embeddings[[filled[position] for position in batch.index]] = _embed(embedder, batch)
    if not bool(torch.isfinite(embeddings).all()):
        raise LensError(
            f"expected finite embeddings from {embedder.name}, got NaN or infinity; try LCC_LENS_DTYPE=float32"
        )
    return embeddings


def _embed(embedder: Embedder, batch: Batch) -> Float[Tensor, "text d_embed"]:
    device = embedder.model.device
    mask = batch.is_valid().to(device)
    with torch.inference_mode():
        states = embedder.model(input_ids=batch.tokens.to(device), attention_mask=mask.long()).last_hidden_state.float()
        # masked before the sum: a padding token's state may be NaN. The norm makes division by the count unnecessary
        pooled = states[:, 0] if embedder.pooling == "cls" else states.masked_fill(~mask[..., None], 0).sum(1)
        return torch.nn.functional.normalize(pooled, dim=1).cpu()


@dataclass(frozen=True)
class _Stage:
    type: str


@dataclass(frozen=True)
class _Limits:
    max_seq_length: int | None = None


def _pooling(path: Path) -> Pooling:
    """The pooling that sentence-transformers' files ask for; any other stage would change the embeddings."""
    file, modules = path / "1_Pooling" / "config.json", path / "modules.json"
    settings = read_json(file, dict[str, Any]) if file.exists() else {"pooling_mode": "mean"}
    stages = [stage.type.rpartition(".")[2] for stage in (read_json(modules, list[_Stage]) if modules.exists() else ())]
    mode = settings.get("pooling_mode")  # newer versions name it, older ones have a switch for each
    modes = [mode] if isinstance(mode, str) else []
    if not modes:
        modes = [key.removeprefix("pooling_mode_") for key, on in settings.items() if on is True and "_mode_" in key]
    others = [stage for stage in stages if stage not in ("Transformer", "Pooling", "Normalize")]
    if others or len(modes) != 1 or modes[0] not in _POOLINGS:
        raise RequestError(
            f"expected mean or CLS pooling alone in {path} ({EMBEDDER_VARIABLE}), "
            f"got {', '.join([*modes, *others]) or 'none'}; name another encoder"
        )
    return _POOLINGS[modes[0]]


def _problem(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, missing_keys: Collection[str]) -> str | None:
    """What keeps a loaded model from embedding sentences; None if nothing does."""
    config, n_tokens = model.config, len(tokenizer)
    if config.is_encoder_decoder or any("CausalLM" in str(name) for name in config.architectures or ()):
        return f"a {config.model_type} that writes text; name an encoder such as BERT"
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):  # transformers' answer to absent files
        return "no tokenizer beside it; fetch the whole model"
    missing = sorted(name for name in missing_keys if not name.startswith("pooler."))  # the pooler is not used
    if missing:
        return f"no weights for {missing[0]}; fetch the model again"
    if n_tokens > config.vocab_size:
        return f"a tokenizer of {n_tokens} tokens for {config.vocab_size} embeddings; fetch the model again"
    return None


def _max_length(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest input in tokens; two less than the position table, since RoBERTa's positions begin at 2."""
    settings = path / "sentence_bert_config.json"
    limit = read_json(settings, _Limits).max_seq_length if settings.exists() else None
    n_positions = int(getattr(model.config, "max_position_embeddings", 514))
    return min(int(tokenizer.model_max_length), max(n_positions - 2, 1), int(limit or n_positions))
