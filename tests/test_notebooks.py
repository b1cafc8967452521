"""Every notebook runs from top to bottom, here on the tiny model."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import lcc_lens

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_of(notebook: nbformat.NotebookNode) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS][:1] == ["01_where_pruning_hurts.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_asks_answers_and_uses_public_names_only(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
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
    executed = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs or cell.execution_count for cell in executed), "outputs are kept for readers"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_on_the_tiny_model(
    path: Path, tmp_path: Path, dense_dir: Path, question_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(path, as_version=4)
    replacements = {
        'MODEL = "smollm2"': f'MODEL = "{dense_dir}"',
        'DATA = "boolq"': f'DATA = "{question_file}"',
        'PRUNED = "../runs/notebook/pruned"': f'PRUNED = "{tmp_path / "pruned"}"',
        "n_samples=16, seq_len=256": "n_samples=2, seq_len=24",
        "n=48": "n=8",
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
    assert len(drawn) == 2
    assert len(drawn[0].data["application/vnd.plotly.v1+json"]["data"][0]["z"]) > 0
    assert (tmp_path / "pruned" / "pruning.json").exists()
