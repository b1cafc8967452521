"""GGUF files for llama.cpp: its own converter writes them, and every number is compared before one appears."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import atomic_path, read_json, require_space, weight_files
from lcc_lens.gguf_comparison import compare_gguf

CONVERTER = "convert_hf_to_gguf.py"
FOLDER_VARIABLE = "LCC_LENS_LLAMA_CPP"
#: The converter's name of the format that holds every number of such matrices; float32 does for others.
_FORMATS = {frozenset({"F16"}): "f16", frozenset({"BF16"}): "bf16"}


@dataclass(frozen=True)
class GgufReport:
    """What was written: llama.cpp's name of the architecture, the format of matrices, how many tensors are equal."""

    path: Path
    architecture: str
    number_format: str
    n_tensors: int


def export_gguf(
    directory: str | Path, file: str | Path, *, llama_cpp: str | Path | None = None, overwrite: bool = False
) -> GgufReport:
    """Write an exported directory as a GGUF file by llama.cpp's converter, and compare every number.

    The converter alone knows llama.cpp's name of a tokenizer's pre-processing. Matrices keep their format (bfloat16 and
    float16 as they are, anything else as float32), so nothing but float64 is rounded: every tensor that is read back
    equals the directory's, biases and zeros included, in the layout that llama.cpp wants. Then the file appears.

    Args:
        directory: what :func:`lcc_lens.export.export` wrote.
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
    path, target = Path(directory), Path(file)
    converter = require_converter(llama_cpp)
    require_new_file(target, overwrite=overwrite)
    read_json(path / "config.json")
    number_format = _number_format(path)
    require_space(target, 2 * sum(weights.stat().st_size for weights in weight_files(path)))
    with atomic_path(target) as part:
        _convert(converter, path, part, number_format)
        try:
            architecture, n_tensors = compare_gguf(part, path)
        except LensError as error:
            raise LensError(f"{error}; no GGUF was kept") from error
    return GgufReport(target, architecture, number_format, n_tensors)


def require_converter(llama_cpp: str | Path | None) -> Path:
    """The converter in a clone of llama.cpp, named here or by ``LCC_LENS_LLAMA_CPP``.

    Raises:
        RequestError: none is named, or it has no converter.
    """
    named = llama_cpp or os.environ.get(FOLDER_VARIABLE)
    advice = "git clone https://github.com/ggml-org/llama.cpp (nothing to build)"
    if not named:
        raise RequestError(
            f"wanted a clone of llama.cpp for its converter, got none; {advice} and name the folder by --llama-cpp or "
            f"{FOLDER_VARIABLE}"
        )
    converter = Path(named).expanduser() / CONVERTER
    if not converter.is_file():
        raise RequestError(f"wanted a clone of llama.cpp with {CONVERTER}, got {named}, which has none; {advice}")
    return converter


def require_new_file(file: Path, *, overwrite: bool) -> None:
    """Refuse a file that is there already, unless it may be replaced.

    Raises:
        RequestError: it is there and ``overwrite`` is false, or it is a folder.
    """
    if file.is_dir():
        raise RequestError(f"wanted a file name for the GGUF, got the folder {file}; name a file in it")
    if file.exists() and not overwrite:
        raise RequestError(f"{file} exists already; name another file or pass --overwrite")


def _number_format(directory: Path) -> str:
    from safetensors import safe_open

    found: set[str] = set()
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as handle:
            stored = [handle.get_slice(name) for name in handle.keys()]
            found |= {tensor.get_dtype() for tensor in stored if len(tensor.get_shape()) > 1}
    return _FORMATS.get(frozenset(found), "f32")


def _convert(converter: Path, directory: Path, file: Path, number_format: str) -> None:
    """Run the converter.

    Raises:
        LensError: it fails; its last line says why.
    """
    command = [sys.executable, str(converter), str(directory), "--outfile", str(file), "--outtype", number_format]
    # The converter would trust code that a tokenizer's settings name; offline there is nowhere to fetch any from.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode != 0:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["nothing said"]
        raise LensError(
            f"wanted {directory} converted by {converter}, got exit code {done.returncode} ({said[-1][:300]}); no GGUF "
            "was kept"
        )
