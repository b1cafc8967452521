"""Pictures of the explorer and the widget for the documentation, from the demo's run on the real model.

``python tests/support/tour.py`` (``make tour``) writes ``docs/tour/*.png``, from the folder that
``make demo`` leaves.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.chromium import PHONE, chromium
from support.jupyter import jupyter_lab, run_first_cell, write_notebook
from support.places import ROOT

PICTURES = ROOT / "docs" / "tour"
DESK = {"viewport": {"width": 1280, "height": 800}}
NOTEBOOK = """
import lcc_lens as lcc
from lcc_lens.frontends.demo import passages

pair = lcc.load_pair("smollm2", "demo/pruned")
scan = lcc.Scan.load("demo/run")
session = lcc.RestoreSession(pair, scan, passages("train", 96, 0), batch_size=4, max_length=144)
lcc.RestoreWidget(session, prompt="The capital of France is")
"""
#: Milliseconds for what the real model computes.
PATIENCE = 300_000


def picture_explorer(started: Any, file: Path) -> None:
    """The overview, the head that lost most, a search, and a phone."""
    page = started.new_page(**DESK)
    page.goto(file.as_uri())
    page.screenshot(path=PICTURES / "overview.png")
    page.set_viewport_size({"width": 1280, "height": 1500})
    page.locator(".ranking a").first.click()
    page.locator("#map-side").scroll_into_view_if_needed()
    page.screenshot(path=PICTURES / "head.png", clip={"x": 0, "y": 470, "width": 1280, "height": 1030})
    dark = started.new_page(**DESK, color_scheme="dark")
    dark.goto(file.as_uri())
    dark.keyboard.press("/")
    dark.keyboard.type("the")
    dark.screenshot(path=PICTURES / "search_dark.png")
    phone = started.new_page(**PHONE)
    phone.goto(f"{file.as_uri()}{page.evaluate('location.hash')}")
    phone.screenshot(path=PICTURES / "phone.png")


def picture_widget(started: Any, demo: Path) -> None:
    """The widget after a short training of the heads that a selector chose."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "demo").symlink_to(demo, target_is_directory=True)  # no path of this machine in the picture
        write_notebook(Path(folder) / "restore.ipynb", [NOTEBOOK.strip()])
        with jupyter_lab(Path(folder)) as address:
            page = started.new_page(viewport={"width": 1500, "height": 1700})
            page.set_default_timeout(PATIENCE)
            run_first_cell(page, address.format("restore.ipynb"))
            page.locator(".lcc-restore select.selector").select_option("mse")
            page.locator(".lcc-restore .history", has_text="session.choose").wait_for()
            page.locator('.lcc-restore[aria-busy="false"]').wait_for()
            page.locator(".lcc-restore input.steps").fill("20")
            page.locator(".lcc-restore button.train").click()
            page.locator(".lcc-restore .history", has_text="session.train(20").wait_for()
            page.locator('.lcc-restore[aria-busy="false"]').wait_for()
            page.locator(".lcc-restore").screenshot(path=PICTURES / "widget.png")


def main(demo: Path) -> None:
    """Take every picture."""
    page = demo / "index.html"
    if not page.exists():
        sys.exit(f"expected the demo's page {page}, got none; run make demo")
    PICTURES.mkdir(parents=True, exist_ok=True)
    with chromium() as started:
        picture_explorer(started, page.resolve())
        picture_widget(started, demo.resolve())
    print("\n".join(str(path) for path in sorted(PICTURES.glob("*.png"))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, nargs="?", default=Path("runs/demo"))
    main(parser.parse_args().demo)
