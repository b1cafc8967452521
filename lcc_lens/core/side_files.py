"""What belongs to a copy of a checkpoint beside its weights: tokenizer, templates, licence and settings."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import write_json
from lcc_lens.core.reading import read_json

_FETCH = "fetch the checkpoint again"
#: Notes about a checkpoint that would be untrue of a copy with other weights.
_NOTES = ("README.md", "pruning.json", "converted.json")
_COPIED = re.compile(
    r".*\.(json|jinja|txt|model|tiktoken|bpe|spm|vocab)|(LICEN[SC]E|NOTICE|COPYING|USE_POLICY).*", re.IGNORECASE
)
#: Folders whose templates belong to the tokenizer.
_FOLDERS = ("additional_chat_templates", "chat_templates")
#: Entries of a configuration that would let a checkpoint choose code to run: neither obeyed nor handed on.
UNTRUSTED_ENTRIES = (
    "auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "fusion_config",
)  # fmt: skip

#: By type of model, transformers 4's other names of entries.
_OLDER_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
#: Types of models that transformers 4 does not have, whose configurations refuse its entries.
_NEWER = ("gemma4",)
#: The kinds of attention whose rotary embeddings a configuration may list apart, and transformers 4's base of theirs.
_BASES = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}


def side_files(path: Path) -> tuple[Path, ...]:
    """The files of a checkpoint's folder that belong to a copy: no weights, no code, no notes.

    Raises:
        RequestError: one is a link to a file elsewhere, which a copy would hand on.
    """
    chosen = _chosen(path)
    for file in chosen:
        if not _is_inside(file, path):
            raise RequestError(
                f"expected files of its own in {path}, got the link {file.name} to {file.resolve()}; put a copy in its "
                "place, or delete it"
            )
    return chosen


def settings_files(path: Path) -> dict[Path, dict[str, Any]]:
    """The settings among the side files of a checkpoint, ``config.json`` and others, with their entries.

    Raises:
        RequestError: one holds no JSON object, or numbers that are no JSON.
    """
    files = [file for file in _chosen(path) if file.name.endswith("config.json")]
    return {file: read_json(file, dict[str, Any], _FETCH, finite=True) for file in files}


def copy_side_files(source: Path, target: Path) -> None:
    """Copy the side files of a checkpoint; settings lose the entries that would let them choose code to run."""
    settings = settings_files(source)
    for file in side_files(source):
        place = target / file.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        entries = settings.get(file)
        cleaned = without_untrusted(entries)
        if cleaned == entries:
            shutil.copyfile(file, place)
        else:
            write_json(place, cleaned)


def without_untrusted(entries: Any) -> Any:
    """A configuration, its parts included, without :data:`UNTRUSTED_ENTRIES`."""
    if not isinstance(entries, dict):
        return entries
    return {name: without_untrusted(value) for name, value in entries.items() if name not in UNTRUSTED_ENTRIES}


def with_older_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with its rotary embeddings in transformers 4's entries, too; those that it has stay.

    Transformers 5 writes ``rope_parameters`` alone. Transformers 4 reads over them, takes its defaults, and computes
    other numbers without a word.

    Example:
        >>> with_older_entries({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}})["rope_theta"]
        100000.0
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or str(config.get("model_type")).startswith(_NEWER):
        return dict(config)
    by_kind = {kind: rope[kind] for kind in _BASES if isinstance(rope.get(kind), Mapping)}
    older = {_BASES[kind]: own["rope_theta"] for kind, own in by_kind.items() if "rope_theta" in own}
    own = by_kind.get("full_attention", rope)
    older |= {name: own[name] for name in ("rope_theta", "partial_rotary_factor") if name in own}
    if own.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: value for name, value in own.items() if name not in older}
    names = _OLDER_NAMES.get(str(config.get("model_type")), {})
    return {**{names.get(name, name): value for name, value in older.items()}, **config}


def _chosen(path: Path) -> tuple[Path, ...]:
    folders = (path, *(path / name for name in _FOLDERS))
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
    return tuple(file for file in files if _is_copied(file))


def _is_copied(file: Path) -> bool:
    if file.name in _NOTES or file.name.endswith(".index.json") or not file.is_file():
        return False
    return _COPIED.fullmatch(file.name) is not None


def _is_inside(file: Path, folder: Path) -> bool:
    """Whether a file, its links followed, lies in a folder or in the blobs of the hub's cache that it is part of."""
    folder, target = folder.resolve(), file.resolve()
    cached = folder.parent.name == "snapshots" and target.is_relative_to(folder.parent.parent / "blobs")
    return cached or target.is_relative_to(folder)
