"""Every file that the package reads back, damaged in every way: one line says so, or the result is the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.damage import damaged
from support.places import ROOT, TESTS
from support.tiny import build_model, save_model

from lcc_lens.analysis.lens.gain import LogitGain
from lcc_lens.analysis.lens.saved import LENS_FILE, load_lens, save_lens
from lcc_lens.analysis.lens.tokens import PromotedTokens, TokenScore
from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head, read_head_map
from lcc_lens.core.reading import read_json, read_json_lines, read_record, reading, write_record
from lcc_lens.evaluation.comparison.compare import summary
from lcc_lens.evaluation.comparison.results_file import read_comparison
from lcc_lens.evaluation.efficiency.report import read_report
from lcc_lens.evaluation.paper.recipes import read_recipe
from lcc_lens.frontends.explorer.page_data import page_data
from lcc_lens.frontends.explorer.results import results_table
from lcc_lens.frontends.explorer.token_tables import TokenTables
from lcc_lens.frontends.plotting.reports import plot_report
from lcc_lens.frontends.run_contents import RunContents
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.pruning.calibration.texts import calibrated_groups
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.run_folder import Beginning
from lcc_lens.restoration.training.config import Step

WRITTEN = TESTS / "data" / "written_by_0_1_0"
RESULTS = {
    "models": {"a": {"path": "a", "tasks": {"t": {"perplexity": 3.0}, "q": {"acc": 0.5, "stderr": 0.1, "n": 4}}}}
}
REPORT = {
    "models": {"a": {"sparsity": 0.5, "pattern": "2:4", "bytes": 10, "bytes_zstd": 9, "matrices": {}}},
    "ratios": {}, "settings": {}, "machine": {}, "zero_patterns": {"reference": None, "models": {}},
}  # fmt: skip


def _page(run: Path) -> Any:
    contents = RunContents.read(run)
    return page_data(contents, TokenTables.load(run), None, example_bytes=1000)


def _report_figure(run: Path) -> Any:
    with reading(run / "report.json"):
        return plot_report(read_report(run / "report.json")).to_json()


def _model(run: Path) -> Any:
    return load_plain(run / "model").config.model_type, load_tokenizer(run / "model").get_vocab()


def _summary(run: Path) -> Any:
    return summary(read_comparison(run / "comparison.json"))


#: Draw other damage at every run (``make fuzz``).
AFRESH = bool(os.environ.get("LCC_LENS_FUZZ"))
REQUEST = json.loads((WRITTEN / "run" / "beginning.json").read_text())["request_sha256"]
#: By file: what reads it, and whether a change of a value within its type is noticed too.
READERS: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "scan.json": (lambda run: Scan.load(run), True),
    "scan.safetensors": (lambda run: Scan.load(run), True),
    "restoration.safetensors": (lambda run: Restoration.load(run), True),
    "metrics.json": (_page, True),
    "explorer.json": (lambda run: TokenTables.load(run), True),
    "explorer.safetensors": (lambda run: TokenTables.load(run), True),
    "beginning.json": (lambda run: Beginning.read(run, REQUEST), True),
    "comparison.json": (_summary, True),
    LENS_FILE: (load_lens, False),
    "log.jsonl": (lambda run: (read_json_lines(run / "log.jsonl", Step), _page(run)), False),
    "report.json": (_report_figure, False),
    "results.json": (lambda run: results_table(run / "results.json"), False),
    "pruning.json": (calibrated_groups, False),
    "head_map.json": (read_head_map, False),
    "recipe.json": (lambda run: read_recipe(run / "recipe.json"), False),
}  # fmt: skip
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")
READERS |= {f"model/{name}": (_model, False) for name in MODEL_FILES}
#: Computed anew where they do not hold: a damaged one reads as none.
CACHES = ("explorer.json", "explorer.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every artefact; those of version 0.1.0, sealed as this version seals them."""
    run = shutil.copytree(WRITTEN / "run", tmp_path_factory.mktemp("made") / "run")
    Scan.load(run).save(run)
    Restoration.load(run).save(run)
    tables = TokenTables.load(WRITTEN / "run")
    assert tables is not None
    tables.save(run)
    for name in ("metrics.json", "beginning.json"):
        write_record(run / name, read_json(run / name, dict[str, Any]))
    write_record(run / "comparison.json", read_json(WRITTEN / "comparison" / "comparison.json", dict[str, Any]))
    gain = LogitGain(Head(0, 1), torch.ones(2, 3), torch.ones(2), False)
    save_lens(run, gains=[gain], promoted=[PromotedTokens(Head(0, 1), "alone", (TokenScore("promoted", 1, "a", 0.5),))])
    (run / "report.json").write_text(json.dumps(REPORT))
    (run / "results.json").write_text(json.dumps(RESULTS))
    (run / "head_map.json").write_text(json.dumps({"dense_heads": [[0, 2], [1, 3]], "removed_heads": [[], [1]]}))
    shutil.copy(WRITTEN / "pruned" / "pruning.json", run)
    save_model(build_model(num_hidden_layers=1), run / "model")
    shutil.copy(ROOT / "recipes" / "unstructured50.json", run / "recipe.json")
    return run


@pytest.mark.parametrize("name", READERS)
def test_a_whole_file_is_read(made: Path, name: str) -> None:
    assert READERS[name][0](made) is not None


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=6, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_alike(made: Path, name: str, data: st.DataObject) -> None:
    _try(made, name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@settings(max_examples=400, derandomize=not AFRESH, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_much_damage_is_refused_or_read_alike(made: Path, name: str, data: st.DataObject) -> None:
    _try(made, name, data)


def _try(made: Path, name: str, data: st.DataObject) -> None:
    """Damage one file, read it, and put it back."""
    read, is_sealed = READERS[name]
    content = (made / name).read_bytes()
    expected = _outcome(read, made)
    try:
        (made / name).write_bytes(data.draw(damaged(name, content)))
        result = _outcome(read, made)
    finally:
        (made / name).write_bytes(content)
    assert len(result.splitlines()) == 1
    if is_sealed and not result.startswith("refused"):
        assert result == (_digest(None) if name in CACHES and result != expected else expected)


def _outcome(read: Callable[[Path], Any], run: Path) -> str:
    """A digest of what was read, or why it was refused; any other error is the test's."""
    try:
        return _digest(read(run))
    except RequestError as error:
        return f"refused: {error}"


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield value.numpy().tobytes()
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _parts(getattr(value, field.name))
    elif isinstance(value, dict):
        yield from (part for key in value for part in (str(key).encode(), *_parts(value[key])))
    elif isinstance(value, (list, tuple)):
        yield from (part for item in value for part in _parts(item))
    else:
        yield repr(value).encode(errors="backslashreplace")


def test_a_record_without_a_hash_is_read_and_a_changed_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_record(file, {"seed": 1, "losses": {"dense": 2.0}})
    assert read_record(file, dict[str, Any]) == {"seed": 1, "losses": {"dense": 2.0}}
    file.write_text(file.read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(
        RequestError, match=r"got a changed file; .* remove 'content_sha256' from it if the change is meant"
    ):
        read_record(file, dict[str, Any])
    file.write_text('{"seed": 2}')
    assert read_record(file, dict[str, Any]) == {"seed": 2}
