"""The built documentation, opened from disk: no page is too long, and its search works without a server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.chromium import chromium
from support.places import ROOT

pytest.importorskip("mkdocs")
pytestmark = pytest.mark.browser
TALLEST = 8_000


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    subprocess.run(build, cwd=ROOT, env=environment, check=True)
    return folder


def test_no_page_is_too_long_and_the_search_finds_names(site: Path) -> None:
    pages = [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]
    with chromium() as browser:
        view = browser.new_page(viewport={"width": 1400, "height": 900})
        heights = {}
        for page in pages:
            view.goto(page.as_uri())
            heights[page.relative_to(site).as_posix()] = view.evaluate("document.documentElement.scrollHeight")
        assert {page: height for page, height in heights.items() if height > TALLEST} == {}
        assert len(pages) > 40
        view.goto((site / "index.html").as_uri())
        view.locator("input.md-search__input").fill("trace_upstream")
        view.locator(".md-search-result__link", has_text="trace_upstream").first.wait_for(timeout=60_000)
