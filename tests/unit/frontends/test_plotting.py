"""Figures show the right numbers, say how many and which seeds, and are of what their files say."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from support.places import ROOT
from support.tiny import PARAGRAPHS

from lcc_lens.analysis.causes.upstream import trace_upstream
from lcc_lens.analysis.head_types.head_types import head_types
from lcc_lens.analysis.head_types.result import HeadTypes
from lcc_lens.analysis.lens.gain import LogitGain
from lcc_lens.analysis.lens.prompt import compare_prompt
from lcc_lens.analysis.lens.saved import load_lens, save_lens
from lcc_lens.analysis.lens.tokens import PromotedTokens, TokenScore
from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.heads import Head
from lcc_lens.core.outputs.folders import MARK
from lcc_lens.frontends.cli.show import show_drawn
from lcc_lens.frontends.plotting.causes import (
    plot_cause_study,
    plot_causes,
    plot_head_types,
    plot_recovered,
    plot_upstream,
)
from lcc_lens.frontends.plotting.comparisons import plot_comparison, plot_inference_cost, plot_tasks
from lcc_lens.frontends.plotting.components import plot_logit_gain, plot_promoted_tokens, plot_spectra
from lcc_lens.frontends.plotting.domains import plot_domains
from lcc_lens.frontends.plotting.head_maps import plot_loss_map, plot_selectors
from lcc_lens.frontends.plotting.labels import entry_kind, entry_label
from lcc_lens.frontends.plotting.prompts import plot_attention, plot_prompt
from lcc_lens.frontends.plotting.recoveries import (
    Recovery,
    domain_points,
    plot_recovery,
    recovery_by_selector,
    recovery_points,
)
from lcc_lens.frontends.plotting.reports import plot_report
from lcc_lens.frontends.plotting.run_figures import Drawn, draw_figures, run_figures
from lcc_lens.frontends.plotting.studies import plot_selector_study
from lcc_lens.frontends.plotting.theme import COLORS, label_places, styled, with_source
from lcc_lens.frontends.plotting.training import plot_training
from lcc_lens.frontends.plotting.writing import drawn_from, figure_json, figure_sha256, write_image, write_images
from lcc_lens.prompting.rewriting.rewriter import Rewriter
from lcc_lens.prompting.study import PromptStudy
from lcc_lens.restoration.injections.constants import MeanShift
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.training.config import Step

PNG = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    for kind, body in ((b"IHDR", bytes(13)), (b"IDAT", b"pixels"), (b"IEND", b""))
)


def measured(log_perplexity: float, kl: float, right: list[int] | None = None) -> dict[str, Any]:
    blocks = [log_perplexity - 0.1, log_perplexity, log_perplexity + 0.1]
    cell = {
        "perplexity": 2.718**log_perplexity, "log_perplexity": log_perplexity, "kl": kl, "response_loss": 2 + kl,
        "texts": {"wikitext": {"perplexity": 2.718**log_perplexity, "losses": blocks}}, "tasks": {},
    }  # fmt: skip
    if right is not None:
        cell["tasks"] = {"arc_easy": {"acc": sum(right) / len(right), "stderr": 0.1, "n": len(right), "items": right}}
    return cell


@pytest.fixture
def comparison() -> dict[str, Any]:
    trained = {"n_trained": 5, "zeros_kept": 1.0, "learning_rates": [0.03], "n_added": 5}
    cells = {
        f"{entry} | {seed}": {**measured(loss + seed / 100, kl + seed / 100, right), **trained, **changes}
        for entry, loss, kl, right, changes in (
            ("lcc", 3.8, 0.7, [1, 1, 0, 1], {}),
            ("lcc=1e-2", 3.9, 0.8, [1, 0, 0, 1], {"learning_rates": [0.01]}),
            ("lora", 3.7, 0.6, [1, 1, 1, 0], {"zeros_kept": 0.7}),
            ("lcc@dense", 2.9, 0.2, [1, 1, 1, 1], {}),
        )
        for seed in (0, 1)
    }
    ratio = {"median": 1.0, "low": 0.9, "high": 1.1, "coverage": 0.95}
    return {
        "cells": cells,
        "bare": {"dense": measured(3.0, 0.0, [1, 1, 1, 1]), "pruned": measured(4.0, 0.9, [0, 0, 0, 1])},
        "settings": {"examples": 480, "data": "alpaca", "blocks": 3, "block_length": 512, "texts": ["wikitext"],
                     "responses": 9, "heads": 0.25},
        "inference": {
            "biases": {"decode_ratio": ratio}, "lora": {"decode_ratio": {**ratio, "median": 1.4, "high": 1.5}},
        },
    }  # fmt: skip


def text_of(figure: go.Figure) -> str:
    return figure.layout.title.text.replace("<br>", " ")


def points_of(figure: go.Figure, name: str, axis: str = "x") -> list[float]:
    return [x for trace in figure.data if trace.name == name and trace.xaxis == axis for x in trace.x]


def test_title_and_caption_are_escaped_and_wrapped() -> None:
    figure = styled(go.Figure(), "<img src=x>", "word " * 60, width=420, plot_height=100)
    assert "&lt;img" in figure.layout.title.text
    lines = figure.layout.title.text.split("<br>")
    assert len(lines) > 3
    assert figure.layout.height == figure.layout.margin.t + 100 + figure.layout.margin.b


def test_labels_of_close_points_stand_apart() -> None:
    near = [0.5, 0.505, 0.51, 0.515]
    places = label_places(near, near, ["steps"] * 4, width=300, height=300)
    assert len(set(places)) == 4
    assert label_places([0.1, 0.9], [0.1, 0.9], ["a", "b"], width=300, height=300) == ["top center"] * 2


def test_selectors_stand_beside_the_gold_standard(found: Scan) -> None:
    gold = dataclasses.replace(found.scores("random", seed=3), selector="patching")
    scan = found.with_scores([gold])
    figure = plot_selectors(scan, ["mse", "patching", "random"])
    titles = [annotation.text for annotation in figure.layout.annotations]
    correlation = gold.rank_correlation(scan.scores("random"))
    assert titles[0] == "activation patching"
    assert f"random ({correlation:.2f})" in titles
    ranks = torch.tensor(figure.data[0].z)
    assert ranks.min() == 0
    assert ranks.max() == 100
    assert divmod(int(ranks.argmax()), 5) == divmod(int(gold.value.argmax()), 5)
    assert "seed 0" in text_of(figure)
    with pytest.raises(RequestError, match="expected at least one selector to draw"):
        plot_selectors(scan, [])


def test_equal_scores_share_a_rank(found: Scan) -> None:
    equal = dataclasses.replace(found.scores("random"), value=torch.ones(3, 5))
    figure = plot_selectors(found.with_scores([dataclasses.replace(equal, selector="kl")]), ["kl"])
    assert {value for row in figure.data[0].z for value in row} == {50.0}


def test_spectra_are_the_singular_values_and_end_at_everything(found: Scan) -> None:
    figure = plot_spectra(found, [Head(1, 2)])
    line = [trace for trace in figure.data if trace.name == "L1H2"]
    expected = found.components.singular_values[1, 2] / found.components.n_samples**0.5
    assert list(line[0].y) == pytest.approx(expected.tolist(), rel=1e-4)
    assert line[1].y[-1] == pytest.approx(100)
    assert f"{found.record.n_examples} sequences, seed 0" in text_of(figure)
    with pytest.raises(RequestError, match="expected at most 4 heads"):
        plot_spectra(found, [Head(0, h) for h in range(5)])


@pytest.fixture
def gain() -> LogitGain:
    return LogitGain(Head(1, 2), torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.zeros(2), False)


@pytest.fixture
def promoted() -> PromotedTokens:
    tokens = (TokenScore("promoted", 5, " <b>yes\n", 2.5), TokenScore("suppressed", 6, "no", -1.25))
    return PromotedTokens(Head(1, 2), "alone", tokens)


def test_logit_gain_has_intervals_and_counts(gain: LogitGain) -> None:
    figure = plot_logit_gain(gain)
    assert list(figure.data[0].y) == [2.0, 0.0]
    assert figure.data[0].error_y.array[0] == pytest.approx(1.96 * gain.stderr[0].item(), rel=1e-4)
    assert "over 2 examples" in text_of(figure)
    with pytest.raises(RequestError, match="all cumulative or none"):
        plot_logit_gain([gain, dataclasses.replace(gain, is_cumulative=True)])


def test_tokens_are_readable_and_escaped(promoted: PromotedTokens) -> None:
    values = plot_promoted_tokens(promoted).data[0].cells["values"]
    assert values[0] == ("␣&lt;b&gt;yes\\n",) or list(values[0]) == ["␣&lt;b&gt;yes\\n"]
    assert list(values[1]) == ["+2.50"]
    assert list(values[3]) == ["-1.25"]


def test_lens_is_read_as_it_was_saved(tmp_path: Path, gain: LogitGain, promoted: PromotedTokens) -> None:
    with pytest.raises(RequestError, match="make it with save_lens"):
        load_lens(tmp_path)
    save_lens(tmp_path, gains=[gain], promoted=[promoted])
    gains, tokens = load_lens(tmp_path)
    assert tokens == [promoted]
    assert torch.equal(gains[0].gains, gain.gains)
    assert (gains[0].head, gains[0].is_cumulative) == (gain.head, False)


def test_a_legend_of_long_names_has_a_row_for_each() -> None:
    def top(names: tuple[str, str]) -> float:
        points = [Recovery(name, x, 0.5, None, 1) for name in names for x in (1.0, 60.0)]
        return float(plot_recovery(points, "minutes").layout.margin.t)

    assert top(("a name too long for two columns", "another one as long as that")) == top(("a", "b")) + 18


@pytest.mark.parametrize(
    ("load", "command"),
    [
        (Scan.load, "lcc-lens scan"), (Restoration.load, "lcc-lens restore"), (HeadTypes.load, "HeadTypes.save"),
        (PromptStudy.load, "lcc-lens prompts"), (Rewriter.load, "lcc-lens rewrite fit"),
    ],
)  # fmt: skip
def test_a_result_that_is_not_there_names_what_makes_it(
    load: Callable[[Path], object], command: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=f"got none; make it with {command}"):
        load(tmp_path)


def test_lens_of_other_weights_than_the_scan_is_refused(found: Scan, tmp_path: Path, promoted: PromotedTokens) -> None:
    found.save(tmp_path)
    save_lens(tmp_path, promoted=[promoted])
    assert load_lens(tmp_path)[1] == [promoted]
    assert "promoted_tokens" in run_figures(tmp_path)[0]
    other = dataclasses.replace(found, record=dataclasses.replace(found.record, pruned_sha256="0" * 64))
    other.save(tmp_path)
    with pytest.raises(RequestError, match="of the models of the scan beside it, got other weights"):
        run_figures(tmp_path)


@pytest.mark.parametrize(
    ("entry", "label", "kind"),
    [
        ("lcc", "LCC", "restored"),
        ("refit", "refit, untrained", "restored"),
        ("refit+low-rank:3*distillation+lm=5e-3", "best-low-rank (refit, masked low rank)", "restored"),
        ("refit+all-weights:3*distillation+lm=3e-4", "best (refit, surviving weights and norms)", "restored"),
        ("refit+low-rank+lcc:distillation", "refit, masked low rank + LCC; distillation", "restored"),
        ("lora-vo=1e-3", "LoRA (v, o); rate 1e-3", "baseline"),
        ("lcc@dense", "LCC, on the dense model", "control"),
        ("mean-shift", "mean shift, untrained", "control"),
        ("mean-shift-sequential", "mean shift, layer by layer", "control"),
        ("perp-lora=tuned", "PERP (masked LoRA); tuned rate", "baseline"),
    ],
)
def test_lines_of_a_comparison_in_words(entry: str, label: str, kind: str) -> None:
    assert entry_label(entry) == label
    assert entry_kind(entry) == kind


def test_comparison_lies_between_dense_and_pruned(comparison: dict[str, Any]) -> None:
    figure = plot_comparison(comparison)
    assert list(figure.layout.yaxis.ticktext) == ["LCC", "LCC; rate 1e-2", "LoRA", "LCC, on the dense model"]
    assert points_of(figure, "restored") == pytest.approx([19.5, 9.5])  # log-perplexities 3.805 and 3.905 of 3 to 4
    assert points_of(figure, "baseline") == pytest.approx([29.5])
    assert points_of(figure, "control") == []
    assert points_of(figure, "control", "x2") == pytest.approx([0.205])
    assert set(points_of(figure, "dense")) == {100.0}
    assert set(points_of(figure, "pruned", "x2")) == {0.9}
    assert {trace.line.color for trace in figure.data if trace.name == "dense"} == {COLORS["dense"]}
    assert "2 seeds each" in text_of(figure)
    assert "480 alpaca examples" in text_of(figure)
    spread = next(trace for trace in figure.data if trace.name == "baseline" and trace.xaxis == "x2").error_x.array
    assert spread[0] == pytest.approx(12.706 * 0.01 / 2**0.5 / 2**0.5, rel=1e-3)  # t of one degree of freedom
    with pytest.raises(RequestError, match="expected a comparison with finished runs"):
        plot_comparison({**comparison, "cells": {"lcc | 0": {"error": "no"}}})


def with_python(comparison: dict[str, Any]) -> dict[str, Any]:
    """The same with code, a second kind of text, on which every entry is worse than the pruned model."""

    def measured(model: dict[str, Any], loss: float) -> dict[str, Any]:
        return {**model, "texts": {**model["texts"], "python": {"perplexity": 2.718**loss, "losses": [loss] * 3}}}

    bare = {name: measured(comparison["bare"][name], loss) for name, loss in (("dense", 1.0), ("pruned", 2.0))}
    cells = {name: measured(cell, 2.1) for name, cell in comparison["cells"].items()}
    settings = {**comparison["settings"], "texts": ["wikitext", "python"], "data": "python"}
    return {**comparison, "bare": bare, "cells": cells, "settings": settings}


def test_every_kind_of_text_has_a_column_and_new_kinds_a_star(comparison: dict[str, Any]) -> None:
    figure = plot_domains(with_python(comparison))
    drawn = figure.data[0]
    assert list(drawn.x) == ["<b>mean</b>", "<b>worst</b>", "wikitext *", "python"]
    assert list(drawn.y) == ["LCC; rate 1e-2", "LCC", "LoRA"]  # the best on top; the dense model's control is left out
    assert list(drawn.z[-1]) == pytest.approx([9.75, -10.0, 29.5, -10.0], abs=0.1)
    with pytest.raises(RequestError, match="expected a comparison that measured several kinds of text, got none"):
        plot_domains(comparison)


def test_mean_and_worst_kind_of_text_by_training_tokens(comparison: dict[str, Any]) -> None:
    more = with_python(comparison)
    more["settings"]["max_length"] = 256
    fewer = {**more, "settings": {**more["settings"], "examples": 120}}
    more["cells"]["lora:lm | 0"] = {"error": "no"}  # a run that failed is no point
    points = domain_points([more, fewer], {"lcc": "constants", "lora": "LoRA"})
    series = {"constants, mean", "constants, worst kind", "LoRA, mean", "LoRA, worst kind"}
    assert {point.series for point in points} == series
    mine = {point.x: point.share for point in points if point.series == "constants, mean"}
    assert sorted(mine) == [30.72, 122.88]
    figure = plot_recovery(points, "tokens")
    assert figure.layout.xaxis.title.text == "training tokens (thousands)"
    assert list(next(trace for trace in figure.data if trace.name == "LoRA, worst kind").y) == pytest.approx([-10, -10])


def test_tasks_show_the_gain_on_the_same_items(comparison: dict[str, Any]) -> None:
    figure = plot_tasks(comparison)
    assert points_of(figure, "restored")[0] == pytest.approx(75.0)
    assert set(points_of(figure, "pruned")) == {25.0}
    trace = next(trace for trace in figure.data if trace.name == "restored")
    assert trace.error_x.arrayminus[0] > 0
    for cell in [*comparison["cells"].values(), *comparison["bare"].values()]:
        cell["tasks"] = {}
    with pytest.raises(RequestError, match="compare with --tasks"):
        plot_tasks(comparison)


def test_inference_cost_tells_destroyed_zeros_apart(comparison: dict[str, Any]) -> None:
    figure = plot_inference_cost(comparison)
    looks = {trace.name: trace.marker.symbol for trace in figure.data}
    assert looks == {"restored, zeros kept": "circle", "baseline, merging destroys zeros": "square-open"}
    assert [a.text for a in figure.layout.annotations] == ["LoRA", "LCC"]
    with pytest.raises(RequestError, match="inference times"):
        plot_inference_cost({**comparison, "inference": {}})


def test_recovery_along_what_was_varied(comparison: dict[str, Any]) -> None:
    points = recovery_points([comparison], "learning rate")
    figure = plot_recovery(points, "learning rate")
    assert [trace.name for trace in figure.data] == ["LCC"]
    assert list(figure.data[0].x) == [0.01, 0.03]
    assert list(figure.data[0].y) == pytest.approx([9.5, 19.5])
    fewer = json.loads(json.dumps(comparison))
    fewer["settings"]["examples"] = 120
    figure = plot_recovery(recovery_points([comparison, fewer], "examples"), "examples")
    assert list(figure.data[0].x) == [120, 480]
    with pytest.raises(RequestError, match="several --heads"):
        plot_recovery(recovery_points([comparison], "heads"), "heads")


def test_cause_study_shows_layers_and_what_restorations_leave() -> None:
    def part(inherited: float) -> dict[str, Any]:
        fractions = {"inherited": inherited, "pattern": 0.1, "value": 0.9 - inherited}
        return {
            "samples": 40,
            "mean_over_heads": fractions,
            "by_layer": {name: [f, f] for name, f in fractions.items()},
        }

    recovered = {"constants": {"by_cause": {"inherited": 0.6, "pattern": 0.1, "value": 0.1, "constant": -0.05}}}
    study = {"parts": {"Wanda 50 %": [part(0.4), part(0.6)]}, "recovered": recovered}
    figure = plot_cause_study(study)
    drawn = {(trace.name, trace.xaxis): trace for trace in figure.data}
    assert list(drawn["inherited", "x"].y) == pytest.approx([50, 50])  # over seeds
    assert list(drawn["own values", "x"].x) == [0, 1]
    assert list(drawn["inherited", "x2"].y) == pytest.approx([40, 60])
    assert list(drawn["its own constant", "x2"].y) == pytest.approx([0, -5])
    assert list(drawn["own pattern", "x2"].x) == ["pruned", "constants"]


def test_selector_study_takes_its_own_summary() -> None:
    study = json.loads((ROOT / "benchmarks" / "selector_study.json").read_text())
    figure = plot_selector_study(study, "10%")
    probe = study["summary"]["wanda 50%"]["recovery"]["10%"]["probe"]["recovered"]["mean"]
    assert 100 * probe in [pytest.approx(x, rel=1e-4) for x in points_of(figure, "wanda 50%", "x2")]
    assert "3 seeds" in text_of(figure)
    points = recovery_by_selector(study, "wanda 50%")
    assert {point.x for point in points} == {0.1, 0.25}
    with pytest.raises(RequestError, match="expected one of the shares"):
        plot_selector_study(study, "50%")


def test_report_without_times_has_zeros_and_sizes() -> None:
    report = json.loads((ROOT / "benchmarks" / "report.json").read_text())
    figure = plot_report(report)
    assert "15 interleaved rounds" in text_of(figure)
    assert points_of(figure, "as stored", "x3")[3] == pytest.approx(
        report["ratios"]["slim20"]["prefill"]["median"], rel=1e-4
    )
    assert len({trace.xaxis for trace in plot_report({**report, "ratios": {}}).data}) == 2


def test_run_draws_what_it_has_and_names_what_makes_the_rest(found: Scan, tmp_path: Path) -> None:
    found.save(tmp_path / "run")
    drawn = draw_figures(tmp_path / "run", tmp_path / "out", formats=["html"])
    assert {path.name for path in drawn.files} == {"loss_map.html", "selectors.html", "spectra.html"}
    assert drawn.lacking["comparison"].endswith("make it with lcc-lens compare")
    assert "lcc-lens restore" in drawn.lacking["training"]
    assert "save_lens" in drawn.lacking["logit_gain"]
    page = (tmp_path / "out" / "loss_map.html").read_text()
    assert 'src="plotly.min.js"' in page
    assert (tmp_path / "out" / "plotly.min.js").stat().st_size > 1_000_000
    assert len(page) < 100_000
    with pytest.raises(RequestError, match="expected a run with data for a figure"):
        draw_figures(tmp_path / "none", tmp_path / "out")
    with pytest.raises(RequestError, match="expected formats among html, png, svg, pdf, got none"):
        draw_figures(tmp_path / "run", tmp_path / "out", formats=[])


def test_figures_replace_figures_alone(found: Scan, tmp_path: Path) -> None:
    found.save(tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()
    (out / "spectra.html").write_text("mine")
    with pytest.raises(RequestError, match=r"got another spectra\.html in .*out; name another folder"):
        draw_figures(tmp_path / "run", out, formats=["html"])
    assert [path.name for path in out.iterdir()] == ["spectra.html"]
    (out / "spectra.html").rename(out / "mine.html")
    for _ in range(2):
        draw_figures(tmp_path / "run", out, formats=["html"])
    assert (out / "mine.html").read_text() == "mine"


def test_run_with_everything_lacks_nothing_but_variation(
    pair, found: Scan, tmp_path: Path, comparison: dict[str, Any], gain: LogitGain, promoted: PromotedTokens
) -> None:
    from lcc_lens.core.files import write_json
    from lcc_lens.restoration.record import RestorationRecord
    from lcc_lens.restoration.result import Restoration

    divided = scan(pair, PARAGRAPHS[:4], causes=True, selectors=(), display=0)
    dataclasses.replace(found, causes=divided.causes).save(tmp_path)
    head_types(pair, n_sequences=2, length=6).save(tmp_path)
    losses = {"dense": 1.0, "pruned": 2.0}
    ids = pair.dense_id.sha256, pair.pruned_id.sha256
    record = RestorationRecord("d", "p", *ids, "lcc", "alpaca", 7, 4, losses=losses)
    restoration = Restoration(record, (Head(0, 1),), *(found.mean_difference[0, :1].clone() for _ in range(3)))
    restoration.save(tmp_path)
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "n_steps": 1, "loss": 1.5, "lr": 0.1, "n_targets": 5, "seconds": 0.1, "validation_loss": 1.4}\n'
    )
    save_lens(tmp_path, gains=[gain], promoted=[promoted])
    write_json(tmp_path / "comparison.json", comparison)
    figures, lacking = run_figures(tmp_path)
    assert set(lacking) == {"domains", "prompts", "recovery_by_heads", "recovery_by_examples", "report"}
    assert "seed 4" in text_of(figures["training"])
    assert len(figures["loss_map"].layout.shapes) == 1
    few = {**comparison, "settings": {**comparison["settings"], "heads": 0.1}}
    write_json(tmp_path / "few" / "comparison.json", few)
    assert list(run_figures(tmp_path)[0]["recovery_by_heads"].data[0].y) == pytest.approx([19.5, 19.5])
    dataclasses.replace(restoration, record=dataclasses.replace(record, pruned_sha256="0" * 64)).save(tmp_path)
    with pytest.raises(RequestError, match="got a scan and a restoration of different weights"):
        run_figures(tmp_path)


def test_causes_are_stacked_to_the_whole_difference(pair, found: Scan) -> None:
    divided = scan(pair, PARAGRAPHS[:4], causes=True, selectors=(), display=0)
    figure = plot_causes(divided)
    heads = [trace for trace in figure.data if trace.xaxis == "x"]
    assert [trace.name for trace in heads] == ["inherited", "own pattern", "own values"]
    assert [sum(values) for values in zip(*(trace.y for trace in heads), strict=True)] == pytest.approx(
        [100] * 3, abs=0.01
    )
    assert heads[0].y[0] == 0
    assert len(figure.data) == 6
    left = plot_recovered(divided.against(divided))
    assert [trace.y for trace in left.data[:3]] == [trace.y for trace in left.data[3:]]
    assert "100.0 % remain" in text_of(left)
    with pytest.raises(RequestError, match="expected a scan with causes, got one without"):
        plot_causes(found)
    with pytest.raises(RequestError, match="expected two scans with causes"):
        plot_recovered(found.against(found))


def test_head_types_show_what_is_left_of_the_strongest(pair) -> None:
    types = head_types(pair, n_sequences=2, length=6)
    figure = plot_head_types(types, ["induction", "sink"], n=3)
    assert [trace.name for trace in figure.data] == ["pruned", "dense"] * 2
    strongest = types.strongest("induction", 3)
    assert list(figure.data[1].x)[::-1] == pytest.approx(strongest["induction_dense"].tolist(), rel=1e-4)
    assert list(figure.data[1].y)[-1] == f"L{strongest['layer'][0]}H{strongest['head'][0]}"
    with pytest.raises(RequestError, match="expected at least one type of heads to draw, got none"):
        plot_head_types(types, [])


def test_head_types_say_what_they_were_measured_on(pair) -> None:
    types = head_types(pair, data=PARAGRAPHS[:3], n_sequences=2, length=6)
    said = {kind: text_of(plot_head_types(types, [kind])) for kind in ("induction", "entropy", "copying")}
    assert "2 sequences of 6 random tokens" in said["induction"]
    assert "entropy of attention, in nats" in said["entropy"]
    assert "3 texts" in said["entropy"]
    assert "weights alone" in said["copying"]
    assert not any("random tokens" in said[kind] for kind in ("entropy", "copying"))


def test_heads_without_output_in_the_dense_model_are_told(found: Scan) -> None:
    dense = found.heads.squared_dense.clone()
    dense[1, 3] = 0
    scan = dataclasses.replace(found, heads=dataclasses.replace(found.heads, squared_dense=dense))
    assert math.isinf(scan.relative_loss[1, 3])
    figure = plot_loss_map(scan)
    heat = figure.data[0]
    largest = 100 * float(scan.relative_loss[scan.relative_loss.isfinite()].max())
    assert heat.z[1][3] == heat.zmax == pytest.approx(largest, rel=1e-4)
    assert "no output in the dense model" in heat.customdata[1][3][4]
    assert "drawn darkest: L1H3." in text_of(figure)
    assert "drawn darkest" not in text_of(plot_loss_map(found))


def test_framed_heads_are_heads_of_the_model(found: Scan) -> None:
    frames = [plot_loss_map(found, heads).layout.shapes for heads in ([Head(0, 1)], [(0, 1)], ["L0H1"])]
    assert frames[0] == frames[1] == frames[2]
    with pytest.raises(RequestError, match="expected heads within 3 layers x 5 heads, got L99H99"):
        plot_loss_map(found, [Head(99, 99)])
    lines = [trace.name for trace in plot_spectra(found, [(2, 0), "L0H1"]).data]
    assert [name for name in lines if name in ("L2H0", "L0H1")] == ["L2H0", "L0H1"] * 2


def test_upstream_is_a_graph_of_the_strongest_writers(pair) -> None:
    upstream = trace_upstream(pair, (1, 2), PARAGRAPHS[:2], exact=2)
    figure = plot_upstream(upstream, n=3)
    assert [trace.text[0] for trace in figure.data if trace.mode == "markers+text"] == ["L1H2"]
    strongest = upstream.table().head(3).sort_values("layer")
    assert list(figure.layout.yaxis.ticktext) == list(strongest["writer"])
    assert [trace.x[0] for trace in figure.data if trace.mode == "markers"] == list(strongest["layer"])
    widths = [trace.line.width for trace in figure.data if trace.mode == "lines"]
    assert max(widths) == pytest.approx(6.5)


def test_drawn_and_lacking_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_drawn(Drawn((tmp_path / "a.png", tmp_path / "a.svg"), {"b": "expected c, got none"}), tmp_path)
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].endswith(": a")
    assert "expected c, got none" in shown


def test_a_damaged_log_is_named(found: Scan, tmp_path: Path) -> None:
    from lcc_lens.restoration.record import RestorationRecord
    from lcc_lens.restoration.result import Restoration

    record = RestorationRecord("d", "p", "", "", "lcc", "alpaca", 7, 4)
    Restoration(record, (Head(0, 1),), *(found.mean_difference[0, :1].clone() for _ in range(3))).save(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1')
    with pytest.raises(RequestError, match="got something else"):
        run_figures(tmp_path)


def test_too_many_series_are_told() -> None:
    points = [Recovery(f"<b>{name}", x, name / 10, None, 1) for name in range(10) for x in (0.1, 0.2)]
    figure = plot_recovery(points, "heads")
    assert len(figure.data) == 8
    assert figure.data[0].name == "&lt;b&gt;9"
    assert "The 8 best of 10 series" in text_of(figure)


def test_missing_browser_leaves_the_pages(found: Scan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import plotly.io

    def fail(**settings: object) -> None:
        raise RuntimeError("Kaleido requires Google Chrome\nand more lines")

    monkeypatch.setattr(plotly.io, "write_images", fail)
    found.save(tmp_path / "run")
    with pytest.raises(LensError, match=r"expected kaleido and a Chromium browser.*the HTML pages are in") as error:
        draw_figures(tmp_path / "run", tmp_path / "out")
    assert "\n" not in str(error.value)
    pages = [path for path in (tmp_path / "out").iterdir() if path.name != MARK]
    assert sorted(path.suffix for path in pages) == [".html", ".html", ".html", ".js"]


def test_a_png_names_its_figure(found: Scan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import plotly.io

    sizes: list[Any] = []

    def draw(fig: list[go.Figure], file: list[Path], **settings: Any) -> None:
        sizes.append((settings["width"], settings["height"]))
        for path in file:
            path.write_bytes(PNG)

    monkeypatch.setattr(plotly.io, "write_images", draw)
    first, second = plot_loss_map(found), plot_loss_map(found, [Head(0, 0)])
    write_images({tmp_path / "a.png": first, tmp_path / "b.svg": second})
    assert sizes == [([first.layout.width, second.layout.width], [first.layout.height, second.layout.height])]
    assert drawn_from(tmp_path / "a.png") == figure_sha256(first) != figure_sha256(second)
    assert figure_json(first) == figure_json(plotly.io.from_json(figure_json(first)))
    assert (tmp_path / "b.svg").read_bytes() == PNG
    assert drawn_from(tmp_path / "b.svg") is None
    with pytest.raises(RequestError, match=r"expected a file name that ends in \.png"):
        write_image(first, tmp_path / "a.gif")


def test_a_prompt_is_drawn_in_every_model(pair, found: Scan) -> None:
    seen = compare_prompt(pair, "is 3 plus 2", restoration=MeanShift(found.components, [Head(2, 1)]))
    figure = plot_prompt(seen, k=4)
    bars = {trace.name: list(trace.x) for trace in figure.data if trace.type == "bar"}
    assert bars.keys() == {"dense", "pruned", "restored"}
    assert bars["dense"][::-1] == pytest.approx([100 * p for p in seen.next_tokens(4)["dense"][:4]], rel=1e-3)
    assert len(set(figure.data[0].y)) == 4  # also where two tokens have one text
    maps = {trace.name: trace.z for trace in figure.data if trace.type == "heatmap"}
    assert maps["restored"][2][1] == pytest.approx(100 * float(seen.change("restored")[2, 1]), rel=1e-3)
    attention = plot_attention(seen, (2, 1))
    assert [trace.name for trace in attention.data] == list(seen.models)
    assert attention.data[1].z[3][1] == pytest.approx(float(seen.patterns[1, 2, 1, 3, 1]), abs=1e-3)
    with pytest.raises(RequestError, match="expected attention patterns, got none"):
        plot_attention(dataclasses.replace(seen, patterns=None), (0, 0))


def test_captions_name_the_pair_and_no_label_lies_on_a_curve(found: Scan) -> None:
    figures = [plot_loss_map(found), plot_selectors(found, ["mse", "random"]), plot_spectra(found)]
    for figure in figures:
        assert "dense, pruned: pruned (50 % zeros, unstructured)" in figure.layout.title.text.replace("<br>", " ")
        assert f"seed {found.record.seed}" in figure.layout.title.text
    height, top = figures[0].layout.height, figures[0].layout.margin.t
    with_source(figures[0], "a model, half of it")
    assert "a model, half of it" in figures[0].layout.title.text.split("<br>")[1]
    assert figures[0].layout.height - height == figures[0].layout.margin.t - top > 0
    steps = [Step(number, 2, 3.0 - number, 0.1, 8, 0.1, 2.5) for number in (1, 2)]
    training = plot_training(steps, 1.0, 3.0)
    assert [trace.name for trace in training.data] == ["training batches", "restored, held-out", "pruned", "dense"]
    assert not training.layout.annotations
