"""Recipes of the paper's tables: read strictly, run in full on a tiny model, and shown beside the paper's figures."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
from support.commands import call, refused
from support.places import ROOT
from support.small_sets import write_sets
from support.tiny import build_model, save_model

from lcc_lens.core.errors import RequestError
from lcc_lens.evaluation.comparison import runner as bench
from lcc_lens.evaluation.paper.recipes import dry, read_recipe
from lcc_lens.evaluation.paper.run import run_recipe
from lcc_lens.evaluation.paper.tables import recipe_table
from lcc_lens.restoration import training_data

RECIPES = sorted((ROOT / "recipes").glob("*.json"))
NAMES = [path.stem for path in RECIPES]
#: METHOD: mean zero-shot accuracy and perplexity of LLaMA-7B.
PAPER = {
    "unstructured50": {"dense": (59.99, 5.68), "pruned": (54.09, 7.26), "lora": (56.27, 7.09), "lcc": (58.83, 6.93)},
    "semi_structured24": {"pruned": (48.99, 11.04), "eora": (51.21, 9.87), "lcc": (55.00, 8.99)},
    "structured20": {"pruned": (57.54, 7.46), "lofit": (58.42, 7.86), "lcc": (59.76, 7.53)},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with as many key-value heads as heads, as the paper's, whose widths 2:4 fits."""
    model = build_model(head_dim=8, num_key_value_heads=5, num_hidden_layers=2)
    return save_model(model, tmp_path_factory.mktemp("llama") / "tiny-llama")


@pytest.fixture(autouse=True)
def sets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCC_LENS_DATA", str(write_sets(tmp_path_factory.mktemp("sets"), n=240)))


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_states_the_papers_job(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.status == "not run at size"
    assert recipe.model == "huggyllama/llama-7b"
    assert (recipe.compare.max_length, recipe.compare.batch_size, recipe.compare.epochs) == (512, 8, 3)
    assert recipe.prune.calibration == "c4"
    assert (len(recipe.data), len(recipe.compare.tasks)) == ((6, 0) if recipe.is_of_tasks else (1, 7))
    if recipe.is_of_tasks:
        assert recipe.compare.examples == 200
        assert recipe.comparison("rte").tasks == ("rte",)
    figures = {row.entry: (row.accuracy, row.perplexity) for row in recipe.rows}
    assert figures.items() >= PAPER.get(path.stem, {}).items()
    assert {entry for entry in figures if entry and entry.startswith("refit")} <= {
        "refit+low-rank:text+distillation=0.005"
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "n_data"),
    [
        *((path, 1) for path in RECIPES if "tasks" in path.stem),
        *((path, None) for path in RECIPES),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else f"first {value}" if value else "all",
)
def test_every_recipe_runs_on_a_tiny_model(
    path: Path, n_data: int | None, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row that the recipe makes is there with every task, and the table says that it means nothing."""
    if n_data is not None:  # its other tasks take as long again, each
        values = json.loads(path.read_text())
        path = tmp_path / path.name
        path.write_text(json.dumps({**values, "data": values["data"][:n_data]}))
    assert call("recipe", path, "--out", tmp_path / "run", "--dry-run", tiny, "--quiet") == 0
    recipe = read_recipe(path)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["dry_run"] is True
    assert list(results["comparisons"]) == list(recipe.data)
    for data, comparison in results["comparisons"].items():
        tasks = recipe.comparison(data).tasks
        for row in comparison["rows"]:
            assert (row["errors"], row["seeds"]) == ([], 1)
            assert list(row["tasks"]) == list(tasks)
        assert [row["entry"] for row in comparison["rows"]] == list(recipe.entries)
        assert {name: list(model["tasks"]) for name, model in comparison["bare"].items()} == {
            "dense": list(tasks), "pruned": list(tasks)
        }  # fmt: skip
    pruning = json.loads((tmp_path / "run" / "pruned" / "pruning.json").read_text())
    assert pruning["method"] == recipe.prune.method
    table = (tmp_path / "run" / "table.md").read_text()
    assert "its figures mean nothing" in table
    cells = {
        line.split(" | ")[0].removeprefix("| "): line.split("|")[2:-1] for line in table.splitlines() if "| " in line
    }
    for row in recipe.rows:
        ours = [cell.strip() for cell in (*cells[row.name][1:4:2], *cells[row.name][4:])]
        assert all(ours) if row.entry else not any(ours)
    assert table.splitlines()[0] in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_goes_on_and_belongs_to_its_recipe(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ROOT / "recipes" / "unstructured50_mse_heads.json"
    recipe, cells = dataclasses.replace(read_recipe(path), data=("rte", "boolq")), []
    recipe = dataclasses.replace(recipe, compare=dataclasses.replace(recipe.compare, tasks=()))

    def stopping(name: str, cell: dict) -> None:
        cells.append(name)
        if len(cells) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "run", dry_run=tiny, on_cell=stopping)
    assert list(json.loads((tmp_path / "run" / "results.json").read_text())["comparisons"]) == ["rte"]
    cells.clear()

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("pruned, and the cells are there")

    with monkeypatch.context() as patch:
        patch.setattr("lcc_lens.evaluation.paper.run.prune", never)
        patch.setattr(bench, "train", never)
        results = run_recipe(recipe, tmp_path / "run", dry_run=tiny, on_cell=lambda *cell: cells.append(cell[0]))
    assert cells == []
    assert list(results["comparisons"]) == ["rte", "boolq"]
    mean = sum(part["rows"][0]["accuracy"] for part in results["comparisons"].values()) / 2
    assert f"| {100 * mean:.2f} |" in recipe_table(recipe, results)
    partly = {**results, "comparisons": {"rte": results["comparisons"]["rte"]}}
    assert f"| {100 * results['comparisons']['rte']['rows'][0]['accuracy']:.2f} |" not in recipe_table(recipe, partly)
    message = "expected a folder of the same recipe, got other settings"
    with pytest.raises(RequestError, match=message):
        run_recipe(recipe, tmp_path / "run", dry_run=tiny, limit=2)
    refused(capsys, 2, message, "recipe", path, "--out", tmp_path / "run", "--dry-run", tiny)


def test_what_is_measured_of_a_task_chooses_nothing(tiny: Path, tmp_path: Path) -> None:
    """Validation, training and measured items of a task's comparison share no group."""
    recipe = dry(read_recipe(ROOT / "recipes" / "tasks_unstructured60.json"))
    loaded, real = {}, training_data.load_data

    def noting(name: str, n: int | None = None, *, role: str | None = None, seed: int = 0, **more: Any):
        loaded[name, role] = real(name, n, role=role, seed=seed, **more)
        return loaded[name, role]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_data, "load_data", noting)
        few = dataclasses.replace(recipe, data=("rte",), model=str(tiny), rows=recipe.rows[:3])
        run_recipe(few, tmp_path / "run")
    measured = real("rte", role="held-out").groups
    train, chosen = loaded["rte", "train"].groups, loaded["rte", "calibration"].groups
    assert train
    assert chosen
    assert not train & chosen
    assert not (train | chosen) & measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "expected the fields of .*bad.json alone, got 'colour' too"),
        ({"title": None}, r"bad.json as lcc-lens reads it, got another layout \(no field title\); correct it"),
        ({"compare": {"task": []}}, "bad.json alone, got 'task' too"),
        ({"prune": {"method": "wanda"}}, "expected a sparsity or a pattern to prune to, got None and None"),
        ({"prune": {"method": "axe", "sparsity": 0.5}}, "expected a pruner .magnitude, .*'axe'"),
        ({"rows": [{"name": "x"}]}, r"no field entry at rows\[0\]"),
        ({"rows": [{"name": "x", "entry": "magic"}]}, "expected a method"),
        ({"rows": 3}, "expected list, got int at rows"),
        ({"rows": [{"name": "x", "entry": "dense"}]}, "expected data, a seed and a row to train"),
        ({"compare": {"selector": "nose"}}, "expected a selector .probe, .*, got 'nose'"),
        ({"seeds": "three"}, "expected int, got str at seeds"),
        ({"data": [1]}, r"expected str, got int at data\[0\]"),
        ({"compare": {"heads": "all"}}, "expected float, got str at compare.heads"),
        ({"status": "done"}, "unknown word 'done' at status"),
    ],
)  # fmt: skip
def test_wrong_recipes_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    values = json.loads((ROOT / "recipes" / "structured20.json").read_text()) | change
    values = {key: value for key, value in values.items() if value is not None}
    (tmp_path / "bad.json").write_text(json.dumps(values))
    with pytest.raises(RequestError, match=message):
        read_recipe(tmp_path / "bad.json")


def test_missing_files_and_data_are_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, path, out = tmp_path / "gone.json", ROOT / "recipes" / "structured20.json", tmp_path / "run"
    refused(capsys, 2, "which is no file", "recipe", gone)
    both = ("--model", tiny, "--dry-run", tiny)
    refused(capsys, 2, "expected one model, got", "recipe", path, "--out", out, *both)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "diary.txt").write_text("dear diary")
    refused(capsys, 2, "exists already", "recipe", path, "--out", tmp_path / "own", "--dry-run", tiny)
    monkeypatch.setenv("LCC_LENS_DATA", str(tmp_path))
    refused(capsys, 2, "expected the data set alpaca", "recipe", path, "--out", out, "--dry-run", tiny)
    assert not out.exists()


@pytest.fixture(scope="module")
def module() -> Any:
    """The script that writes the page of all tables."""
    spec = importlib.util.spec_from_file_location("paper_tables_script", ROOT / "benchmarks" / "paper_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_drawn_from_the_recipes_and_results(module) -> None:
    assert set(module.ORDER) == set(NAMES)
    assert module.PAGE.read_text(encoding="utf-8") == module.page()


def test_results_fill_the_empty_column(module) -> None:
    recipe = read_recipe(ROOT / "recipes" / "structured20.json")
    bare = {"perplexity": 5.5, "accuracy": 0.6, "accuracy_stderr": 0.01, "tasks": {"rte": {"acc": 0.7}}}
    row = {
        "entry": "lcc", "seeds": 2, "accuracy": 0.5912, "accuracy_sd": 0.001, "perplexity": 7.5, "perplexity_sd": 0.02,
        "tasks": {"rte": {"acc": 0.625}},
    }  # fmt: skip
    results = {
        "model": "m", "version": "1", "dry_run": False,
        "comparisons": {"alpaca": {"bare": {"dense": bare, "pruned": bare}, "rows": [row]}},
    }  # fmt: skip
    filled = recipe_table(recipe, results)
    assert "| RestoreLCC | 59.76 | 59.12 ± 0.10 | 7.53 | 7.50 ± 0.02 |  | 62.5 |" in filled
    assert "| dense | 59.99 | 60.00 | 5.68 | 5.50 |  | 70.0 |" in filled
    assert "| LoRA | 58.45 |  | 7.66 |  |" in filled
    assert "*Run on m (lcc_lens 1).*" in filled
    assert "*Not run at size.*" in recipe_table(recipe)
    assert filled in module.paper_page({"structured20": recipe}, {"structured20": results})
    assert "60.00" not in module.paper_page({"structured20": recipe}, {"structured20": {**results, "dry_run": True}})
