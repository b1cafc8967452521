"""Every notebook runs from top to bottom, here on the tiny model."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.places import ROOT

import lcc_lens

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


#: What makes each notebook small: text of its own, by what stands there on the tiny model.
SMALLER: dict[str, dict[str, str]] = {
    "01_where_pruning_hurts": {'DATA = "boolq"': 'DATA = "{questions}"', "n=48": "n=8"},
    "02_inside_a_lost_component": {
        'DATA = "arc_easy"': 'DATA = "{questions}"', 'TEXTS = "boolq"': 'TEXTS = "{text}"', "n=48": "n=8",
        "share=0.01": "share=0.1", "k=6": "k=2",
    },
    "03_restore_and_export": {
        'TEXTS = "boolq"': 'TEXTS = "{text}"', 'n=600, role="train"': "n=60", "limit=96": "limit=8",
        "limit=32": "limit=4",
        "max_length=128": "max_length=24", "limit=12, length=256": "limit=2, length=24",
    },
    "04_does_it_really_restore": {
        'DATA = "arc_easy"': 'DATA = "{questions}"', 'TEXTS = "boolq"': 'TEXTS = "{text}"', "n=32": "n=8",
        " examples=64": " examples=16", "validation=8": "validation=2", "responses=32": "responses=4",
        "blocks=6": "blocks=2", "block_length=256": "block_length=24", "scan_examples=32": "scan_examples=6",
    },
    "05_why_heads_lose": {
        'TEXTS = "boolq"': 'TEXTS = "{text}"', 'DATA = "wikipedia"': 'DATA = "{text}"', "n=48": "n=6", "n=96": "n=12",
        '"wikipedia+howto+python"': '"{text}"', "n_samples=32, seq_len=256": "n_samples=2, seq_len=24",
        "limit=48": "limit=8", "limit=12": "limit=4", "max_length=256": "max_length=48", '"length": 40': '"length": 10',
    },
    "06_prompts_beside_weights": {
        'DATA = "arc_easy"': 'DATA = "{questions}"', 'TEXTS = "boolq"': 'TEXTS = "{text}"', "n=32": "n=8",
        "n=64": "n=12", "n=48": "n=6",
    },
}  # fmt: skip
#: Figures in each.
DRAWN = {
    "01_where_pruning_hurts": 2,
    "02_inside_a_lost_component": 3,
    "03_restore_and_export": 2,
    "04_does_it_really_restore": 2,
    "05_why_heads_lose": 5,
    "06_prompts_beside_weights": 1,
}


def code_of(notebook: Any) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(SMALLER) == list(DRAWN)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_asks_answers_and_uses_public_names_only(path: Path) -> None:
    notebook = json.loads(path.read_text(), object_hook=lambda values: SimpleNamespace(**values))
    for cell in notebook.cells:
        cell.source = "".join(cell.source)
    first = notebook.cells[0].source
    assert first.startswith("# ")
    assert first.splitlines()[0].endswith("?")
    assert len(first.splitlines()) > 1
    assert "@@" not in first
    tree = ast.parse(code_of(notebook))
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef))]
    imported = [a.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names]
    assert all(not name.startswith("lcc_lens.") for name in imported)
    used = {
        node.attr for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lcc"
    }  # fmt: skip
    assert used
    assert used <= set(lcc_lens.__all__)
    assert not hasattr(notebook.metadata, "widgets"), "a saved widget is dead when it is opened"
    executed = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.id != "install"]
    assert all(cell.outputs or cell.execution_count for cell in executed), "outputs are kept for readers"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_on_the_tiny_model(
    path: Path, tmp_path: Path, dense_dir: Path, question_file: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat  # takes seconds to import
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    replacements = {
        'MODEL = "smollm2"': f'MODEL = "{dense_dir}"',
        "../runs/notebook": str(tmp_path),
        "n_samples=16, seq_len=256": "n_samples=2, seq_len=24",
        **{old: new.format(questions=question_file, text=text_file) for old, new in SMALLER[path.stem].items()},
    }
    for old, new in replacements.items():
        assert old in code_of(notebook), f"{path.name} no longer holds {old!r}"
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    drawn = [output for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert len(drawn) == DRAWN[path.stem]
    assert all(output.data["application/vnd.plotly.v1+json"]["data"] for output in drawn)
    assert (tmp_path / "pruned" / "pruning.json").exists()
