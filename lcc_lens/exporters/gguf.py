"""Export to GGUF: run llama.cpp's own converter, then compare every tensor with the exported directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import atomic_path, require_space, sha256_file
from lcc_lens.core.outputs.folders import note_written
from lcc_lens.core.outputs.places import require_file
from lcc_lens.core.ranges import ranged
from lcc_lens.core.showing import Shown

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

    Array = np.ndarray[Any, np.dtype[Any]]

CONVERTER = "convert_hf_to_gguf.py"
#: Seconds in which the converter has to end: it writes even large models in minutes.
_TIME_LIMIT = 3600
FOLDER_VARIABLE = "LCC_LENS_LLAMA_CPP"
#: By the stored formats of the matrices, the converter's name of a format that holds them exactly; else float32.
_FORMATS = {frozenset({"F16"}): "f16", frozenset({"BF16"}): "bf16"}


@dataclass(frozen=True, repr=False)
class GgufReport(Shown):
    """The file, llama.cpp's name of the architecture, the format of matrices, and how many tensors were compared."""

    path: Path
    architecture: str
    number_format: str
    n_tensors: int

    def _facts(self) -> dict[str, Any]:
        return {
            "architecture in llama.cpp": self.architecture,
            "format of matrices": self.number_format,
            "tensors equal to the directory's": self.n_tensors,
        }


@ranged
def export_gguf(
    directory: str | Path, file: str | Path, *, llama_cpp: str | Path | None = None, overwrite: bool = False
) -> GgufReport:
    """Write an exported directory as a GGUF file by llama.cpp's converter, and compare every number.

    The converter is needed because it alone knows how llama.cpp names a tokenizer's pre-processing. Matrices in
    bfloat16 or float16 keep their format and all others become float32, so only float64 is rounded. The file appears
    once every tensor read back from it equals the directory's, biases and zeros included, in llama.cpp's layout.

    Args:
        directory: what :func:`lcc_lens.exporters.huggingface.export` wrote.
        file: the GGUF file to write.
        llama_cpp: a clone of llama.cpp (``LCC_LENS_LLAMA_CPP`` if not given), whose converter runs in this Python.
        overwrite: replace an existing file.

    Raises:
        RequestError: no clone, no directory, or ``file`` exists; nothing was written.
        LensError: the converter fails, a tensor is missing or differs, or llama.cpp does not read the biases; no file
            is kept.

    Example:
        >>> export_gguf("out/restored", "out/restored.gguf", llama_cpp="llama.cpp")  # doctest: +SKIP
    """
    checkpoint, target = Checkpoint(Path(directory)), Path(file)
    converter = require_converter(llama_cpp)
    require_new_file(target, overwrite=overwrite)
    checkpoint.require_whole()
    formats = frozenset(stored.dtype for stored in checkpoint.tensors.values() if len(stored.shape) > 1)
    number_format = _FORMATS.get(formats, "f32")
    require_space(target, 2 * checkpoint.n_bytes)
    verified = _hashes(checkpoint.path)
    with atomic_path(target) as part:
        _convert(converter, checkpoint.path, part, number_format)
        if _hashes(checkpoint.path) != verified:
            raise LensError(
                f"expected {checkpoint.path} as it was verified, got files that {converter} altered; export again, and "
                "use another clone of llama.cpp; no GGUF was kept"
            )
        try:
            architecture, n_tensors = compare_gguf(part, checkpoint)
        except LensError as error:
            raise LensError(f"{error}; no GGUF was kept") from error
    note_written(target)
    return GgufReport(target, architecture, number_format, n_tensors)


def require_converter(llama_cpp: str | Path | None) -> Path:
    """The converter in a clone of llama.cpp; the clone is ``llama_cpp``, else ``LCC_LENS_LLAMA_CPP``."""
    folder = llama_cpp or os.environ.get(FOLDER_VARIABLE)
    advice = "git clone https://github.com/ggml-org/llama.cpp (nothing to build)"
    if not folder:
        raise RequestError(
            f"expected a clone of llama.cpp for its converter, got none; {advice} and name the folder with "
            f"--llama-cpp or {FOLDER_VARIABLE}"
        )
    converter = Path(folder).expanduser() / CONVERTER
    if not converter.is_file():
        raise RequestError(f"expected a clone of llama.cpp with {CONVERTER}, got {folder}, which has none; {advice}")
    return converter


def require_new_file(file: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a file that is there already, unless it is a GGUF file that may be replaced."""
    require_file(file, begins=(b"GGUF",), inputs=inputs)
    if file.exists() and not overwrite:
        raise RequestError(f"{file} exists already; name another file or pass --overwrite")


def _hashes(directory: Path) -> dict[str, str]:
    """The hash of every file in a directory, read anew."""
    return {str(file): sha256_file(file) for file in sorted(directory.rglob("*")) if file.is_file()}


def _convert(converter: Path, directory: Path, file: Path, number_format: str) -> None:
    """Run the converter."""
    command = [sys.executable, str(converter), str(directory), "--outfile", str(file), "--outtype", number_format]
    # The converter would run code that a tokenizer's settings name; offline it cannot fetch any.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        process = subprocess.run(
            command, check=False, capture_output=True, text=True, errors="replace", env=environment,
            stdin=subprocess.DEVNULL, timeout=_TIME_LIMIT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise LensError(
            f"expected {converter} to convert {directory} within {_TIME_LIMIT} seconds, got no end; no GGUF was kept"
        ) from error
    if process.returncode != 0:
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip()] or ["no message"]
        raise LensError(
            f"expected {converter} to convert {directory}, got exit code {process.returncode} ({lines[-1][:300]}); "
            "no GGUF was kept"
        )


_EMBEDDING, _UNEMBEDDING = "token_embd.weight", "output.weight"
#: Tables that the converter computes from the configuration.
_TABLES = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
#: Masks and tables that old checkpoints store although they follow from the configuration.
_COMPUTED = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def _plain(name: str, tensor: Array, n_heads: int, n_key_value_heads: int) -> Array:
    return tensor


def _interleaved(name: str, tensor: Array, n_heads: int, n_key_value_heads: int) -> Array:
    """Interleave the two halves of each query and key head: rotary embeddings pair neighbouring rows in llama.cpp."""
    heads = {"attn_q": n_heads, "attn_k": n_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    interleaved: Array = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    return interleaved


def _transposed(name: str, tensor: Array, n_heads: int, n_key_value_heads: int) -> Array:
    return tensor.T if name.startswith("blk.") else tensor


def _grouped(name: str, tensor: Array, n_heads: int, n_key_value_heads: int) -> Array:
    """Put all queries before all keys before all values; Hugging Face stores the three of each head together."""
    if ".attn_qkv." not in name:
        return tensor
    grouped: Array = tensor.reshape(n_heads, 3, -1, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)
    return grouped


#: By llama.cpp's name of an architecture: the conversion from Hugging Face's layout to its own, and whether it reads
#: biases of the output and down projections (it refuses a file with biases that it does not read).
_ARCHITECTURES: dict[str, tuple[Callable[[str, Array, int, int], Array], bool]] = {
    "llama": (_interleaved, True), "granite": (_interleaved, True), "phi2": (_plain, True), "gpt2": (_transposed, True),
    "bloom": (_grouped, True), "qwen2": (_plain, False), "qwen3": (_plain, False), "stablelm": (_plain, False),
    "olmo2": (_plain, False), "command-r": (_plain, False), "smollm3": (_interleaved, False),
}  # fmt: skip


def compare_gguf(file: Path, checkpoint: Checkpoint) -> tuple[str, int]:
    """Compare every tensor of a GGUF file with an exported directory's, in llama.cpp's layout.

    Args:
        checkpoint: the exported directory that it was made from.

    Returns:
        llama.cpp's name of the architecture, and how many tensors are equal.
    """
    from gguf import dequantize

    reader = _read(file)
    architecture = _field(reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise LensError(f"expected a GGUF whose layout can be compared ({known}), got {architecture}")
    layout, reads_biases = _ARCHITECTURES[architecture]
    names = _names(architecture, _field(reader, f"{architecture}.block_count"), checkpoint.tensors)
    converted: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
    _require_same_names(names, converted)
    if not reads_biases:
        _refuse_biases(names, architecture)
    heads = _heads(checkpoint.config)
    _require_sizes(reader, architecture, heads[0], int(converted["blk.0.ffn_up.weight"].shape[1]))
    for name, source in names.items():
        tensor = dequantize(converted[name].data, converted[name].tensor_type)
        expected = layout(name, checkpoint.read(source).float().numpy(), *heads)
        if tensor.shape != expected.shape or not (tensor == expected).all():
            raise LensError(f"expected {name} in the GGUF equal to {source} of {checkpoint.path}, got other numbers")
    return architecture, len(names)


def _read(file: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:  # a damaged file fails within the reader in many ways
        raise LensError(f"expected a whole GGUF file, got a damaged one ({error})") from error


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise LensError(f"expected {key} in the GGUF, got none")
    return field.contents()


def _names(architecture: str, n_layers: int, stored: Iterable[str]) -> dict[str, str]:
    """Hugging Face's names by llama.cpp's names."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    name_map = get_tensor_name_map(
        next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), n_layers
    )
    names: dict[str, str] = {}
    for source in stored:
        if source.endswith(_COMPUTED):
            continue
        spellings = (source, source.removeprefix("transformer."), f"transformer.{source}")  # with the base model or not
        candidates = (name_map.get_name(spelling, (".weight", ".bias")) for spelling in spellings)
        name = next((name for name in candidates if name is not None), None)
        if name is None or name in names:
            raise LensError(f"expected a name of its own for {source} in the GGUF of {architecture}, got {name}")
        names[name] = source
    return names


def _require_same_names(names: dict[str, str], converted: dict[str, Any]) -> None:
    """Check that both have the same tensors; either side may store tied embeddings twice."""
    if _UNEMBEDDING in converted.keys() - names.keys() and _EMBEDDING in names:
        names[_UNEMBEDDING] = names[_EMBEDDING]
    if _UNEMBEDDING in names.keys() - converted.keys() and _EMBEDDING in converted:
        converted[_UNEMBEDDING] = converted[_EMBEDDING]
    if missing := names.keys() - converted.keys():
        raise LensError(f"expected {names[min(missing)]} in the GGUF, got no {min(missing)}")
    if extra := converted.keys() - names.keys() - _TABLES:
        raise LensError(f"expected only the directory's tensors in the GGUF, got {min(extra)} as well")


def _refuse_biases(names: Mapping[str, str], architecture: str) -> None:
    unread = [name for name in names if name.endswith(("attn_output.bias", "ffn_down.bias"))]
    if unread:
        raise LensError(
            f"expected an architecture whose output biases llama.cpp reads, got {architecture}: llama.cpp would refuse "
            f"{unread[0]}; serve the exported directory with transformers"
        )


def _require_sizes(reader: GGUFReader, architecture: str, n_heads: int, width: int) -> None:
    """Check the sizes in the file's header: a converter may take a family's usual sizes for granted."""
    for key, size in {"attention.head_count": n_heads, "feed_forward_length": width}.items():
        if (value := _field(reader, f"{architecture}.{key}")) != size:
            raise LensError(f"expected {key} {size} in the GGUF, got {value}, which its tensors contradict")


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    n_heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    return n_heads, int(config.get("num_key_value_heads") or n_heads)
