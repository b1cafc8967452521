"""Sentence embeddings from an encoder in a local directory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.config import compute_dtype, default_device
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import read_json
from lcc_lens.core.progress import loading_models, track
from lcc_lens.data.batches import Batch, TokenSequence, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDER_VARIABLE = "LCC_LENS_EMBEDDER"
#: Names of SentencePiece vocabularies, of XLM-RoBERTa and of others.
_PIECES = ("sentencepiece.bpe.model", "spiece.model", "spm.model", "tokenizer.model")
_POOLINGS: dict[str, Literal["mean", "cls"]] = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}


@dataclass(frozen=True)
class Embedder:
    """A sentence encoder: its directory's name, the hash of its weights, and how token states become one vector."""

    name: str
    sha256: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: Literal["mean", "cls"]
    max_length: int


def local_embedder() -> Embedder | None:
    """The encoder in the directory that ``LCC_LENS_EMBEDDER`` names; None where it is not set.

    Raises:
        RequestError: the variable is set but leads to no encoder that loads.
    """
    named = os.environ.get(EMBEDDER_VARIABLE)
    return load_embedder(Path(named).expanduser()) if named else None


def load_embedder(path: Path) -> Embedder:
    """Load a local Hugging Face directory of an encoder (BERT, MPNet, XLM-RoBERTa, ...).

    A directory saved by sentence-transformers may ask for mean or CLS pooling; without such a file the mean is taken.
    Its other stages must be none or a normalisation, which :func:`embed_texts` always does.

    Raises:
        RequestError: no safetensors, no tokenizer, no encoder, weights that do not fit, or another pooling.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    wanted = f"expected a sentence encoder in {path} ({EMBEDDER_VARIABLE})"
    if not (path / "config.json").is_file():
        raise RequestError(f"{wanted}, got no Hugging Face directory there; check the path")
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json", *_PIECES)):
        # transformers would build a tokenizer without words, to which all texts are equal
        raise RequestError(f"{wanted}, got no tokenizer beside it; fetch the whole model")
    pooling, sha256, device = _pooling(path), Checkpoint(path).sha256, default_device()
    offline = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), **offline)
        with loading_models():
            model, report = AutoModel.from_pretrained(
                str(path), dtype=compute_dtype(device), use_safetensors=True, output_loading_info=True, **offline
            )
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise RequestError(f"{wanted}, got none that loads ({str(error).strip().splitlines()[0][:200]})") from error
    misfit = _misfit(model, len(tokenizer), report["missing_keys"])
    if misfit:
        raise RequestError(f"{wanted}, got {misfit}")
    model = model.to(device).eval().requires_grad_(False)
    return Embedder(path.name, sha256, model, tokenizer, pooling, _max_length(path, model, tokenizer))


def embed_texts(texts: Sequence[str], embedder: Embedder | None = None) -> Float[Tensor, "text d_embed"]:
    r"""Embed texts as unit vectors, whose products are cosines.

    With token states $h_t$ of the last layer, mean pooling gives $e = \sum_t h_t / T$ over the $T$ tokens that are no
    padding, CLS pooling $e = h_1$; the result is $e / \lVert e \rVert$, in float32 on the CPU. A text without a token
    becomes zero.

    Args:
        texts: any order; they run in batches of similar length and are cut at the encoder's longest input.
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
        # The mask before the sum: a padding token's state is no one's business, even if it is not finite
        pooled = states[:, 0] if embedder.pooling == "cls" else states.masked_fill(~mask[..., None], 0).sum(1)
        # A unit vector does not care whether a sum was divided by its count
        return torch.nn.functional.normalize(pooled, dim=1).cpu()


def _pooling(path: Path) -> Literal["mean", "cls"]:
    """The pooling that sentence-transformers' files ask for; refuses what would change the embeddings unnoticed."""
    stages = read_json(path / "modules.json") if (path / "modules.json").exists() else []
    kinds = [str(stage["type"]).rpartition(".")[2] for stage in stages]
    extra = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    file = path / "1_Pooling" / "config.json"
    settings = read_json(file) if file.exists() else {"pooling_mode": "mean"}
    named = settings.get("pooling_mode")  # newer versions name it, older ones hold a switch for each
    flags = [key.removeprefix("pooling_mode_") for key, on in settings.items() if on is True and "pooling_mode_" in key]
    modes = [named] if isinstance(named, str) else flags
    if extra or len(modes) != 1 or modes[0] not in _POOLINGS:
        raise RequestError(
            f"expected mean or CLS pooling alone in {path} ({EMBEDDER_VARIABLE}), "
            f"got {', '.join([*modes, *extra]) or 'none'}; name another encoder"
        )
    return _POOLINGS[modes[0]]


def _misfit(model: PreTrainedModel, n_tokens: int, missing_keys: Iterable[str]) -> str | None:
    """What keeps a loaded model from embedding sentences, if anything does."""
    config = model.config
    if config.is_encoder_decoder or any("CausalLM" in str(name) for name in config.architectures or ()):
        return f"a {config.model_type} that writes text; name an encoder such as BERT"
    missing = sorted(name for name in missing_keys if not name.startswith("pooler."))  # the pooler is not used
    if missing:
        return f"no weights for {missing[0]}; fetch the model again"
    if n_tokens > config.vocab_size:
        return f"a tokenizer of {n_tokens} tokens for {config.vocab_size} embeddings; fetch the model again"
    return None


def _max_length(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest input in tokens; RoBERTa's positions begin at 2, so two less than there are is always safe."""
    settings = path / "sentence_bert_config.json"
    named = read_json(settings).get("max_seq_length") if settings.exists() else None
    n_positions = int(getattr(model.config, "max_position_embeddings", 514))
    return min(int(tokenizer.model_max_length), max(n_positions - 2, 1), int(named or n_positions))
