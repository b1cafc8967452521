"""Data sets of one's own: registered at run time or by a plug-in, they take every path of a built-in one."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import EntryPoint
from itertools import combinations
from pathlib import Path

import pytest

import lcc_lens as lcc
from lcc_lens.core.errors import RequestError
from lcc_lens.data.prompts import Record
from lcc_lens.data.registry import DATASETS
from lcc_lens.data.splits import assert_disjoint

ROLES = ("calibration", "probe", "train", "held-out")
RECORDS = [{"n": i, "sum": i + i, "other": i + 1} for i in range(2, 122)]


def read_sum(record: Record) -> lcc.Item:
    question = f"{record['n']} + {record['n']} ="
    return lcc.Item(question, f" {record['sum']}", (f" {record['other']}",), group=question)


def read_line(record: Record) -> lcc.Example:
    return lcc.Example("", record["line"], group=record["line"])


#: What an installed package would name by an entry point.
PLUGIN = lcc.DatasetSpec("text", read_line, lambda: ({"line": f"Line {i} of a plug-in."} for i in range(60)))


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS._entries))
    monkeypatch.setattr(DATASETS, "_plugins", {})


def test_a_list_of_records_serves_all_roles_and_none_shares_a_group() -> None:
    lcc.register_dataset("sums", lcc.DatasetSpec("contrastive", read_sum, RECORDS))
    parts = [lcc.load_data("sums", role=role, seed=seed) for seed, role in enumerate(ROLES)]
    assert_disjoint(*parts)
    assert all(not first.groups & second.groups for first, second in combinations(parts, 2))
    assert sum(map(len, parts)) == len(RECORDS) == len(lcc.load_data("sums"))
    example = parts[0].examples[0]
    assert (parts[0].source, parts[0].kind, parts[0].negatives) == ("sums/train", "contrastive", "flipped label")
    assert example.wrong is not None


def test_splits_folders_and_functions_give_the_same_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = RECORDS[:80], RECORDS[80:]
    for split, records in (("train", first), ("validation", second)):
        (tmp_path / "sums").mkdir(exist_ok=True)
        (tmp_path / "sums" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
    lcc.register_dataset("listed", lcc.DatasetSpec("contrastive", read_sum, {"train": first, "validation": second}))
    lcc.register_dataset("called", lcc.DatasetSpec("contrastive", read_sum, {"train": lambda: first, "test": second}))
    lcc.register_dataset("stored", lcc.DatasetSpec("contrastive", read_sum, tmp_path / "sums"))
    monkeypatch.setenv("LCC_LENS_DATA", str(tmp_path))
    lcc.register_dataset("sums", lcc.DatasetSpec("contrastive", read_sum))
    for role in ROLES:
        listed, *others = (lcc.load_data(name, role=role) for name in ("listed", "called", "stored", "sums"))
        assert all(other.examples == listed.examples for other in others)
    assert len(lcc.load_data("listed", role="held-out")) == 40


def test_a_registered_set_is_scanned_and_compared_like_any_other(pair) -> None:
    lcc.register_dataset("sums", lcc.DatasetSpec("contrastive", read_sum, RECORDS))
    found = lcc.scan(pair, lcc.load_data("sums", n=12, role="probe"))
    assert len(found.select("mse", share=0.5)) > 0
    assert lcc.CompareConfig(data="sums", texts=("own.txt", "c4")).data == "sums"
    with pytest.raises(RequestError, match=r"got 'sumz'; did you mean 'sums'\?, or name a .jsonl or .txt file"):
        lcc.CompareConfig(data="sumz")
    with pytest.raises(RequestError, match=r"got 'wikitxt'; did you mean 'wikitext'\?"):
        lcc.CompareConfig(texts=("c4", "wikitxt"))


def test_a_plug_in_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("lines", "unit_data_plugin:PLUGIN", "lcc_lens.datasets")
    monkeypatch.setattr(EntryPoint, "load", lambda self: PLUGIN)
    monkeypatch.setattr("lcc_lens.core.registry.entry_points", lambda group: [point] if group == point.group else [])
    monkeypatch.setattr(DATASETS, "_plugins", None)
    data = lcc.load_data("lines", role="train")
    assert data.kind == "text"
    assert data.examples[0].response.endswith("of a plug-in.")


REFUSALS = {
    "another kind": (lcc.DatasetSpec("text", read_sum, RECORDS), "expected Example objects .* got Item"),
    "another field": (
        lcc.DatasetSpec("text", read_line, RECORDS), r"expected toys records .* got record 1 without \(KeyError\('line'"
    ),
    "no records": (lcc.DatasetSpec("text", read_line, "/nowhere"), "expected records of toys, got none in /nowhere"),
    "no source": (lcc.DatasetSpec("text", read_line), "expected records of toys, got none"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_set_that_cannot_be_read_is_refused(case: str) -> None:
    dataset, message = REFUSALS[case]
    lcc.register_dataset("toys", dataset)
    with pytest.raises(RequestError, match=message):
        lcc.load_data("toys")


def test_kinds_and_parts_that_cannot_be_are_refused() -> None:
    spec = replace(PLUGIN)
    object.__setattr__(spec, "kind", "qa")  # past the types that tests check
    with pytest.raises(RequestError, match=r"expected a kind of data \(.*\), got 'qa'; name one"):
        spec.__post_init__()
    pool = lcc.DatasetSpec("text", read_line, parts=("wikipedia", "pool"))
    with pytest.raises(RequestError, match="expected parts without pool itself, got pool"):
        lcc.register_dataset("pool", pool)
    lcc.register_dataset("outer", pool)
    with pytest.raises(RequestError, match="expected parts without pool itself, got outer"):
        lcc.register_dataset("pool", lcc.DatasetSpec("text", read_line, parts=("python", "outer")))
    with pytest.raises(RequestError, match=r"got boolq more than once in boolq\+c4\+boolq"):
        lcc.load_data("boolq+c4+boolq")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(RequestError, match="expected a new dataset name, got 'boolq', which is taken"):
        lcc.register_dataset("boolq", PLUGIN)
    lcc.register_dataset("boolq", PLUGIN, replace=True)
    assert DATASETS["boolq"] is PLUGIN
