"""The explorer's page in a real browser: what a reader clicks, types and sees. Pictures go to build/screenshots."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.chromium import PHONE, chromium
from support.made_runs import HOSTILE, write_run
from support.places import PICTURES
from support.tiny import N_HEADS, N_LAYERS

from lcc_lens.analysis.lens.prompt import compare_prompt
from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.frontends.explorer.page import explore
from lcc_lens.frontends.explorer.texts import read_texts
from lcc_lens.restoration.result import Restoration

pytestmark = pytest.mark.browser
PROMPT = "is 3 plus 2 more"

#: Sums what moves on its own while a page is drawn.
WATCH_SHIFTS = """
window.shifts = 0;
new PerformanceObserver((list) => { for (const entry of list.getEntries()) window.shifts += entry.value; })
  .observe({ type: "layout-shift", buffered: true });
"""


#: Any colour of CSS as red, green and blue.
DRAWN = """(colour) => {
  const pen = document.createElement("canvas").getContext("2d");
  pen.fillStyle = colour;
  pen.fillRect(0, 0, 1, 1);
  return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
}"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def visit(browser) -> Iterator:
    """Opens a page under an address within it; at the end nothing may have been fetched or complained about."""
    contexts, complaints = [], []

    def open_page(file: Path, address: str = "", **settings):
        context = browser.new_context(**settings)
        context.add_init_script(WATCH_SHIFTS)
        page = context.new_page()
        contexts.append(context)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        page.goto(file.as_uri() + address)
        return page

    yield open_page
    for context in contexts:
        shown = context.pages[0].locator("body").inner_text()
        complaints += re.findall(r".*(?:null|undefined|NaN|\[object).*", shown)
        context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def file(found: Scan, pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(found, tmp_path_factory.mktemp("explored") / "run")
    read_texts(pair, found, Restoration.load(run), [PROMPT]).save(run)
    return explore(run, read_model=False)


def picture(page, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


def panel(page) -> str:
    return page.locator("#panel").inner_text().replace("\N{NO-BREAK SPACE}", " ")


def opens(page, name: str) -> None:
    """The panel comes to show a head; the browser tells the page of a new address only after the click."""
    page.locator("#panel-title", has_text=re.compile(f"^{name}$")).wait_for()


def cell(page, name: str):
    return page.locator(f'.cell[aria-label^="{name},"]')


def overflow(page) -> int:
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def test_the_page_says_what_happened(visit, file: Path) -> None:
    page = visit(file)
    assert (
        page.locator("h1").inner_text() == "Mostly restored: 60\N{NO-BREAK SPACE}% of the lost log-likelihood recovered"
    )
    assert page.locator("#figures li").count() == 4
    assert page.locator(".cell").count() == N_LAYERS * N_HEADS
    assert page.locator(".cell.restored").count() == 2
    assert page.locator(".ranking li").count() == N_LAYERS * N_HEADS
    picture(page, "light")


def test_a_click_opens_a_head(visit, file: Path, found: Scan) -> None:
    page = visit(file)
    cell(page, "L2H1").click()
    opens(page, "L2H1")
    text = panel(page)
    assert f"{100 * float(found.relative_loss[2, 1]):.0f} %" in text
    assert "restored" in text
    assert page.locator("#panel .chip").first.inner_text() == "berlin"
    assert page.locator("#panel .bar.restored").count() > 0
    assert page.locator(".scores li").count() == len(found.selected_by) + 1
    assert page.url.endswith("#L2H1")
    page.get_by_role("button", name="Close this head").click()
    assert "Choose a head" in panel(page)
    assert "#" not in page.url


def test_examples_are_coloured_by_the_head(visit, file: Path, found: Scan) -> None:
    page = visit(file, "#L1H2")
    example = found.tokens[0]
    tokens = page.locator(".example .token")
    assert page.locator(".example").inner_text().split() == "".join(example.pieces).split()
    loss = example.loss[:, 1, 2]
    worst = int(loss.argmax())
    strengths = tokens.evaluate_all("nodes => nodes.map((node) => Number(node.style.getPropertyValue('--v')))")
    assert strengths.index(max(strengths)) == worst
    assert max(strengths) == 1
    tokens.nth(worst).hover()
    assert f"changed {100 * float(loss[worst]):.0f} %" in panel(page)
    page.get_by_role("button", name="next example").click()
    assert page.locator(".example").inner_text().split() == "".join(found.tokens[1].pieces).split()
    assert page.evaluate("document.activeElement.id") == "example-next"


def test_a_deep_link_opens_its_head_and_back_returns(visit, file: Path) -> None:
    page = visit(file, "#L0H4")
    opens(page, "L0H4")
    cell(page, "L1H1").click()
    opens(page, "L1H1")
    page.go_back()
    opens(page, "L0H4")
    assert page.title().startswith("L0H4")


@pytest.mark.parametrize("address", ["#L9H9", "#map", "#%E0%A4%A", "#L9", "#H1"])
def test_a_wrong_link_opens_nothing(visit, file: Path, address: str) -> None:
    assert "Choose a head" in panel(visit(file, address))


def test_keys_alone_are_enough(visit, file: Path) -> None:
    page = visit(file)
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    opens(page, "L1H2")
    page.keyboard.press("ArrowDown")
    opens(page, "L2H2")
    page.keyboard.press("ArrowDown")  # the last layer
    assert page.url.endswith("#L2H2")
    page.keyboard.press("]")
    opens(page, "L2H3")
    page.keyboard.press("Escape")
    assert "Choose a head" in panel(page)
    assert page.evaluate("document.activeElement.className").startswith("cell")
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    help_text = page.get_by_role("dialog").inner_text()
    assert "hook_z" in help_text
    assert not re.search(r"null|undefined|\[object", help_text)
    picture(page, "help")
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()
    page.keyboard.press("v")
    assert page.locator("#view").input_value() == "constant"
    assert page.locator(".cell:focus-visible").evaluate("node => getComputedStyle(node).outlineStyle") == "solid"


def test_focus_stays_where_the_reader_is(visit, file: Path) -> None:
    page = visit(file, "#L0H4")
    page.get_by_role("button", name="Next head").focus()
    for _ in range(2):
        page.keyboard.press("Enter")
    opens(page, "L1H1")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Next head"
    assert "L1H1 opened" in page.locator("#announcer").inner_text()
    page.get_by_role("button", name="Close this head").press("Enter")
    page.locator(".ranking a").nth(2).press("Enter")
    page.wait_for_function("document.activeElement.id === 'panel-title'")
    page.locator(".skip").press("Enter")
    assert page.locator(".cell[aria-selected]").count() == 1


def test_heads_are_found_by_token_largest_effect_first(visit, file: Path, found: Scan) -> None:
    page = visit(file)
    page.keyboard.press("/")
    page.keyboard.type("BER")
    results = page.locator("#results li")
    assert results.count() == 1
    assert "L2H1" in results.inner_text()
    change = 100 * float(found.relative_loss[2, 1])
    assert f"promoted by component 1, changed {change:.0f}" in results.inner_text()
    assert page.locator(".cell.found").count() == 1
    page.keyboard.press("Enter")
    opens(page, "L2H1")
    page.keyboard.press("/")
    page.keyboard.type("rome")
    assert "15 heads found" in page.locator("#announcer").inner_text()
    weight = (
        found.relative_loss * torch.maximum(found.components.explained_share()[..., 0], found.constant_share).sqrt()
    )
    first, second = (f"L{place // N_HEADS}H{place % N_HEADS}" for place in weight.flatten().topk(2).indices.tolist())
    assert results.locator("b").all_inner_texts()[:2] == [first, second]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    opens(page, second)
    page.keyboard.press("/")
    page.keyboard.type("l1h3")
    page.keyboard.press("Enter")
    opens(page, "L1H3")
    page.keyboard.press("/")
    page.keyboard.type("nowhere")
    assert "No head promotes or suppresses this" in page.locator("#results").inner_text()
    picture(page, "search")
    page.keyboard.press("Escape")
    assert page.locator(".searching").count() == 0


def test_the_theme_is_kept(visit, file: Path) -> None:
    page = visit(file)
    page.get_by_role("button", name="Use the dark theme").click()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    page.reload()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    cell(page, "L0H4").click()
    picture(page, "dark")
    page.get_by_role("button", name="Use the light theme").click()
    assert page.locator("html").get_attribute("data-theme") == "light"


def test_the_system_chooses_the_theme(visit, file: Path) -> None:
    page = visit(file, color_scheme="dark")
    assert page.locator("html").get_attribute("data-theme") == "dark"
    page.emulate_media(color_scheme="light")
    page.locator('html[data-theme="light"]').wait_for(state="attached")


def test_without_storage_the_theme_still_turns(visit, file: Path, browser) -> None:
    page = visit(file)
    page.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('none here'); } });")
    page.reload()
    page.keyboard.press("d")
    assert page.locator("html").get_attribute("data-theme") == "dark"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out(visit, file: Path, theme: str) -> None:
    page = visit(file, "#L2H1", color_scheme=theme)
    nothing, card = (
        "rgba(0, 0, 0, 0)",
        page.locator("#panel").evaluate("node => getComputedStyle(node).backgroundColor"),
    )
    for selector in ("#panel .quiet", "#panel h3", "#panel .chip.up", ".sentences", ".figures .name", ".meaning"):
        node = page.locator(selector).first
        own = node.evaluate("node => [getComputedStyle(node).color, getComputedStyle(node).backgroundColor]")
        drawn = [page.evaluate(DRAWN, colour) for colour in (own[0], card if own[1] == nothing else own[1])]
        assert contrast(*drawn) >= 4.5, (selector, own, drawn)


def contrast(first: list[int], second: list[int]) -> float:
    """The contrast of two colours (red, green, blue, up to 255) as WCAG 2 defines it."""

    def luminance(colour: list[int]) -> float:
        parts = [part / 255 for part in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_a_phone_needs_no_sideways_scrolling(visit, file: Path) -> None:
    page = visit(file, **PHONE)
    assert overflow(page) <= 0
    picture(page, "phone")
    cell(page, "L0H4").tap()
    opens(page, "L0H4")
    box = page.locator("#panel").bounding_box()
    assert (box["x"], box["width"]) == (0, 375)
    assert page.evaluate("document.getElementById('panel').scrollWidth") <= 375
    assert overflow(page) <= 0
    page.screenshot(path=PICTURES / "phone_head.png")
    assert page.evaluate("document.activeElement.id") == "panel-title"
    assert page.locator("#map-side").evaluate("node => node.inert")
    page.get_by_role("button", name="Close this head").tap()
    assert "Choose a head" in panel(page)
    page.get_by_role("button", name="Table").tap()
    assert overflow(page) <= 0


def pattern_pixels(page, name: str) -> list[int]:
    """The alpha of every pixel of a model's attention pattern, row by row."""
    return page.locator(f"#pattern-{name}").evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 3)"
    )


def test_attention_patterns_are_drawn_in_every_model(visit, file: Path, pair) -> None:
    page = visit(file, "#L2H1")
    seen = compare_prompt(pair, PROMPT, restoration=Restoration.load(file.parent))
    n = len(seen.pieces)
    for place, name in enumerate(("dense", "pruned", "restored")):
        drawn = torch.tensor(pattern_pixels(page, name)).reshape(n, n) / 255
        assert float((drawn - seen.patterns[place, 2, 1] ** 0.6).abs().max()) < 0.05
    box = page.locator("#pattern-pruned").bounding_box()
    at = {"x": box["width"] * 2.5 / n, "y": box["height"] * 7.5 / n}
    page.locator("#pattern-pruned").hover(position=at)
    pruned = 100 * float(seen.patterns[1, 2, 1, 7, 2])
    assert re.search(rf"\(7\) → . ?\(2\): .*pruned {pruned:.0f}", panel(page).replace("\n", " "))
    page.locator("#pattern-pruned").click(position=at)
    assert "Token 7" in page.locator(".attended").inner_text()
    assert page.evaluate("document.activeElement.id") == "pattern-pruned"
    for key in ("ArrowUp", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    assert "Token 5" in page.locator(".attended").inner_text()
    page.locator("#text-choice").select_option("Example 1")
    assert page.locator("#pattern-dense").get_attribute("width") != str(n)
    picture(page, "patterns")


def test_a_layer_has_a_view(visit, file: Path, found: Scan) -> None:
    page = visit(file, "#L1")
    opens(page, "Layer 1")
    assert page.locator(".many-patterns canvas").count() == 3 * N_HEADS
    row = page.locator(".ranking li", has_text="L1H3").inner_text().replace("\N{NO-BREAK SPACE}", " ")
    assert f"{100 * float(found.relative_loss[1, 3]):.0f} %" in row
    picture(page, "layer")
    page.keyboard.press("]")
    opens(page, "Layer 2")
    page.locator(".ranking a").first.click()
    opens(page, "L2H0")
    page.keyboard.press("l")
    opens(page, "Layer 2")
    page.get_by_role("button", name="Close this layer").click()
    assert "Choose a head" in panel(page)
    page.locator(".axis a", has_text="1").click()
    opens(page, "Layer 1")
    page.go_back()
    page.locator("#panel-title", has_text="Highest").wait_for()


def test_a_prompt_says_what_follows_and_what_changed(visit, file: Path, pair) -> None:
    page = visit(file)
    seen = compare_prompt(pair, PROMPT, restoration=Restoration.load(file.parent))
    card = page.locator(".prompts")
    assert f"{100 * seen.next_tokens(6)['dense'][0]:.1f}" in card.locator("tbody tr").first.inner_text()
    page.get_by_role("button", name="What changed in each head").click()
    assert page.locator("#view").input_value() == "text-0-pruned"
    change = 100 * float(seen.change()[1, 1])
    assert f"{change:.0f}" in cell(page, "L1H1").get_attribute("aria-label")
    picture(page, "prompt")


def test_numbers_are_downloaded_as_csv(visit, file: Path, found: Scan, pair) -> None:
    page = visit(file, "#L2H1")
    with page.expect_download() as saved:
        page.locator("#csv").click()
    rows = list(csv.DictReader(saved.value.path().read_text().splitlines()))
    assert saved.value.suggested_filename == "run_heads.csv"
    assert len(rows) == N_LAYERS * N_HEADS
    values = [float(row["Relative change (%)"]) for row in rows]
    assert values == pytest.approx((100 * found.relative_loss).flatten().tolist(), rel=1e-4)
    with page.expect_download() as saved:
        page.locator("#tokens-csv").click()
    rows = list(csv.DictReader(saved.value.path().read_text().splitlines()))
    seen = compare_prompt(pair, PROMPT, restoration=Restoration.load(file.parent))
    norms = seen.norm[1, :, 2, 1]
    assert [float(row["norm_pruned"]) for row in rows] == pytest.approx(norms.tolist(), abs=float(norms.max()) / 100)


@pytest.mark.parametrize(("address", "view"), [("", "changed"), ("#L2H1", "learned"), ("#L2H1", "text-0-restored")])
def test_what_is_on_screen_is_python(visit, file: Path, address: str, view: str) -> None:
    page = visit(file, address)
    page.locator("#view").select_option(view)
    page.locator("#python").click()
    code = page.locator("#code-text").inner_text()
    names: dict = {}
    exec(code, names)
    label = cell(page, "L2H1").get_attribute("aria-label")
    value = names["value"]
    number = float(value[-1] if view == "learned" else value[2, 1])
    assert float(re.search(r"(-?[\d.]+)\s%", label)[1]) == pytest.approx(number, rel=0.01, abs=0.5)
    assert ("figure" in names) == (address != "")
    picture(page, f"code-{view}")


@pytest.mark.parametrize("address", ["", "#L2H1"])
def test_nothing_moves_by_itself(visit, file: Path, address: str) -> None:
    page = visit(file, address)
    page.wait_for_load_state("load")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.evaluate("window.shifts") == 0


def test_the_map_is_a_table_too(visit, file: Path, found: Scan) -> None:
    page = visit(file)
    page.get_by_role("button", name="Table").click()
    rows = page.locator("table.heads tbody tr")
    assert rows.count() == N_LAYERS * N_HEADS
    order = found.relative_loss.flatten().argsort(descending=True).tolist()
    names = [f"L{place // N_HEADS}H{place % N_HEADS}" for place in order]
    assert page.locator("table.heads tbody th").all_inner_texts() == names
    page.locator("th button", has_text="Relative change (%)").click()
    assert page.locator("table.heads tbody th").all_inner_texts() == names[::-1]
    assert page.locator('th[aria-sort="ascending"]').count() == 1
    assert page.evaluate("document.activeElement.innerText") == "Relative change (%)"
    page.get_by_role("button", name="Head", exact=True).click()
    in_order = [f"L{layer}H{head}" for layer in range(N_LAYERS) for head in range(N_HEADS)]
    assert page.locator("table.heads tbody th").all_inner_texts() == in_order
    page.get_by_role("button", name="Learned constant (%)").click()
    assert set(page.locator("table.heads tbody th").all_inner_texts()[:2]) == {"L0H4", "L2H1"}
    assert rows.count() == N_LAYERS * N_HEADS
    page.locator("th button", has_text="Relative change (%)").click()
    page.locator("th button", has_text="Relative change (%)").click()
    rows.first.get_by_role("link").click()
    opens(page, names[-1])
    picture(page, "table")


def test_every_head_has_a_name_for_screen_readers(visit, file: Path, found: Scan) -> None:
    page = visit(file)
    label = cell(page, "L0H4").get_attribute("aria-label")
    assert re.match(r"L0H4, Relative change [\d.]+\s%, restored$", label)
    assert page.locator('.cell[tabindex="0"]').count() == 1
    unnamed = "nodes => nodes.filter((n) => !(n.innerText || '').trim() && !n.getAttribute('aria-label')).length"
    assert page.locator("button, input, a, svg").evaluate_all(unnamed) == 0


def test_hostile_text_does_nothing(visit, found: Scan, tmp_path: Path) -> None:
    page = visit(explore(write_run(found, tmp_path / "run", is_hostile=True), read_model=False), "#L0H4")
    assert HOSTILE in page.locator(".example").inner_text()
    assert page.locator("#panel .chip").first.inner_text() == HOSTILE
    assert page.locator("img").count() == 0
    page.keyboard.press("/")
    page.keyboard.type("</script>")
    assert HOSTILE in page.locator("#results").inner_text()
    assert page.title() != "owned"
    picture(page, "hostile")


def test_two_runs_are_compared(visit, found: Scan, file: Path, tmp_path: Path) -> None:
    import dataclasses

    heads = dataclasses.replace(found.heads, squared_difference=4 * found.heads.squared_difference)
    other = write_run(dataclasses.replace(found, heads=heads), tmp_path / "other", is_restored=False)
    page = visit(explore(file.parent, tmp_path / "both.html", other=other, read_model=False))
    assert page.locator("h1").inner_text() == "run beside other"
    page.get_by_role("button", name="Difference").click()
    change = 100 * float(found.relative_loss[1, 1])  # four times the squares: twice the change
    label = cell(page, "L1H1").get_attribute("aria-label")
    assert re.search(r"\+([\d.]+) points", label)
    assert float(re.search(r"\+([\d.]+) points", label)[1]) == pytest.approx(change, rel=0.05)
    cell(page, "L1H1").click()
    assert "vs" in page.locator(".numbers").inner_text()
    picture(page, "difference")
    page.get_by_role("button", name="run", exact=True).click()
    assert re.search(rf"Relative change {change:.0f}\s%", cell(page, "L1H1").get_attribute("aria-label"))


def test_a_run_without_a_scan_still_opens(visit, found: Scan, tmp_path: Path) -> None:
    run = write_run(found, tmp_path / "run")
    (run / "scan.json").unlink()
    page = visit(explore(run))
    assert (
        page.locator("h1").inner_text() == "Mostly restored: 60\N{NO-BREAK SPACE}% of the lost log-likelihood recovered"
    )
    assert not page.locator("#explorer").is_visible()
    for key in ("ArrowDown", "v", "t", "]", "Enter"):
        page.keyboard.press(key)
    assert "Training" in page.locator("#more").inner_text()
