"""Comparisons: every entry by the same rule, finished cells kept, failed ones reported."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from lcc_lens.compare import CompareConfig, Entry, compare, summary
from lcc_lens.errors import LensError, RequestError
from lcc_lens.files import read_json

module = importlib.import_module("lcc_lens.compare")  # not the function of the same name
SMALL = {
    "examples": 24, "validation": 4, "responses": 4, "blocks": 2, "block_length": 16, "scan_examples": 24,
    "batch_size": 8, "low_rank": 2, "lora_rank": 2, "refit_samples": 2, "max_length": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(question_file: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    lines = [
        json.dumps({"prompt": f"Say number {i} twice:", "response": f" number {i}, number {i}"}) for i in range(300)
    ]
    data = tmp_path_factory.mktemp("data") / "many.jsonl"
    data.write_text("\n".join(lines))
    return CompareConfig(data=str(data), text=str(text_file), **SMALL)


@pytest.mark.parametrize(("text", "expected"), [
    ("lcc", ("lcc", False, None, 0.0)), ("refit", (None, True, None, 0.0)),
    ("refit+low-rank+lcc:distillation", ("low-rank+lcc", True, None, 1.0)),
    ("lora@dense", ("lora", False, "dense", 0.0)),
])  # fmt: skip
def test_entries_are_read(text: str, expected: tuple) -> None:
    entry = Entry.parse(text)
    assert (entry.method, entry.on_refit, entry.control, entry.objective.distillation) == expected
    assert (entry.lr, Entry.parse(f"{text}=3e-3").lr) == (None, 0.003)


@pytest.mark.parametrize(("text", "message"), [
    ("magic", "wanted a method"), ("lcc@nothing", "wanted a control"), ("lcc:joy", "wanted an objective"),
    ("refit@dense", "wanted a control of something that trains"),
    ("refit+lcc@dense", "that trains on the pruned model"),
    ("lcc=fast", "wanted a learning rate behind =, got 'fast'"),
    ("norms@random-heads", "wanted a method that acts on heads"), ("lora@random-heads", "that acts on heads"),
])  # fmt: skip
def test_wrong_entries_are_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Entry.parse(text)


def test_cells_are_kept_and_failures_reported(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, new = ["lcc", "lora", "low-rank", "lcc@dense", "lcc@shuffled"], []

    def broken(*args, **kwargs):
        raise LensError("no adapters today")

    with monkeypatch.context() as patch:
        patch.setattr(module, "adapters", broken)
        found = compare(
            dense_dir, pruned_dir, tmp_path, entries, seeds=2, config=config, on_cell=lambda *cell: new.append(cell[0])
        )
    assert len(new) == 10
    assert found["cells"]["lora | 0"] == {"error": "no adapters today"}
    assert read_json(tmp_path / "comparison.json") == found
    new.clear()
    again = compare(
        dense_dir, pruned_dir, tmp_path, entries, seeds=2, config=config, on_cell=lambda *cell: new.append(cell[0])
    )
    assert new == ["lora | 0", "lora | 1"]
    assert again["cells"]["lcc | 1"] == found["cells"]["lcc | 1"]
    first, second = (found["cells"][f"low-rank | {seed}"] for seed in (0, 1))
    assert first["response_loss"] != second["response_loss"]
    assert first["n_trained"] > 0
    assert again["bare"]["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    rows = {row["entry"]: row for row in summary(again)}
    assert list(rows) == entries
    assert rows["lcc"]["perplexity"] == pytest.approx(
        sum(found["cells"][f"lcc | {seed}"]["perplexity"] for seed in (0, 1)) / 2
    )
    assert rows["lcc@dense"]["recovered"] is None
    assert summary(found)[1]["failed"] == 2
    with pytest.raises(RequestError, match="wanted a comparison of the same models and settings"):
        compare(dense_dir, dense_dir, tmp_path, entries, config=config)


def test_refit_and_what_is_trained_upon_it(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_own_text(dense, pruned, out, *, n_samples):
        from lcc_lens.recipe import refit

        return refit(dense, pruned, out, calibration=[config.text], n_samples=n_samples, seq_len=16)

    monkeypatch.setattr(module, "refit", on_own_text)
    found = compare(
        dense_dir, pruned_dir, tmp_path, ["refit", "refit+low-rank:distillation"], seeds=1, config=config
    )  # fmt: skip
    bare, refitted, both = found["bare"]["pruned"], *found["cells"].values()
    assert refitted["kl"] != bare["kl"]
    assert both["kl"] < refitted["kl"]
    assert "n_trained" not in refitted
