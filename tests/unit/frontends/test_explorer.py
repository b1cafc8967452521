"""The explorer's page before any browser: what is gathered, what is kept, what is refused."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.made_runs import HEADS, HOSTILE, LOSSES, write_run
from support.tiny import N_HEADS, N_LAYERS, PARAGRAPHS, build_model, save_model

import lcc_lens as lcc
from lcc_lens.analysis.head_types.head_types import head_types
from lcc_lens.analysis.lens.prompt import compare_prompt
from lcc_lens.analysis.lens.tokens import promoted_tokens
from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.frontends.explorer.page import _SCRIPTS, _STYLES, explore, render, script_json
from lcc_lens.frontends.explorer.page_data import EXAMPLE_BYTES, packed, page_data
from lcc_lens.frontends.explorer.results import results_table
from lcc_lens.frontends.explorer.texts import (
    PATTERN_BYTES,
    TEXTS_TENSORS,
    TextReading,
    TextReadings,
    affordable_tokens,
    lower_triangles,
    read_texts,
)
from lcc_lens.frontends.explorer.token_tables import TABLES_RECORD, TABLES_TENSORS, TokenTables, read_tokens
from lcc_lens.frontends.explorer.verdict import verdict
from lcc_lens.frontends.explorer.views import views
from lcc_lens.frontends.plotting.run_figures import run_figures
from lcc_lens.frontends.run_contents import RunContents
from lcc_lens.restoration.result import Restoration

PROMPT = "is 3 plus 2 more"
MODELS = ("dense", "pruned", "restored")


@pytest.fixture
def run(found: Scan, tmp_path: Path) -> Path:
    return write_run(found, tmp_path / "run")


def data_of(page: Path) -> dict:
    """The data that a page holds, as a browser reads them."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def unpacked(array: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(array["data"]), dtype=array["dtype"]).reshape(array["shape"])


def test_the_page_holds_the_scan(run: Path, found: Scan) -> None:
    (shown,) = data_of(explore(run))["runs"]
    views = {view["key"]: view for view in shown["views"]}
    np.testing.assert_array_equal(unpacked(views["changed"]["value"]), 100 * found.relative_loss.numpy())
    np.testing.assert_array_equal(unpacked(views["selector-mse"]["stderr"]), found.heads.mse_stderr.numpy())
    probe = found.scores("probe")
    np.testing.assert_allclose(unpacked(views["selector-probe"]["stderr"]), 100 * probe.stderr.numpy(), rtol=1e-6)
    share = unpacked(shown["heads"]["share"])
    np.testing.assert_allclose(share.cumsum(-1), found.components.explained_share().numpy(), rtol=1e-5)
    for example, kept in zip(shown["examples"], found.tokens, strict=True):
        assert example["pieces"] == list(kept.pieces)
        loss = (100 * kept.loss).clamp(0, 255).round().numpy()
        np.testing.assert_array_equal(unpacked(example["loss"]), loss)
    assert any(unpacked(example["loss"]).any() for example in shown["examples"])


def test_the_page_holds_what_training_found(run: Path) -> None:
    (shown,) = data_of(explore(run))["runs"]
    restored = shown["restored"]
    assert restored["heads"] == [str(head) for head in HEADS]
    np.testing.assert_array_equal(unpacked(restored["magnitudes"]), Restoration.load(run).magnitudes.numpy())
    np.testing.assert_allclose(unpacked(restored["norm"]), 0.5 * unpacked(restored["mean"]), rtol=1e-6)
    learned = unpacked(next(view for view in shown["views"] if view["key"] == "learned")["value"])
    assert sorted(map(tuple, np.argwhere(np.isfinite(learned)))) == [tuple(head) for head in HEADS]
    np.testing.assert_allclose(learned[np.isfinite(learned)], 50, rtol=1e-5)
    assert shown["training"]["step"] == [1, 2, 3, 4, 5, 6]


def test_the_page_holds_texts_in_every_model(run: Path, pair) -> None:
    (shown,) = data_of(explore(run, prompts=[PROMPT]))["runs"]
    assert shown["notes"] == []
    assert [text["title"] for text in shown["texts"]] == [PROMPT, "Example 1", "Example 2"]
    seen = compare_prompt(pair, PROMPT, restoration=Restoration.load(run))
    text = shown["texts"][0]
    assert text["models"] == ["dense", "pruned", "restored"]
    assert text["next"] == seen.next_tokens(6).to_dict("records")
    most = unpacked(text["most"])
    for name in ("norm", "difference"):
        np.testing.assert_allclose(
            unpacked(text[name]) * most / 255, getattr(seen, name).numpy(), atol=float(most.max()) / 500
        )
    queries, keys = torch.tril_indices(len(seen.pieces), len(seen.pieces))
    whole = seen.patterns[..., queries, keys].numpy()
    np.testing.assert_allclose(unpacked(text["patterns"]) / 255, whole, atol=1 / 500)
    views = {view["key"]: view for view in shown["views"]}
    changed = 100 * seen.change("restored").numpy()
    np.testing.assert_allclose(unpacked(views["text-0-restored"]["value"]), changed, rtol=1e-5)
    example = shown["texts"][1]["pieces"]
    assert example == shown["examples"][0]["pieces"][: len(example)]


def test_texts_are_read_once_and_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explore(run, prompts=[PROMPT])
    kept = (run / TEXTS_TENSORS).read_bytes()
    monkeypatch.setattr("lcc_lens.frontends.explorer.texts.load_pair", None)
    (shown,) = data_of(explore(run))["runs"]
    assert shown["texts"][0]["title"] == PROMPT
    assert (run / TEXTS_TENSORS).read_bytes() == kept
    (run / "restoration.safetensors").unlink()
    assert TextReadings.load(run) is None


def test_one_prompt_needs_no_list(run: Path) -> None:
    (shown,) = data_of(explore(run, prompts=PROMPT))["runs"]
    assert [text["title"] for text in shown["texts"] if text["kind"] == "prompt"] == [PROMPT]


def test_a_prompt_that_cannot_be_read_is_refused(run: Path) -> None:
    with pytest.raises(RequestError, match="expected a prompt with at least one token"):
        explore(run, prompts=[""])
    assert not (run / "explorer.html").exists()


def test_every_view_says_how_it_is_computed(run: Path, pair, found: Scan) -> None:
    texts = read_texts(pair, found, Restoration.load(run), [PROMPT])
    restoration = Restoration.load(run)
    names = {"lcc": lcc, "torch": torch, "scan": found, "restoration": restoration}
    names["seen"] = compare_prompt(pair, PROMPT, restoration=restoration)
    shown = views(RunContents.read(run), texts.texts)
    assert {"changed", "learned", "selector-probe", "text-0-pruned"} <= {view.key for view in shown}
    for view in shown:
        value = eval(view.code, names)
        if view.key == "learned":
            value = torch.full_like(view.value, torch.nan).index_put(
                tuple(torch.tensor(list(zip(*restoration.heads, strict=True)))), value
            )
        torch.testing.assert_close(value.float(), view.value, equal_nan=True)


def test_causes_types_and_pattern_distances_are_views(run: Path, pair, found: Scan) -> None:
    divided = scan(pair, PARAGRAPHS[:4], causes=True, selectors=(), display=0)
    dataclasses.replace(found, causes=divided.causes).save(run)
    types = head_types(pair, n_sequences=2, length=6)
    types.save(run)
    shown = {view.key: view for view in views(RunContents.read(run))}
    causes = [shown[f"cause-{cause}"] for cause in ("inherited", "pattern", "value")]
    torch.testing.assert_close(sum(view.value for view in causes), torch.full((3, 5), 100.0), atol=0.01, rtol=0)
    names = {"lcc": lcc, "scan": Scan.load(run)}
    for key in ("cause-pattern", "induction-dense", "induction-pruned", "total_variation-pruned"):
        torch.testing.assert_close(eval(shown[key].code, names), shown[key].value)
    assert "total_variation-dense" not in shown
    other = dataclasses.replace(types, record=dataclasses.replace(types.record, pruned_sha256="0" * 64))
    other.save(run)
    with pytest.raises(RequestError, match="got a scan and a table of head types of different weights"):
        RunContents.read(run)


def test_types_say_how_many_texts_they_are_of(run: Path, pair) -> None:
    head_types(pair, data=PARAGRAPHS[:3], n_sequences=2, length=6).save(run)
    shown = {view.key: view for view in views(RunContents.read(run))}
    assert shown["total_variation-pruned"].n_examples == 3
    assert shown["induction-pruned"].n_examples == 2


def test_types_of_another_restoration_are_refused(run: Path, pair) -> None:
    restoration = Restoration.load(run)
    head_types(pair, restoration, n_sequences=2, length=6).save(run)
    assert "induction-restored" in {view.key for view in views(RunContents.read(run))}
    dataclasses.replace(restoration, constants=2 * restoration.constants).save(run)
    for reads in (RunContents.read, run_figures):
        with pytest.raises(RequestError, match="of the restoration beside it, got another one's; compute head types"):
            reads(run)
    head_types(pair, n_sequences=2, length=6).save(run)  # of no restoration: it fits every one
    assert "induction-restored" not in {view.key for view in views(RunContents.read(run))}


@pytest.mark.parametrize(("heads", "n_tokens"), [(30 * 9, 60), (3 * 5, 64), (80 * 64, 13), (200 * 200, 12)])
def test_large_models_are_read_on_shorter_texts(heads: int, n_tokens: int) -> None:
    budget = PATTERN_BYTES / (2 * 2 * heads)  # two texts in two models
    assert affordable_tokens(budget) == n_tokens
    assert n_tokens == 12 or n_tokens * (n_tokens + 1) / 2 <= budget
    assert lower_triangles(torch.tensor([[1.0, 0.0], [0.25, 0.75]])).tolist() == [255, 64, 191]


def test_a_page_of_thirty_layers_is_small(run: Path, found: Scan) -> None:
    """As SmolLM2's: 30 layers of 9 heads, two examples in three models."""
    n, shape = 49, (30, 9)
    loud = torch.randint(0, 256, (3, *shape, n * (n + 1) // 2), dtype=torch.uint8)
    text = TextReading("Example 1", "example", ("a",) * n, MODELS, (), *[torch.rand(3, n, *shape)] * 2, loud)
    readings = TextReadings((text, text), ())
    shown = page_data(RunContents.read(run), None, None)
    larger = page_data(RunContents.read(run), None, None, texts=readings)
    assert len(render([larger])) - len(render([shown])) < 3_200_000


def test_the_verdict_in_words_and_numbers(run: Path, found: Scan) -> None:
    said = verdict(RunContents.read(run))
    assert said.headline == "Mostly restored: 60\N{NO-BREAK SPACE}% of the lost log-likelihood recovered"
    figures = {figure["name"]: figure["value"] for figure in said.figures}
    assert figures["recovered"] == "60 %"
    worst = Head(*divmod(int(found.relative_loss.argmax()), N_HEADS))
    assert str(worst) in said.sentences[0]
    constant = found.heads.n_samples * found.mean_difference.square().sum() / found.heads.squared_difference.sum()
    assert figures["constant share"] == f"{100 * float(constant):.0f} %"
    assert all(f"{value:.3f}" in said.sentences[1] for value in LOSSES.values())


@pytest.mark.parametrize(
    ("restored", "words"),
    [
        (1.5, "Better than the dense model: 150"),
        (2.05, "Almost fully restored: 95"),
        (2.8, "Partly restored: 20"),
        (2.95, "Barely restored: 5"),
        (3.5, "made it worse"),
    ],
)
def test_the_headline_follows_the_share(run: Path, restored: float, words: str) -> None:
    contents = dataclasses.replace(RunContents.read(run), losses={**LOSSES, "restored": restored})
    assert words in verdict(contents).headline
    assert ("which is not restoring" in verdict(contents).sentences[1]) == (restored < LOSSES["dense"])


def test_removed_heads_are_blank_and_do_not_count(found: Scan, tmp_path: Path) -> None:
    worst = Head(*divmod(int(found.relative_loss.argmax()), N_HEADS))
    removed = tuple((worst.head,) if layer == worst.layer else () for layer in range(N_LAYERS))
    heads = (tuple(range(N_HEADS)),) * N_LAYERS
    scan = dataclasses.replace(
        found, record=dataclasses.replace(found.record, dense_heads=heads, removed_heads=removed)
    )
    (shown,) = data_of(explore(write_run(scan, tmp_path / "run")))["runs"]
    assert shown["heads"]["removed"] == [str(worst)]
    assert np.isnan(unpacked(shown["views"][0]["value"])[worst])
    assert shown["verdict"]["figures"][1]["head"] != str(worst)


def test_a_page_is_the_same_every_time_and_small(run: Path, tmp_path: Path) -> None:
    first, second = explore(run), explore(run, tmp_path / "again.html")
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 15_000_000
    assert not re.search(r"(src|href)=.https?:", first.read_text())


def test_examples_beyond_the_budget_are_left_out(found: Scan, run: Path) -> None:
    long = dataclasses.replace(found.tokens[0], pieces=("a",) * 150_000, loss=torch.ones(150_000, N_LAYERS, N_HEADS))
    contents = dataclasses.replace(RunContents.read(run), scan=dataclasses.replace(found, tokens=(long, long, long)))
    shown = page_data(contents, None, None)
    assert len(shown["examples"]) == 1
    assert long.loss.numel() < EXAMPLE_BYTES
    assert "1 of 3 examples" in shown["notes"][0]


def test_too_large_a_page_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcc_lens.frontends.explorer.page.MOST_BYTES", 10_000)
    with pytest.raises(RequestError, match="expected a page of at most 0 MB, got"):
        explore(run)
    assert not (run / "explorer.html").exists()


def test_hostile_text_stays_text(found: Scan, tmp_path: Path) -> None:
    page = explore(write_run(found, tmp_path / "run", is_hostile=True))
    (shown,) = data_of(page)["runs"]
    assert shown["examples"][0]["pieces"][0] == HOSTILE
    assert HOSTILE in shown["tokens"]["texts"]
    assert "<img" not in page.read_text()


def test_script_json_survives_every_text() -> None:
    texts = ["</script>", "<!--", "\u2028", "&amp;", "é", "\x00", "\r\n"]
    assert json.loads(script_json(texts)) == texts
    assert not set("<>&\u2028") & set(script_json(texts))
    assert json.loads(script_json(["\ud83d"])) == ["?"]


def test_the_policy_names_exactly_the_scripts(run: Path) -> None:
    import hashlib

    text = explore(run).read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'")
    for inline in re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", text, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy[1]


def test_every_asset_is_inlined_once() -> None:
    from importlib.resources import files

    names = [item.name for item in (files("lcc_lens.frontends.explorer") / "assets").iterdir()]
    assert sorted(names) == sorted((*_STYLES, *_SCRIPTS, "boot.js", "page.html"))


def test_packed_arrays_come_back() -> None:
    values = torch.tensor([[0.0, 1.5, -2.25], [float("inf"), 3e8, 1e-9]])
    np.testing.assert_array_equal(unpacked(packed(values)), values.numpy())
    assert unpacked(packed(torch.tensor([0, 255]), "uint8")).tolist() == [0, 255]


def test_tokens_are_those_that_the_lens_reads(pair, found: Scan, run: Path) -> None:
    tables = read_tokens(pair.pruned, pair.tokenizer, found, Restoration.load(run))
    assert tables.vectors == ("1", "2", "3", "4", "mean", "learned")
    for head, name, vector in [(Head(1, 3), "2", None), (Head(2, 1), "learned", 0.5 * found.mean_difference[2, 1])]:
        if vector is None:
            vector = found.components.coefficients[head][1] * found.components.directions[head][1]
        said = promoted_tokens(pair.pruned, pair.tokenizer, head, vector, k=8)
        place = tables.vectors.index(name)
        assert tables.tokens[head][place].flatten().tolist() == [token.token for token in said.tokens]
        expected = torch.tensor([token.logit for token in said.tokens])
        torch.testing.assert_close(tables.logits[head][place].flatten(), expected)
        assert [tables.texts[token.token] for token in said.tokens] == [token.text for token in said.tokens]
    assert (tables.tokens[0, 0, tables.vectors.index("learned")] == -1).all()


def test_tokens_are_read_once_and_kept(found: Scan, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / TABLES_RECORD).unlink()
    explore(run)
    kept = (run / TABLES_TENSORS).read_bytes()
    monkeypatch.setattr("lcc_lens.frontends.explorer.token_tables.load_hooked", None)
    (shown,) = data_of(explore(run))["runs"]
    assert shown["tokens"]["vectors"][-1] == "learned"
    assert shown["notes"] == []
    assert (run / TABLES_TENSORS).read_bytes() == kept
    index = unpacked(shown["tokens"]["index"])
    tables = TokenTables.load(run)
    assert tables is not None
    assert shown["tokens"]["texts"][index[0, 4, 0, 0, 0]] == tables.texts[int(tables.tokens[0, 4, 0, 0, 0])]


def test_tables_of_another_scan_do_not_count(found: Scan, run: Path) -> None:
    assert TokenTables.load(run) is not None
    dataclasses.replace(found, tokens=()).save(run)
    assert TokenTables.load(run) is None


@pytest.mark.parametrize("damage", ["restoration.safetensors", TABLES_TENSORS, TABLES_RECORD])
def test_tables_do_not_outlive_a_change(run: Path, damage: str) -> None:
    assert TokenTables.load(run) is not None
    (run / damage).write_bytes((run / damage).read_bytes()[:-3] + b"xyz")
    assert TokenTables.load(run) is None


def test_without_the_model_the_page_says_so(found: Scan, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = dataclasses.replace(found, record=dataclasses.replace(found.record, pruned=str(tmp_path / "gone")))
    run = write_run(gone, tmp_path / "far" / "away" / "run")  # from the pruned model
    (run / TABLES_RECORD).unlink()
    with caplog.at_level(logging.WARNING):
        (shown,) = data_of(explore(run))["runs"]
    assert shown["tokens"] is None
    assert "could not be computed" in shown["notes"][0]
    assert "the page shows no tokens" in caplog.text
    assert not (run / TABLES_RECORD).exists()


def test_changed_weights_are_not_read(found: Scan, tmp_path: Path) -> None:
    other = save_model(build_model(seed=5), tmp_path / "other")
    changed = dataclasses.replace(found, record=dataclasses.replace(found.record, pruned=str(other)))
    run = write_run(changed, tmp_path / "far" / "away" / "run")
    (run / TABLES_RECORD).unlink()
    (shown,) = data_of(explore(run))["runs"]
    assert "got none with these weights" in shown["notes"][0]


def test_the_model_is_not_loaded_unasked(run: Path) -> None:
    (run / TABLES_RECORD).unlink()
    (shown,) = data_of(explore(run, read_model=False))["runs"]
    assert "were not computed" in shown["notes"][0]


def test_prompts_that_cannot_be_read_are_refused(run: Path) -> None:
    with pytest.raises(RequestError, match=r"expected prompts that were read before .*without --no-tokens"):
        explore(run, prompts=("quokka",), read_model=False)
    (run / "scan.json").unlink()
    with pytest.raises(RequestError, match=r"expected a scan in .* to read prompts with"):
        explore(run, prompts=("quokka",))
    assert not (run / "explorer.html").exists()


def test_the_documentation_is_there_or_has_an_address(run: Path, tmp_path: Path) -> None:
    for docs, link in ((str(tmp_path), tmp_path.as_uri()), ("https://a.org/docs", "https://a.org/docs")):
        assert data_of(explore(run, docs=docs, read_model=False))["docs"] == link
    with pytest.raises(RequestError, match=r"expected an address .* got /nope, which is not there"):
        explore(run, docs="/nope", read_model=False)


def test_a_run_without_a_scan_or_a_restoration_shows_the_rest(run: Path, found: Scan, tmp_path: Path) -> None:
    (shown,) = data_of(explore(write_run(found, tmp_path / "scanned", is_restored=False)))["runs"]
    assert shown["restored"] is shown["training"] is None
    assert "Nothing has been restored" in shown["verdict"]["sentences"][1]
    (run / "scan.json").unlink()
    (shown,) = data_of(explore(run))["runs"]
    assert shown["heads"] is None
    assert "holds no scan" in shown["notes"][0]
    assert shown["verdict"]["headline"] == "Mostly restored: 60\N{NO-BREAK SPACE}% of the lost log-likelihood recovered"


def test_two_runs_on_one_page(run: Path, found: Scan, tmp_path: Path) -> None:
    other = write_run(found, tmp_path / "other", is_restored=False)
    page = explore(run, tmp_path / "both.html", other=other)
    assert [shown["name"] for shown in data_of(page)["runs"]] == ["run", "other"]
    assert '<h1 id="headline">run beside other</h1>' in page.read_text()


def test_results_become_a_table(run: Path, tmp_path: Path) -> None:
    tasks = {"wikitext": {"perplexity": 12.5}, "boolq": {"acc": 0.5, "stderr": 0.05, "n": 90}}
    results = {"models": {"dense": {"tasks": tasks}, HOSTILE: {"tasks": {"wikitext": {"perplexity": 19.0}}}}}
    (tmp_path / "results.json").write_text(json.dumps({**results, "share_recovered": {"wikitext": 0.4, "boolq": None}}))
    page = explore(run, results=tmp_path / "results.json")
    shown = data_of(page)["results"]
    assert shown["columns"] == ["wikitext: perplexity", "boolq: accuracy (n = 90)"]
    assert [row["cells"] for row in shown["rows"]] == [["12.50", "50.0 ± 5.0 %"], ["19.00", ""]]
    assert shown["recovered"] == ["40 % on wikitext"]
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(RequestError, match=r"got another layout .*; evaluate again"):
        results_table(tmp_path / "results.json")


def test_an_empty_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"expected a run with a scan or a restoration in .*, got neither"):
        explore(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_files_of_different_weights_are_refused(run: Path, found: Scan) -> None:
    dataclasses.replace(found, record=dataclasses.replace(found.record, pruned_sha256="0" * 64)).save(run)
    with pytest.raises(RequestError, match="got a scan and a restoration of different weights"):
        explore(run)


def test_metrics_of_different_weights_are_refused(run: Path) -> None:
    (run / "metrics.json").write_text('{"dense_sha256": "0", "pruned_sha256": "0"}')
    with pytest.raises(RequestError, match="got a scan and a metrics of different weights"):
        explore(run)


def test_a_damaged_log_is_refused(run: Path) -> None:
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')
    with pytest.raises(RequestError, match="expected JSON in line 7 of"):
        explore(run)


def test_a_folder_is_no_page(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"expected a file to write, got the folder .*; name a file"):
        explore(run, tmp_path)
    (tmp_path / "notes.html").write_text("mine")
    with pytest.raises(RequestError, match="an earlier output of this command"):
        explore(run, tmp_path / "notes.html")
    with pytest.raises(RequestError, match=r"expected a file ending in \.html to write the page to, got .*x\.txt"):
        explore(run, tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_sha256": "0" * 64}, "expected two runs of one dense model"),
        ({"dense_heads": ((1, 0, 2, 3, 4),) * N_LAYERS, "removed_heads": ((),) * N_LAYERS}, "got different heads"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(
    run: Path, found: Scan, tmp_path: Path, changes: dict, message: str
) -> None:
    other = dataclasses.replace(found, record=dataclasses.replace(found.record, **changes))
    write_run(other, tmp_path / "other", is_restored=False)
    with pytest.raises(RequestError, match=message):
        explore(run, other=tmp_path / "other")


def test_comparing_needs_two_scans(run: Path, found: Scan, tmp_path: Path) -> None:
    other = write_run(found, tmp_path / "other")
    (other / "scan.json").unlink()
    with pytest.raises(RequestError, match="to compare heads, got none"):
        explore(run, other=other)


def test_render_takes_dollar_signs_as_they_are(run: Path) -> None:
    shown = page_data(RunContents.read(run), None, None)
    shown["verdict"]["headline"] = "$data ${policy} $$"
    assert '<h1 id="headline">$data ${policy} $$</h1>' in render([shown])
