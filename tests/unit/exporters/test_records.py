"""Records of an export: the model card and Hugging Face's evaluation results say what was measured, and of whom."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from support.commands import call, refused
from support.restorations import restoration_of
from support.small_sets import write_sets

from lcc_lens.core.errors import RequestError
from lcc_lens.core.reading import write_record
from lcc_lens.exporters.huggingface import export
from lcc_lens.exporters.measured import Measured
from lcc_lens.restoration.result import Restoration

PANEL = {
    "domains": {
        name: {"perplexity": dict(zip(("dense", "pruned", "restored"), row, strict=True)), "recovered": 0.5,
               "in_pool": False}
        for name, row in {"c4": (20.0, 40.0, 30.0), "wikipedia": (10.0, 20.0, 21.0), "python": (5.0, 9.0, 7.0)}.items()
    },
    "mean": 0.5, "worst": -0.1, "worst_domain": "wikipedia", "worse": ["wikipedia"], "blocks": 4, "length": 64,
}  # fmt: skip
RECOVERY = {
    "task": "boolq", "text": "wikitext", "seed": 3, "harness": "lm-eval 9.9", "gain": 0.01,
    "gain_interval": [-0.02, 0.04], "share_recovered": 0.25, "share_interval": None,
    "models": {
        name: {"tasks": {"boolq": {"acc": acc, "stderr": 0.02, "n": 500}, "wikitext": {"perplexity": 9.0}}}
        for name, acc in {"dense": 0.62, "pruned": 0.5, "restored": 0.53}.items()
    },
}  # fmt: skip


@pytest.fixture
def run(pruned_dir: Path, tmp_path: Path) -> Path:
    """A run with a panel, a task and a comparison beside its restoration."""
    restoration = restoration_of(pruned_dir)
    restoration = dataclasses.replace(restoration, record=dataclasses.replace(restoration.record, seed=7))
    restoration.save(tmp_path / "run")
    write_record(tmp_path / "run" / "metrics.json", {"panel": PANEL, "recovery": RECOVERY})
    _write_comparison(tmp_path / "run", restoration, restoration.record.pruned_sha256)
    return tmp_path / "run"


def _write_comparison(folder: Path, restoration: Restoration, pruned_sha256: str) -> None:
    identity = {"dense_sha256": restoration.record.dense_sha256, "pruned_sha256": pruned_sha256}
    row = {"entry": "lcc@shuffled", "recovered": 0.19, "recovered_worst": None, "kl": 0.7, "seeds": 3}
    write_record(folder / "comparison.json", {"identity": identity, "summary": [row]})


def _entries(file: Path) -> dict[tuple[str, str], object]:
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    return {(entry.dataset_id, entry.task_id): entry for entry in entries}


def test_an_export_carries_what_its_run_measured(run: Path, pruned_dir: Path, tmp_path: Path) -> None:
    restoration = Restoration.load(run)
    export(restoration, pruned_dir, tmp_path / "out", run=run)
    folder = tmp_path / "out" / ".eval_results"
    restored = _entries(folder / "restored.yaml")
    assert restored.keys() == {("allenai/c4", "en"), ("aps/super_glue", "boolq")}  # no set without the hub, no passages
    boolq = restored["aps/super_glue", "boolq"]
    assert boolq.value == 0.53
    for said in ("500 items", "lm-eval 9.9", "drawn with seed 3", "restored by lcc", "seed 7"):
        assert said in boolq.notes
    assert restoration.record.pruned_sha256[:16] in boolq.notes
    assert "4 blocks of 64 tokens" in restored["allenai/c4", "en"].notes
    values = {
        m: _entries(folder / "compared" / f"{m}.yaml")["aps/super_glue", "boolq"].value for m in ("dense", "pruned")
    }
    assert values == {"dense": 0.62, "pruned": 0.5}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| c4 | 20.00 | 40.00 | 30.00 | 50.0% | no |" in card
    assert "| restored | 53.0% ± 2.0% | 500 | 9.00 | 25% |" in card
    assert "| lcc@shuffled | 19.0% |  | 0.700 | 3 |" in card
    assert "- worse than the pruned model on wikipedia" in card
    assert "- the gain on boolq may be chance: -2.0% to +4.0%" in card


def test_controls_of_other_models_are_left_out_or_refused(run: Path, pruned_dir: Path, tmp_path: Path) -> None:
    restoration = Restoration.load(run)
    for folder in (run, tmp_path / "compared"):
        _write_comparison(folder, restoration, "another")
    assert not any("controls" in title for title in Measured.of(restoration.record, run).tables)
    with pytest.raises(RequestError, match="expected a comparison of the models that were restored, got other weights"):
        export(restoration, pruned_dir, tmp_path / "out", comparison=tmp_path / "compared")
    assert not (tmp_path / "out").exists()


def test_a_run_without_measures_has_no_results(pruned_dir: Path, tmp_path: Path) -> None:
    export(restoration_of(pruned_dir), pruned_dir, tmp_path / "out")
    assert not (tmp_path / "out" / ".eval_results").exists()


def test_a_later_evaluation_is_added_to_the_export(
    run: Path, dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LCC_LENS_DATA", str(write_sets(tmp_path / "data", 12)))
    out = tmp_path / "out"
    assert call("export", run, out, "--quiet") == 0
    before = (out / "README.md").read_text()
    command = ("eval", dense_dir, out, "--tasks", "boolq", "--limit", 4, "--quiet")
    refused(capsys, 2, "expected --add-to to name one of the models", *command, "--add-to", run)
    with monkeypatch.context() as patched:
        patched.setattr("lcc_lens.evaluation.evaluate.load_plain", None)
        message = f"expected an export with its model card, got no README.md in {dense_dir}"
        refused(capsys, 2, message, *command, "--add-to", dense_dir)
    for _ in range(2):  # the second replaces the first
        assert call(*command, "--add-to", out, "--out", tmp_path / "results.json") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    own = _entries(out / ".eval_results" / "eval_out.yaml")["aps/super_glue", "boolq"]
    assert own.value == pytest.approx(results["models"]["out"]["tasks"]["boolq"]["acc"], abs=1e-6)
    assert results["harness"] in own.notes
    assert (out / ".eval_results" / "compared" / "eval_dense.yaml").exists()
    card = (out / "README.md").read_text()
    assert card.startswith(before.rstrip())
    assert card.count("Measured by lcc-lens eval") == 1
    assert call("export", run, out, "--overwrite", "--quiet") == 0  # all of it counts as this program's
