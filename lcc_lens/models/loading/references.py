"""Resolve a model reference (a name, directory, GGUF file or hub id) to a local directory."""

from __future__ import annotations

import re
from pathlib import Path

from lcc_lens.core import hub
from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError, first_line
from lcc_lens.core.outputs.folders import recover
from lcc_lens.core.ranges import ranged
from lcc_lens.models.architecture.whole_weights import require_complete
from lcc_lens.models.loading.gguf import EMBEDDED_NAME, embedded_model, gguf_model

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(@[\w./-]+)?$")
_FILES = [
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.bpe", "*.spm", "LICENSE*", "NOTICE*",
]  # fmt: skip
#: Second copies of the weights, for their authors' own code.
_COPIES = ["original/*", "consolidated*", "*/*.safetensors"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_CONVERT = (
    "where you trust its source, AutoModelForCausalLM.from_pretrained(...).save_pretrained(OUT) in another process "
    "writes safetensors"
)


@ranged
def resolve(reference: str | Path) -> Path:
    """The local Hugging Face directory of a model reference.

    Args:
        reference: ``smollm2``, a local directory, a ``.gguf`` file, or a hub id (``owner/name`` with an
            optional ``@revision``).
    """
    name, path = str(reference), Path(reference)
    recover(path)
    if name == EMBEDDED_NAME and not path.exists():
        return embedded_model()
    if path.suffix == ".gguf":
        return gguf_model(path)
    if path.is_dir():
        _require_model(path)
        return path
    if path.exists():
        hint = _CONVERT if path.suffix in _PICKLES else "name its folder"
        raise RequestError(f"expected a model directory or a .gguf file, got the file {path}; {hint}")
    if not _HUB_ID.match(name) or name.startswith((".", "/")) or (name.count("/") == 0 and path.suffix == ""):
        raise RequestError(
            f"expected a model ({EMBEDDED_NAME}, a directory, a .gguf file or a hub id owner/name), got {name!r}, "
            "which is not there; check the path"
        )
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    hub.reach()
    try:
        path = Path(snapshot_download(repo, revision=revision or None, allow_patterns=_FILES, ignore_patterns=_COPIES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise RequestError(
            f"expected the model {name}, got no such directory and nothing from the hub ({first_line(error)}); check "
            "the name or download it first"
        ) from error
    try:
        _require_model(path)
    except RequestError as error:
        raise RequestError(f"{error}; if {repo} holds pickles alone, {_CONVERT}") from error
    return path


def _require_model(path: Path) -> None:
    """Refuse a directory without a model of transformers in safetensors."""
    try:
        require_complete(Checkpoint(path))
    except RequestError as error:
        raise RequestError(f"{error}; {_CONVERT}" if "pickle" in str(error) else str(error)) from error
