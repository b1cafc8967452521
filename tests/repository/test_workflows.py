"""What GitHub runs exists here: targets of workflows and their Pythons; issue forms ask for the doctor."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.places import ROOT

WORKFLOWS = {path.stem: path for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
PYTHONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())


def jobs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["jobs"]


def rows(job: dict[str, Any]) -> list[dict[str, str]]:
    """The rows of a job's matrix, as GitHub forms them where an included row changes a value; one without a matrix."""
    matrix = dict(job.get("strategy", {}).get("matrix", {}))
    included = matrix.pop("include", [])
    formed = [dict(zip(matrix, values, strict=True)) for values in product(*matrix.values())] if matrix else []
    return [*formed, *included] or [{}]


def commands(job: dict[str, Any]) -> list[str]:
    """The commands of a job, for every row of its matrix."""
    templates = [step["run"] for step in job["steps"] if "run" in step]
    return [_filled(text, row) for row in rows(job) for text in templates]


def _filled(text: str, row: dict[str, str]) -> str:
    return re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda name: row[name[1]], text)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_target_of_a_workflow_exists(name: str) -> None:
    named = [target for job in jobs(WORKFLOWS[name]).values() for text in commands(job)
             for target in re.findall(r"\bmake ([\w-]+)", text)]  # fmt: skip
    assert named
    assert set(named) <= TARGETS
    assert all("timeout-minutes" in job for job in jobs(WORKFLOWS[name]).values())
    assert yaml.safe_load(WORKFLOWS[name].read_text())["permissions"] == {"contents": "read"}


def test_the_matrix_has_every_python_that_the_package_names() -> None:
    row_of = [(row["target"], row["python"]) for row in rows(jobs(WORKFLOWS["tests"])["test"])]
    assert len(PYTHONS) == 4
    for target in ("test", "test-newest"):
        assert [python for name, python in row_of if name == target] == PYTHONS
    assert ("test-lowest", PYTHONS[0]) in row_of
    assert {"test-tl3", "browser", "faults", "check", "docs", "dist"} <= {name for name, _ in row_of}
    assert f'requires-python = ">={PYTHONS[0]}"' in (ROOT / "pyproject.toml").read_text()


def test_only_what_publishes_may_write() -> None:
    allowed = {(name, job): body["permissions"] for name, path in WORKFLOWS.items() for job, body in jobs(path).items()
               if "permissions" in body}  # fmt: skip
    assert allowed == {
        ("docs", "publish"): {"pages": "write", "id-token": "write"}, ("release", "publish"): {"id-token": "write"}
    }  # fmt: skip


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_asks_for_the_doctor(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    fields = {field["id"]: field for field in form["body"]}
    assert fields["doctor"]["attributes"]["label"] == "Output of lcc-lens doctor MODEL --json"
    assert any(field.get("validations", {}).get("required") for field in fields.values())


def test_there_are_issue_forms() -> None:
    assert [path.stem for path in FORMS] == ["bug", "idea", "model"]
