"""Figures, the page and the demo: right numbers in right cells, self-contained, and safe."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import LensError
from lcc_lens.core.heads import Head
from lcc_lens.evaluation.evaluate import format_scores
from lcc_lens.frontends.demo import DemoConfig, run_demo
from lcc_lens.frontends.plotting.head_maps import plot_loss_map
from lcc_lens.frontends.plotting.training import plot_training
from lcc_lens.frontends.plotting.writing import write_html, write_image
from lcc_lens.restoration.training.config import Step


def test_loss_map_leaves_removed_heads_blank_and_says_where_heads_moved(found: Scan) -> None:
    n_layers, n_heads = found.relative_loss.shape
    removed = ((1,), (), (0, 4))
    zeroed = dataclasses.replace(found.record, dense_heads=(tuple(range(n_heads)),) * n_layers, removed_heads=removed)
    heatmap = plot_loss_map(dataclasses.replace(found, record=zeroed)).data[0]
    blank = tuple(tuple(h for h, value in enumerate(row) if value is None) for row in heatmap.z)
    assert blank == removed
    moved = dataclasses.replace(found.record, dense_heads=((0, 2, 3, 4, 7),) * n_layers, removed_heads=((),) * n_layers)
    heatmap = plot_loss_map(dataclasses.replace(found, record=moved)).data[0]
    assert [cell[4] for cell in heatmap.customdata[1]] == [
        "",
        *(f"<br>in the dense model: L1H{h}" for h in (2, 3, 4, 7)),
    ]


def test_loss_map_shows_layers_as_rows_and_frames_heads(found: Scan) -> None:
    figure = plot_loss_map(found, [Head(2, 4)])
    heat = figure.data[0]
    assert len(heat.z) == 3
    assert len(heat.z[0]) == 5
    assert heat.z[2][4] == pytest.approx(100 * float(found.relative_loss[2, 4]), rel=1e-4)
    assert heat.customdata[2][4][0] == pytest.approx(float(found.cosine[2, 4]), rel=1e-4)
    assert "probe accuracy" in heat.customdata[0][0][3]
    frame = figure.layout.shapes[0]
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (3.5, 4.5, 1.5, 2.5)
    assert figure.layout.yaxis.autorange == "reversed"


def test_training_curve_lies_between_dense_and_pruned() -> None:
    steps = [Step(i, 3, 3.0 - i / 10, 0.1, 5, 0.1, 2.5 if i == 3 else None) for i in (1, 2, 3)]
    figure = plot_training(steps, dense_loss=2.0, pruned_loss=3.0)
    assert list(figure.data[0].y) == [2.9, 2.8, 2.7]
    assert list(figure.data[1].x) == [3]
    assert sorted(float(line.y[0]) for line in figure.data[2:]) == [2.0, 3.0]


def test_page_opens_without_network(found: Scan, tmp_path: Path) -> None:
    write_html(plot_loss_map(found), tmp_path / "map.html")
    text = (tmp_path / "map.html").read_text()
    assert len(text) > 1_000_000
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=.https?:", text)


def test_missing_browser_is_one_line(found: Scan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import plotly.io

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Kaleido requires Google Chrome\nand more lines")

    monkeypatch.setattr(plotly.io, "write_images", fail)
    with pytest.raises(LensError, match=r"expected kaleido and a Chromium browser to draw map\.png") as error:
        write_image(plot_loss_map(found), tmp_path / "map.png")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "map.png").exists()


def test_accuracies_come_with_their_standard_error() -> None:
    tasks = {"boolq": {"acc": 0.625, "stderr": 0.07, "n": 48}, "wikitext": {"perplexity": 24.126}}
    assert list(format_scores(tasks).values()) == ["62.5 ± 7.0 %", "24.13"]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    hostile = "<script>alert(1)</script>"
    boolq = [
        {"question": f"is it {i}", "passage": f"Topic {i} -- {hostile} Number {i} follows {i - 1}, then comes {i + 1}.",
         "label": i % 2} for i in range(150)
    ]  # fmt: skip
    arc = [
        {
            "id": str(i),
            "question": f"What is {i}?",
            "choices": {"text": ["a", "b"], "label": ["A", "B"]},
            "answerKey": "A",
        }
        for i in range(60)
    ]
    for name, rows in (("boolq", boolq), ("arc_easy", arc)):
        (folder / name).mkdir()
        (folder / name / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_demo_ends_with_numbers_a_model_and_a_page(
    records: Path, dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCC_LENS_DATA", str(records))
    titles: list[str] = []
    config = DemoConfig(
        model=str(dense_dir), folder=tmp_path / "demo", n_calibration=4, calibration_length=64, n_probe=8, n_train=24,
        n_validation=4, n_held_out=10, max_length=160, n_text_blocks=3, text_length=64, n_items=5, lr=0.1,
        n_refit=4, n_best=8,
    )  # fmt: skip
    run_demo(dataclasses.replace(config, seed=1))
    shown: list[tuple[Path, int]] = []
    result = run_demo(  # in the same folder, where another pruned model was refitted
        config, stage=titles.append, on_scan=lambda found, run: shown.append((run, len(titles)))
    )
    assert len(titles) == 7
    assert shown == [(tmp_path / "demo" / "run", 2)]  # before the third step
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert list(results["models"]) == ["dense", "pruned", "restored", "best"]
    for model in results["models"].values():
        assert {"perplexity", "tokens"} <= model["tasks"]["held-out text"].keys()
        assert model["tasks"]["held-out responses"]["response_loss"] > 0
        assert model["tasks"]["boolq"]["n"] == model["tasks"]["arc_easy"]["n"] == 5
    assert set(results["share_recovered"]) == {"held-out text", "held-out responses"}
    assert (result.restored / "model.safetensors").exists()
    assert list(results["panel"]["domains"]) == ["python"]
    card = (result.restored / "README.md").read_text()
    assert "boolq" in card
    assert "| python |" in card
    page = result.page.read_text()
    assert all(name in page for name in ("held-out text: perplexity", "boolq: accuracy"))
    assert (tmp_path / "demo" / "run" / "explorer.json").exists()
