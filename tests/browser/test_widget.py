"""The widget in a real JupyterLab: choose heads, train, export. Pictures go to build/screenshots."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.chromium import chromium
from support.jupyter import jupyter_lab, run_first_cell, write_notebook
from support.places import PICTURES
from support.tiny import N_HEADS, N_LAYERS

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.models.loading.plain import load_plain

pytestmark = pytest.mark.browser

OPEN = """
import lcc_lens as lcc
from lcc_lens.prompting.rewriting import writing
writing.INSTRUCTION = "S_P:"  # MePO's is longer than the tiny model's context
pair = lcc.load_pair({dense!r}, {pruned!r})
scan = lcc.Scan.load({run!r})
data = lcc.load_data({questions!r})
session = lcc.RestoreSession(pair, scan, data, batch_size=4, refitting=lcc.RefitRequest(data, 8, 32))
widget = lcc.RestoreWidget(session, prompt="is 3 plus 2 more than")
widget
"""
PATIENCE = 90_000
THEME = "(theme) => window.jupyterapp.commands.execute('apputils:change-theme', { theme })"
DRAWN = "(node) => [getComputedStyle(node).color, getComputedStyle(node).backgroundColor]"


@pytest.fixture(scope="module")
def folder_of_lab(found: Scan, dense_dir, pruned_dir, question_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    found.save(folder / "run")
    opening = OPEN.format(
        dense=str(dense_dir), pruned=str(pruned_dir), run=str(folder / "run"), questions=str(question_file)
    )
    write_notebook(folder / "restore.ipynb", [opening.strip()])
    return folder


@pytest.fixture(scope="module")
def lab(folder_of_lab: Path) -> Iterator[str]:
    with jupyter_lab(folder_of_lab) as address:
        yield address


@pytest.fixture
def notebook(lab: str) -> Iterator:
    """The notebook's page with its cell run; nothing but the server may be asked, and nothing complained about."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1500, "height": 1250})
        page.set_default_timeout(PATIENCE)
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: away(request.url) and complaints.append(request.url))
        run_first_cell(page, lab.format("restore.ipynb"))
        page.locator(".lcc-restore .cell").first.wait_for()
        yield page
        assert complaints == []


def away(url: str) -> bool:
    return not re.match(r"(http|ws)://127\.0\.0\.1[:/]|data:|blob:", url)


def cell(page, name: str):
    return page.locator(f'.lcc-restore .cell[aria-label^="{name},"]')


def chosen(page) -> list[str]:
    marked = page.locator('.lcc-restore .cell[aria-selected="true"]')
    return [label.split(",")[0] for label in marked.evaluate_all("all => all.map(one => one.ariaLabel)")]


def at_rest(page) -> None:
    page.locator('.lcc-restore[aria-busy="false"]').wait_for()


def lines(page) -> list[str]:
    return page.locator(".lcc-restore .history").inner_text().splitlines()


def line_appears(page, text: str) -> None:
    page.locator(".lcc-restore .history", has_text=text).wait_for()
    at_rest(page)


def drawn(place) -> list[str]:
    """The colours of an element and of its background."""
    return place.evaluate(DRAWN)


def parts(page) -> dict:
    """What can be pressed or filled, by name."""
    names = ("train", "stop", "undo", "redo", "steps", "lr", "out", "export", "count", "selector", "threshold")
    return {name: page.locator(f".lcc-restore :is(button, input, select).{name}") for name in names}


def picture(page, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.locator(".lcc-restore").screenshot(path=PICTURES / f"{name}.png")


def test_select_train_and_export_in_jupyterlab(notebook, folder_of_lab: Path, pruned_dir: Path) -> None:
    page, place = notebook, parts(notebook)
    assert page.locator(".lcc-restore .cell").count() == N_LAYERS * N_HEADS
    picture(page, "widget-start")
    assert place["train"].is_disabled()

    cell(page, "L0H4").click()
    assert chosen(page) == ["L0H4"]  # at once, whatever the kernel does
    line_appears(page, "session.choose([lcc.Head(0, 4)])")
    cell(page, "L1H0").drag_to(cell(page, "L2H2"))
    box = [f"L{layer}H{head}" for layer in (1, 2) for head in (0, 1, 2)]
    assert chosen(page) == box
    line_appears(page, "lcc.Head(2, 2)")
    cell(page, "L2H2").click()
    assert chosen(page) == box[:-1]
    line_appears(page, "lcc.Head(2, 1)])")
    page.locator(".lcc-restore .note", has_text="Held-out loss in nats per token.").wait_for()  # reading comes after

    place["selector"].select_option("mse")
    place["count"].fill("15")
    assert len(chosen(page)) == N_LAYERS * N_HEADS
    line_appears(page, "session.choose('mse', share=1.0)")
    assert place["threshold"].input_value() == "0"  # it follows the selection

    place["steps"].fill("12")
    place["lr"].fill("0.05")
    place["train"].click()
    line_appears(page, "session.train(12, lr=0.05)")
    assert page.locator(".lcc-restore .curve").get_attribute("data-steps") == "12"
    assert page.locator(".lcc-restore .curve circle.held").count() == 3
    pruned, restored = (
        float(page.locator(f".lcc-restore .loss-{name}").inner_text()) for name in ("pruned", "restored")
    )
    assert restored < pruned - 0.1
    dense = float(page.locator(".lcc-restore .loss-dense").inner_text())
    share = f"{100 * (pruned - restored) / (pruned - dense):.0f}"
    assert share[:2] in page.locator(".lcc-restore .recovered-restored").inner_text()
    assert page.locator(".lcc-restore .curve line.level").count() == 2
    assert page.locator(".lcc-restore .texts figure").count() == 3

    place["out"].fill("restored")
    place["export"].click()
    page.locator(".lcc-restore .exported", has_text="loaded again").wait_for()
    assert lines(page)[-1] == "session.export('restored')"
    assert page.locator(".lcc-restore .failure").inner_text() == ""
    tokens = torch.arange(1, 25)[None]
    exported, before = (load_plain(path, dtype=torch.float32) for path in (folder_of_lab / "restored", pruned_dir))
    with torch.no_grad():
        assert float((exported(tokens).logits - before(tokens).logits).abs().max()) > 1e-2
    page.set_viewport_size({"width": 1500, "height": 1700})
    picture(page, "widget-light")
    light = drawn(place["train"])
    page.evaluate(THEME, "JupyterLab Dark")
    page.locator('.lcc-restore[data-theme="dark"]').wait_for()
    picture(page, "widget-dark")
    assert drawn(place["train"]) != light
    for colours in (light, drawn(place["train"])):
        assert colours[0] != colours[1]


def test_stop_undo_keys_and_errors_in_jupyterlab(notebook, folder_of_lab: Path) -> None:
    page, place = notebook, parts(notebook)
    page.locator(".lcc-restore .at-once").uncheck()
    cell(page, "L1H1").focus()
    for key in ("ArrowRight", "Space", "b", "ArrowDown", "Space"):  # b would insert a cell, were it JupyterLab's
        page.keyboard.press(key)
    assert chosen(page) == ["L1H2", "L2H2"]
    line_appears(page, "session.choose([lcc.Head(1, 2), lcc.Head(2, 2)])")
    assert len(lines(page)) == 2
    assert page.locator(".jp-Cell").count() == 1
    assert "appear here" in page.locator(".lcc-restore .note").inner_text()  # nothing was read

    place["steps"].fill("1000")
    place["train"].click()
    page.locator(".lcc-restore .curve").wait_for()
    assert place["undo"].is_disabled()
    picture(page, "widget-training")
    cell(page, "L0H0").click()  # shown at once, told when the training is over
    assert chosen(page) == ["L0H0", "L1H2", "L2H2"]
    place["stop"].click()
    line_appears(page, "lcc.Head(0, 0)")
    assert re.fullmatch(r"session\.train\(1000, stop_after=\d+\)", lines(page)[2])
    assert len(lines(page)) == 4

    place["undo"].click()
    page.locator('.lcc-restore .cell[aria-label^="L0H0,"][aria-selected="false"]').wait_for()
    assert len(lines(page)) == 3
    place["redo"].click()
    page.locator('.lcc-restore .cell[aria-label^="L0H0,"][aria-selected="true"]').wait_for()

    (folder_of_lab / "taken").mkdir()
    (folder_of_lab / "taken" / "mine.txt").write_text("mine")
    place["out"].fill("taken")
    place["export"].click()
    page.locator(".lcc-restore .failure", has_text="taken exists already; name another folder").wait_for()
    at_rest(page)
    picture(page, "widget-refused")
    place["threshold"].fill("0")
    assert len(chosen(page)) == N_LAYERS * N_HEADS
    line_appears(page, "lcc.Head(2, 4)])")
    assert page.locator(".lcc-restore .failure").inner_text() == ""


#: Clicks and waits until what the click leads to is over: milliseconds, and whether a busy state was shown at once.
LATENCY = """async (press) => {
  const root = document.querySelector('.lcc-restore'), code = root.querySelector('.history');
  const busy = () => root.getAttribute('aria-busy') === 'true', before = code.textContent, start = performance.now();
  root.querySelector(press).click();
  const atOnce = busy();
  let seen = atOnce;
  while (!(seen || code.textContent !== before) || busy()) {
    await new Promise((next) => setTimeout(next, 5));
    seen ||= busy();
  }
  return [Math.round(performance.now() - start), atOnce];
}"""


def test_how_long_clicks_take(notebook, capsys: pytest.CaptureFixture) -> None:
    page, place = notebook, parts(notebook)
    cell(page, "L0H4").click()
    line_appears(page, "session.choose")
    assert "take about" in page.locator(".lcc-restore .estimate").inner_text()
    place["steps"].fill("4")
    took = {name: page.evaluate(LATENCY, f"button.{name}") for name in ("train", "undo", "redo", "read", "pin")}
    with capsys.disabled():
        print("\nmilliseconds:", ", ".join(f"{name} {took[name][0]}" for name in took))
    assert all(took[name][1] for name in ("train", "read", "pin"))  # busy at once
    assert not took["undo"][1]  # read before in that state, so nothing runs
    assert not took["redo"][1]
    page.locator(".lcc-restore .loss-pinned").wait_for()
    at_rest(page)
    picture(page, "widget-pinned")
    page.locator(".lcc-restore select.method").select_option("norms")
    line_appears(page, "session.set_method('norms')")
    assert "d_model per norm" in page.locator(".lcc-restore .costs").inner_text()
    assert page.locator(".lcc-restore .picked.unused").count() == 1
    picture(page, "widget-method")


def test_best_is_chosen_refits_and_trains_beside_another(notebook) -> None:
    page, place = notebook, parts(notebook)
    offered = page.locator(".lcc-restore select.method option").all_inner_texts()
    assert offered == ["lcc", "best", "gain", "norms", "low-rank", "lcc+gain", "mean-shift"]
    place["selector"].select_option("mse")
    line_appears(page, "session.choose('mse'")
    place["steps"].fill("8")
    place["train"].click()
    line_appears(page, "session.train(8)")
    page.locator(".lcc-restore button.pin").click()
    page.locator(".lcc-restore .loss-pinned").wait_for()
    at_rest(page)
    page.locator(".lcc-restore select.method").select_option("best")
    line_appears(page, "session.set_method('best')")
    assert "least-squares refit, then a low-rank change" in page.locator(".lcc-restore .costs").inner_text()
    estimate = page.locator(".lcc-restore .estimate").inner_text()
    assert re.fullmatch(r"The refit, which comes first, takes about .+\. 8 steps take about .+\.", estimate)
    picture(page, "widget-best-before")
    place["train"].click()
    assert place["stop"].is_enabled()
    line_appears(page, "session.refit()\nsession.train(8)")
    assert page.locator(".lcc-restore .curve line.level").count() == 2
    losses = {
        name: float(page.locator(f".lcc-restore .loss-{name}").inner_text())
        for name in ("pruned", "restored", "pinned")
    }
    assert losses["restored"] < losses["pruned"] > losses["pinned"]
    assert page.locator(".lcc-restore .estimate").inner_text().startswith("8 steps")
    page.set_viewport_size({"width": 1500, "height": 1900})
    picture(page, "widget-best")


def test_a_prompt_is_typed_read_and_rewritten(notebook) -> None:
    page = notebook
    cell(page, "L0H4").click()
    line_appears(page, "session.choose")
    prompt, rewrite = (page.locator(f".lcc-restore .{name}") for name in ("prompt", "rewrite"))
    prompt.fill("name 3 rivers, please")
    prompt.press("Enter")
    at_rest(page)
    table = page.locator(".lcc-restore .place-tokens table")
    table.wait_for()
    assert table.locator("th").all_inner_texts() == ["next token", "dense", "pruned", "restored"]
    shares = table.locator("tbody tr").first.locator("td span:not([class])").all_inner_texts()
    assert len(shares) == 3
    assert all(share.endswith("%") for share in shares)
    assert "appear here" in page.locator(".lcc-restore .verdict").inner_text()

    rewrite.click()
    versions = page.locator(".lcc-restore .versions")
    versions.wait_for()
    at_rest(page)
    heads = versions.locator("th").all_inner_texts()
    assert heads == ["prompt", "clarity", "precision", "steps", "kept", "over raw"]
    rows = [row.locator("td").all_inner_texts() for row in versions.locator("tbody tr").all()]
    (raw,) = (row for row in rows if row[0].startswith("name 3 rivers, please"))
    assert (raw[4], raw[5]) == ("1.00", "")
    assert len(rows) >= 5
    assert all(0 <= float(score) <= 1 for row in rows for score in row[1:5])
    assert all(row[0].endswith(("raw", "clear", "precise", "concise-cot", "merits", "dense")) for row in rows)
    verdict = page.locator(".lcc-restore .verdict").inner_text()
    assert verdict.startswith(("The raw prompt is already the best", "Chosen: "))
    assert versions.locator(".chosen-version").count() == 1
    page.set_viewport_size({"width": 1500, "height": 2300})
    for theme in ("light", "dark"):  # JupyterLab keeps what an earlier test chose
        page.evaluate(THEME, f"JupyterLab {theme.title()}")
        page.locator(f'.lcc-restore[data-theme="{theme}"]').wait_for()
        picture(page, f"widget-prompt-{theme}")
    wide = "(cells) => cells.filter((one) => one.scrollWidth > one.clientWidth + 1).map((one) => one.innerText)"
    assert versions.locator("th, td").evaluate_all(wide) == []  # no column's text runs into the next one

    step = versions.locator("button", has_text=re.compile("^Think briefly"))
    written = step.inner_text()
    step.click()  # the version becomes the prompt, and is read
    at_rest(page)
    assert prompt.input_value() == written
    assert "Of the prompt before" in page.locator(".lcc-restore .verdict").inner_text()
    prompt.fill("")
    rewrite.click()
    page.locator(".lcc-restore .failure", has_text="expected a prompt with at least one word").wait_for()
    assert page.locator(".lcc-restore .versions").count() == 1  # the last ones stay


def test_two_views_of_a_widget_show_the_same(notebook) -> None:
    page = notebook
    page.evaluate("window.jupyterapp.commands.execute('notebook:insert-cell-below')")
    page.locator(".jp-Cell .cm-content").last.click()
    page.keyboard.type("widget")
    page.keyboard.press("Control+Enter")
    views = page.locator(".lcc-restore")
    views.nth(1).wait_for()
    for name, clicked in (("L0H0", 1), ("L0H1", 1), ("L0H2", 0), ("L0H3", 1)):
        views.nth(clicked).locator(f'.cell[aria-label^="{name},"]').click()
        for place in (0, 1):
            views.nth(place).locator(f'.cell[aria-label^="{name},"][aria-selected="true"]').wait_for()
            assert views.nth(place).locator('.cell[aria-selected="true"]').count() == int(name[-1]) + 1
