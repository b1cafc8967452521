"""README and docs say what was measured and what the program does; the README fits on a screen or two."""

from __future__ import annotations

import importlib.util
import json
import re
import sys

import pytest
from support.places import ROOT

import lcc_lens
from lcc_lens.data.registry import DATASETS
from lcc_lens.frontends.cli.main import COMMANDS, run

README = (ROOT / "README.md").read_text()
RESULTS = {path.stem: path.read_text() for path in (ROOT / "docs" / "results").glob("*.md")}
CLI_PAGE = (ROOT / "docs" / "cli.md").read_text()


def benchmark(name: str):
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))  # they import each other
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_drawn_from_the_committed_results() -> None:
    module = benchmark("collect_demo")
    demo = json.loads((ROOT / "benchmarks" / "demo.json").read_text())
    assert len(demo["runs"]) >= 3
    assert module.table(demo) in RESULTS["training_cost"]
    assert demo["command"] in RESULTS["training_cost"]
    assert (
        module.bench_table(json.loads((ROOT / "benchmarks" / "results.json").read_text())) in RESULTS["training_cost"]
    )


def test_pruning_tables_are_drawn_from_the_committed_results() -> None:
    tables = benchmark("tables")
    study, bench, report = (tables.read(f"{name}.json") for name in ("pruning_quality", "pruners", "report"))
    for table in (
        tables.quality_table(study),
        tables.time_table(study),
        tables.peer_table(bench),
        tables.report_table(report),
    ):
        assert table in RESULTS["pruning"]
    for file in (study, bench):
        assert file["command"] in RESULTS["pruning"]
    assert all(len({cell["seed"] for cell in found["cells"]}) == found["n"] for found in study["methods"].values())


def test_selector_tables_are_drawn_from_the_committed_study() -> None:
    tables = benchmark("tables")
    study = tables.read("selector_study.json")
    assert tables.correlation_table(study) in RESULTS["selectors"]
    assert tables.recovery_table(study, "recovered") in RESULTS["selectors"]
    assert tables.recovery_table(study, "kl_removed") in RESULTS["selectors"]
    assert tables.task_table(study) in RESULTS["selectors"]
    assert study["command"] in RESULTS["selectors"]
    assert {cell["seed"] for cell in study["cells"]} == {0, 1, 2}


def test_costs_are_drawn_from_the_committed_benchmarks() -> None:
    tables = benchmark("tables")
    cost, probes, published = (tables.read(f"{name}.json") for name in ("scan_cost", "probes", "published"))
    assert tables.cost_table(cost, probes) in RESULTS["scan_cost"]
    assert tables.published_table(published) in RESULTS["scan_cost"]
    assert all(file["command"] in RESULTS["scan_cost"] for file in (cost, probes, published))


def test_marked_tables_are_drawn_from_the_committed_comparisons() -> None:
    tables = benchmark("tables")
    pages = {"README": README, **RESULTS}
    marked = tables.marked_tables()
    for mark, table in marked.items():
        assert [name for name, text in pages.items() if f"<!-- {mark} -->\n{table}\n<!-- /{mark} -->" in text], mark
    marks = [mark for text in pages.values() for mark in re.findall(r"<!-- ([^/].*?) -->", text)]
    assert sorted(marks) == sorted(marked)


def test_the_commands_of_the_marked_tables_stand_beside_them() -> None:
    tables = benchmark("tables")
    text = "\n".join([README, *RESULTS.values()])
    for file, _ in tables.MARKED.values():
        assert tables.read(file).get("command", "make bench") in text
    for model in tables.MARKED_TASKS.values():
        studies = tables.read_tasks(model)
        assert "arc_easy" in studies
        for task, study in studies.items():
            assert (study["settings"]["examples"], study["settings"]["tasks"]) == (200, [task])


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.encode()) <= 8192


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


#: A command's name, which may have two words.
COMMAND = r"(rewrite fit|[a-z]+)"


@pytest.mark.parametrize("page", [README, CLI_PAGE])
def test_commands_of_a_page_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = re.findall(rf"^lcc-lens {COMMAND}(.*)", page, flags=re.MULTILINE)
    assert {command for command, _ in lines} >= {"prune", "scan", "restore", "export", "eval"}
    for command, rest in lines:
        assert run([*command.split(), "--help"]) == 0
        options = capsys.readouterr().out
        assert all(option in options for option in re.findall(r"--[a-z-]+", rest.split("#")[0]))


def test_every_command_and_data_set_is_listed() -> None:
    listed = re.findall(rf"^lcc-lens {COMMAND}", CLI_PAGE, flags=re.MULTILINE)
    assert set(COMMANDS) == {command.replace(" ", "-") for command in listed}
    assert all(name in README and name in CLI_PAGE for name in DATASETS)
