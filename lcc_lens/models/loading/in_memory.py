"""Store models of transformers that are in memory in the cache, where commands and functions read them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from lcc_lens.core.config import cache_dir
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import disk_errors, remove_leftovers, sha256_file, temporary
from lcc_lens.core.progress import loading_models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stored_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> Path:
    """Store a model and its tokenizer in the cache, under the hash of their files; the model itself is left alone.

    Args:
        model: a causal language model of transformers, without adapters or quantised weights.
        tokenizer: the model's tokenizer.

    Returns:
        A Hugging Face directory; the same one for the same contents.

    Raises:
        RequestError: another kind of model, adapters that are not merged, quantised weights, or no tokenizer.

    Example:
        >>> prune(stored_model(model, tokenizer), "out/wanda50")  # doctest: +SKIP
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise RequestError(
            f"expected a model of transformers, got {type(model).__name__}; unwrap it (of PEFT: merge_and_unload)"
        )
    adapters = [name for name, _ in model.named_parameters() if ".lora_" in name or ".base_layer." in name]
    if adapters:
        raise RequestError(f"expected merged weights, got the adapter {adapters[0]}; merge it first (merge_and_unload)")
    if getattr(model, "is_quantized", False):
        raise RequestError("expected plain weights, got a quantised model; call its dequantize() first")
    if tokenizer is None:
        raise RequestError("expected the tokenizer of a model in memory, got none; pass tokenizer=")
    folder = cache_dir() / "models"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        part = temporary(folder / "in-memory")
        part.mkdir()
        try:
            with loading_models():
                cast("Any", model).save_pretrained(part)
            cast("Any", tokenizer).save_pretrained(part)
            listed = "".join(f"{file.name} {sha256_file(file)}\n" for file in sorted(part.iterdir()))
            target = folder / f"in-memory-{hashlib.sha256(listed.encode()).hexdigest()[:12]}"
            try:
                part.rename(target)
            except OSError:  # it was stored before
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target
