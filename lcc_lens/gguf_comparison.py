"""A GGUF file held against the exported directory that it was made from, number by number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcc_lens.core.errors import LensError
from lcc_lens.core.files import read_json, read_tensor, tensor_names

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

    Array = np.ndarray[Any, np.dtype[Any]]

_EMBEDDING, _UNEMBEDDING = "token_embd.weight", "output.weight"
#: Tables that the converter computes from the configuration.
_TABLES = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
#: Masks and tables that old checkpoints store beside their weights and every reader computes anew.
_COMPUTED = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def _plain(name: str, tensor: Array, n_heads: int, n_key_value_heads: int) -> Array:
    return tensor


def _rotated(name: str, tensor: Array, n_heads: int, n_key_value_heads: int) -> Array:
    """Rows of a head that turn together side by side, where Hugging Face has them half a head apart."""
    heads = {"attn_q": n_heads, "attn_k": n_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    turned: Array = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    return turned


def _transposed(name: str, tensor: Array, n_heads: int, n_key_value_heads: int) -> Array:
    return tensor.T if name.startswith("blk.") else tensor


def _grouped(name: str, tensor: Array, n_heads: int, n_key_value_heads: int) -> Array:
    """All queries, then all keys, then all values, where Hugging Face has the three of each head together."""
    if ".attn_qkv." not in name:
        return tensor
    grouped: Array = tensor.reshape(n_heads, 3, -1, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)
    return grouped


#: By llama.cpp's name of an architecture: how it lays out what Hugging Face stores, and whether it reads the biases of
#: the output and down projections (where it does not, it refuses a file that has them).
_ARCHITECTURES: dict[str, tuple[Callable[[str, Array, int, int], Array], bool]] = {
    "llama": (_rotated, True), "granite": (_rotated, True), "phi2": (_plain, True), "gpt2": (_transposed, True),
    "bloom": (_grouped, True), "qwen2": (_plain, False), "qwen3": (_plain, False), "stablelm": (_plain, False),
    "olmo2": (_plain, False), "command-r": (_plain, False), "smollm3": (_rotated, False),
}  # fmt: skip


def compare_gguf(file: Path, directory: Path) -> tuple[str, int]:
    """Hold every tensor of a GGUF file against an exported directory's, in the layout that llama.cpp wants.

    Args:
        file: the GGUF file.
        directory: the Hugging Face directory that it was made from.

    Returns:
        llama.cpp's name of the architecture, and how many tensors are equal.

    Raises:
        LensError: one is missing, differs or came from nowhere, or llama.cpp does not read the biases.
    """
    from gguf import dequantize

    reader = _read(file)
    architecture = _field(reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise LensError(f"wanted a GGUF whose layout can be compared ({known}), got {architecture}")
    layout, reads_biases = _ARCHITECTURES[architecture]
    stored = tensor_names(directory)
    names = _names(architecture, _field(reader, f"{architecture}.block_count"), stored)
    written: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
    _require_same_names(names, written)
    if not reads_biases:
        _refuse_biases(names, architecture)
    heads = _heads(read_json(directory / "config.json"))
    _require_sizes(reader, architecture, heads[0], int(written["blk.0.ffn_up.weight"].shape[1]))
    for name, source in names.items():
        found = dequantize(written[name].data, written[name].tensor_type)
        wanted = layout(name, read_tensor(stored, source).float().numpy(), *heads)
        if found.shape != wanted.shape or not (found == wanted).all():
            raise LensError(f"wanted {name} in the GGUF equal to {source} of {directory}, got other numbers")
    return architecture, len(names)


def _read(file: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:  # a damaged file fails within the reader in many ways
        raise LensError(f"wanted a whole GGUF file, got a damaged one ({error})") from error


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise LensError(f"wanted {key} in the GGUF, got none")
    return field.contents()


def _names(architecture: str, n_layers: int, stored: Mapping[str, Path]) -> dict[str, str]:
    """Hugging Face's names by llama.cpp's.

    Raises:
        LensError: a stored tensor has no name there, or two have the same.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    named = get_tensor_name_map(next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), n_layers)
    names: dict[str, str] = {}
    for source in stored:
        if source.endswith(_COMPUTED):
            continue
        spellings = (source, source.removeprefix("transformer."), f"transformer.{source}")  # with the base model or not
        found = (named.get_name(spelling, (".weight", ".bias")) for spelling in spellings)
        name = next((name for name in found if name is not None), None)
        if name is None or name in names:
            raise LensError(f"wanted a name of its own for {source} in the GGUF of {architecture}, got {name}")
        names[name] = source
    return names


def _require_same_names(names: dict[str, str], written: dict[str, Any]) -> None:
    """See that both have the same tensors; tied embeddings may be stored twice on either side."""
    if _UNEMBEDDING in written.keys() - names.keys() and _EMBEDDING in names:
        names[_UNEMBEDDING] = names[_EMBEDDING]
    if _UNEMBEDDING in names.keys() - written.keys() and _EMBEDDING in written:
        written[_UNEMBEDDING] = written[_EMBEDDING]
    if missing := names.keys() - written.keys():
        raise LensError(f"wanted {names[min(missing)]} in the GGUF, got no {min(missing)}")
    if strays := written.keys() - names.keys() - _TABLES:
        raise LensError(f"wanted the directory's tensors alone in the GGUF, got {min(strays)} as well")


def _refuse_biases(names: Mapping[str, str], architecture: str) -> None:
    unread = [name for name in names if name.endswith(("attn_output.bias", "ffn_down.bias"))]
    if unread:
        raise LensError(
            f"wanted an architecture whose output biases llama.cpp reads, got {architecture}, which has none there: it "
            f"would refuse {unread[0]}; serve the exported directory by transformers"
        )


def _require_sizes(reader: GGUFReader, architecture: str, n_heads: int, width: int) -> None:
    """See that the file says of itself what it holds: a converter may take a family's usual sizes for granted."""
    wanted = {"attention.head_count": n_heads, "feed_forward_length": width}
    for key, size in wanted.items():
        if (told := _field(reader, f"{architecture}.{key}")) != size:
            raise LensError(f"wanted {key} {size} in the GGUF, got {told}, which is not the size of what it holds")


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    n_heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    return n_heads, int(config.get("num_key_value_heads") or n_heads)
