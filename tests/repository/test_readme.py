"""The README says what was measured and what the program does."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
from support.places import ROOT

import lcc_lens
from lcc_lens.data.prompts import SOURCES
from lcc_lens.frontends.cli.main import run

README = (ROOT / "README.md").read_text()


def benchmark(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_drawn_from_the_committed_results() -> None:
    module = benchmark("collect_demo")
    demo = json.loads((ROOT / "benchmarks" / "demo.json").read_text())
    assert len(demo["runs"]) >= 3
    assert module.table(demo) in README
    assert demo["command"] in README
    assert module.bench_table(json.loads((ROOT / "benchmarks" / "results.json").read_text())) in README


def test_pruning_tables_are_drawn_from_the_committed_results() -> None:
    tables = benchmark("tables")
    study, bench, report = (tables.read(f"{name}.json") for name in ("pruning_quality", "pruners", "report"))
    for table in (
        tables.quality_table(study),
        tables.time_table(study),
        tables.peer_table(bench),
        tables.report_table(report),
    ):
        assert table in README
    for file in (study, bench):
        assert file["command"] in README
    assert all(len({cell["seed"] for cell in found["cells"]}) == found["n"] for found in study["methods"].values())


def test_selector_tables_are_drawn_from_the_committed_study() -> None:
    tables = benchmark("tables")
    study = tables.read("selector_study.json")
    assert tables.correlation_table(study) in README
    assert tables.recovery_table(study, "recovered") in README
    assert tables.recovery_table(study, "kl_removed") in README
    assert tables.task_table(study) in README
    assert study["command"] in README
    assert {cell["seed"] for cell in study["cells"]} == {0, 1, 2}


def test_costs_are_drawn_from_the_committed_benchmarks() -> None:
    tables = benchmark("tables")
    cost, probes, published = (tables.read(f"{name}.json") for name in ("scan_cost", "probes", "published"))
    assert tables.cost_table(cost, probes) in README
    assert tables.published_table(published) in README
    assert all(file["command"] in README for file in (cost, probes, published))


@pytest.mark.parametrize(
    "mark",
    [
        "restorations", "restorations 2:4", "accuracies", "accuracies 2:4", "restorations 2:4, two cores",
        "a quarter of the heads", "differences 2:4",
    ],
)  # fmt: skip
def test_marked_table_is_drawn_from_the_committed_comparison(mark: str) -> None:
    tables = benchmark("tables")
    file, draw = tables.MARKED[mark]
    study = tables.read(file)
    assert f"<!-- {mark} -->\n{draw(study)}\n<!-- /{mark} -->" in README
    assert study["command"] in README
    assert study["identity"].keys() == {"dense_sha256", "pruned_sha256"}


@pytest.mark.parametrize("mark", ["tasks", "tasks, structured"])
def test_single_tasks_are_drawn_from_the_committed_comparisons(mark: str) -> None:
    tables = benchmark("tables")
    studies = tables.read_tasks(tables.MARKED_TASKS[mark])
    assert "arc_easy" in studies
    assert f"<!-- {mark} -->\n{tables.one_task_table(studies)}\n<!-- /{mark} -->" in README
    assert all(
        study["settings"]["examples"] == 200 and study["settings"]["tasks"] == [task] for task, study in studies.items()
    )


def test_pictures_and_pages_that_the_readme_names_exist() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)|src=\"([^\"]+)", README)
    targets = [link or picture for link, picture in targets]
    assert len(targets) >= 4
    assert [target for target in targets if not (ROOT / target).exists()] == []
    assert "figures/loss_map.png" in README[:1500]
    assert "make demo" in README[:400]
    assert "make test" in README[:400]


def test_python_example_uses_public_names() -> None:
    used = set(re.findall(r"\blcc\.(\w+)", README))
    assert len(used) >= 6
    assert used <= set(lcc_lens.__all__)


def test_commands_and_data_sets_of_the_readme_exist(capsys) -> None:
    commands = set(re.findall(r"^lcc-lens (\w+)", README, flags=re.MULTILINE))
    assert commands >= {"prune", "scan", "restore", "export", "eval"}
    for command in commands:
        assert run([command, "--help"]) == 0
        options = capsys.readouterr().out
        for line in re.findall(rf"^lcc-lens {command} .*", README, flags=re.MULTILINE):
            assert all(option in options for option in re.findall(r"--[a-z-]+", line.split("#")[0]))
    assert all(name in README for name in SOURCES)
