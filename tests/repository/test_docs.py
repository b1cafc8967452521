"""The site says what there is: its names exist, its example runs, and its equations can be drawn without a script."""

from __future__ import annotations

import importlib
import re

import pytest
from support.places import ROOT

import lcc_lens

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}


def named(dotted: str) -> object:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_public_name_is_documented_once_or_part_of_a_result() -> None:
    pages = "\n".join(text for page, text in PAGES.items() if page.startswith("api/"))
    documented = re.findall(r"^::: [\w.]+\.(\w+)$", pages, flags=re.MULTILINE)
    assert len(documented) == len(set(documented))
    rest = set(lcc_lens.__all__) - set(documented)
    assert rest == {
        "Composite", "DifferenceStatistics", "Head", "HeadScores", "Injection", "LccInjection", "LensError",
        "MeanShift", "OffsetInjection", "Pair", "RequestError", "Step", "TokenLoss", "WeightInjection", "shown",
        "train",
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_names_of_a_page_exist(page: str) -> None:
    for dotted in re.findall(r"^::: ([\w.]+)$", PAGES[page], flags=re.MULTILINE):
        assert dotted == "lcc_lens.core.errors" or named(dotted) is not None
    for dotted in re.findall(r"`(lcc_lens\.[\w.]+)`", PAGES[page]):
        try:
            importlib.import_module(dotted)
        except ModuleNotFoundError:
            assert named(dotted) is not None
    assert set(re.findall(r"\blcc\.(\w+)\(", PAGES[page])) <= set(lcc_lens.__all__)
    links = re.findall(r"\]\((?!http)([^)#]+)", PAGES[page])
    assert [link for link in links if not ((DOCS / page).parent / link).exists()] == []


def test_the_site_shows_every_notebook_and_fetches_nothing() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    assert re.findall(r"notebooks/(\w+)\.md", site) == sorted(
        path.stem for path in (ROOT / "notebooks").glob("*.ipynb")
    )
    assert "- offline" in site
    assert "font: false" in site
    assert "IFrameWorker" in (DOCS / "frame_worker.js").read_text()  # the search's worker for pages opened from disk


def test_equations_carry_the_papers_numbers() -> None:
    assert re.findall(r"\\tag\{(\d)\}", PAGES["method.md"]) == list("12345678")
    assert PAGES["method.md"].count("$$") % 2 == 0
