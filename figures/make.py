"""Rebuild the committed figures: JSON from the measurements, and each PNG from the JSON beside it.

python figures/make.py                         rebuild the JSON from benchmarks/*.json, then draw what changed
python figures/make.py --run runs/figures/run  also rebuild the JSON of a run's figures

A PNG stores the hash of its figure and is drawn again only when the JSON beside it has another one, since the pixels
depend on a machine's fonts. The committed run was made by:

    lcc-lens prune smollm2 runs/figures/wanda50 --calibration c4 --n-samples 32 --seq-len 256
    lcc-lens scan smollm2 runs/figures/wanda50 runs/figures/run --data arc_easy --examples 128 --max-length 96
        --selectors probe interaction attribution gradient kl patching --selector-examples 24
    lcc-lens restore smollm2 runs/figures/wanda50 runs/figures/run --data alpaca --examples 320 --heads 0.25
        --selector patching --max-length 192
    python figures/lens.py smollm2 runs/figures/wanda50 runs/figures/run
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import write_text
from lcc_lens.core.reading import read_json
from lcc_lens.frontends.plotting.causes import plot_cause_study
from lcc_lens.frontends.plotting.comparisons import plot_comparison, plot_inference_cost, plot_tasks
from lcc_lens.frontends.plotting.domains import plot_domains
from lcc_lens.frontends.plotting.recoveries import (
    Recovery,
    domain_points,
    plot_recovery,
    recovery_by_selector,
    recovery_points,
)
from lcc_lens.frontends.plotting.reports import plot_report
from lcc_lens.frontends.plotting.run_figures import run_figures
from lcc_lens.frontends.plotting.studies import plot_prompt_gains, plot_pruning_quality, plot_selector_study
from lcc_lens.frontends.plotting.theme import with_source
from lcc_lens.frontends.plotting.writing import drawn_from, figure_json, figure_sha256, write_images

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"
WANDA50 = "SmolLM2-135M, Wanda 50 %."
#: Selectors in the figure of recovery against the share of heads; more would overlap.
SOME = ("activation patching", "linear probe", "gradient", "random")


def recovery_by_heads(study: dict[str, Any]) -> go.Figure:
    """KL divergence removed against the share of heads, from the selector study."""
    points = recovery_by_selector(study, "wanda 2:4", "kl_removed")
    return plot_recovery(
        [point for point in points if point.series in SOME], "heads",
        f"SmolLM2-135M, Wanda 2:4. Means and 95 % t intervals over {points[0].n} runs (3 tasks x 3 seeds).",
        measure="divergence from dense removed",
    )  # fmt: skip


def recovery_by_rate(comparison: dict[str, Any]) -> go.Figure:
    """Recovery against the learning rate of each method."""
    points = recovery_points([comparison], "learning rate")
    return plot_recovery(
        points, "learning rate", WANDA50 + " One to three seeds. Intervals: blocks of text drawn anew."
    )


def recovery_by_examples(all_examples: dict[str, Any]) -> go.Figure:
    """Recovery against the number of training examples, from one comparison per number."""
    fewer = [read_json(file) for file in sorted(BENCHMARKS.glob("restorations_first_[0-9]*.json"))]
    points = recovery_points([*fewer, all_examples], "examples")
    most = max((point.x for point in points), default=0.0)
    caption = f"SmolLM2-135M, Wanda 50 %; one epoch, one seed below {most:.0f}. Intervals: blocks of text drawn anew."
    return plot_recovery(points, "examples", caption)


def recovery_by_tokens(more: dict[str, Any]) -> go.Figure:
    """Recovery on every kind of text against the tokens of the mix, from one comparison per number."""
    fewer = [read_json(BENCHMARKS / f"domains_mix_51k{steps}.json") for steps in ("_batch2", "")]
    hour = read_json(BENCHMARKS / "budgets.json")["runs"]["best 1h"]
    points = domain_points([fewer[0], more], {"refit+all-weights": "best"})
    points += _of_budget(hour, hour["blocks"] * 512 / 1000)
    others = [read_json(BENCHMARKS / f"domains_mix_{n}.json") for n in ("205k", "571k")]
    points += domain_points([fewer[1], *others], METHODS)
    return plot_recovery(
        points, "tokens",
        "SmolLM2-135M, Wanda 50 %, text of the mix. LoRA beside the attention. Bars: three seeds; else one.",
    )  # fmt: skip


def recovery_by_minutes(budgets: dict[str, Any]) -> go.Figure:
    """Recovery on every kind of text within time budgets, and LoRA's after a training of known pace."""
    runs = [run for run in budgets["runs"].values() if run["method"] == "best"]
    points = [point for run in runs for point in _of_budget(run, run["took"] / 60)]
    studies = [read_json(BENCHMARKS / f"domains_mix_{n}.json") for n in ("51k_batch2", "571k")]
    minutes = 1000 * budgets["lora"]["seconds_per_token"] / 60  # for a thousand tokens
    loras = domain_points(studies, {"lora-all": "LoRA"})
    points += [replace(point, x=point.x * minutes) for point in loras]
    return plot_recovery(
        points, "minutes",
        "SmolLM2-135M, Wanda 50 %, two CPU cores, the mix. Of LoRA, beside all linear layers, the training alone.",
    )  # fmt: skip


def _of_budget(run: dict[str, Any], x: float) -> list[Recovery]:
    return [Recovery(f"best, {name}", x, run["panel"][name.split()[0]], None, 1) for name in ("mean", "worst kind")]


def prompt_gains(study: dict[str, Any]) -> go.Figure:
    """The variants of prompts on the first pruned model of the study."""
    model = next(iter(study["models"].values()))
    rows = [row for row in model["rows"] if row["gain_dense"] or row["gain_pruned"]]  # others kept the raw prompts
    return plot_prompt_gains(rows, model["examples"], "Alpaca")


#: Entries in the figure of recovery against tokens, beside ``best``.
METHODS = {"refit+low-rank": "best-low-rank", "lora": "LoRA"}
#: Figures whose measurements do not name model and pruning.
PAIRS = {
    "causes": "SmolLM2-135M.",
    "comparison": WANDA50,
    "domains": WANDA50,
    "inference_cost": WANDA50,
    "prompts": WANDA50,
    "selector_study": "SmolLM2-135M, Wanda 50 % and 2:4.",
    "tasks": "SmolLM2-135M, Wanda 2:4.",
}
#: Measurements and plot of every figure.
SOURCES: dict[str, tuple[str, Callable[[dict[str, Any]], go.Figure]]] = {
    "selector_study": ("selector_study.json", plot_selector_study),
    "recovery_by_heads": ("selector_study.json", recovery_by_heads),
    "comparison": ("restorations_wanda50.json", plot_comparison),
    "domains": ("domains_mix_51k_batch2.json", plot_domains),
    "tasks": ("restorations_wanda24_scored.json", plot_tasks),
    "inference_cost": ("restorations_first.json", plot_inference_cost),
    "recovery_by_learning_rate": ("restorations_wanda50.json", recovery_by_rate),
    "recovery_by_examples": ("restorations_first.json", recovery_by_examples),
    "recovery_by_minutes": ("budgets.json", recovery_by_minutes),
    "recovery_by_tokens": ("domains_mix_205k_batch2.json", recovery_by_tokens),
    "pruning_quality": ("pruning_quality.json", plot_pruning_quality),
    "report": ("report.json", plot_report),
    "prompts": ("prompts.json", prompt_gains),
    "causes": ("causes.json", plot_cause_study),
}


def measured() -> tuple[dict[str, go.Figure], dict[str, str]]:
    """Figures of the committed measurements, and what the missing ones lack, by name."""
    figures, lacking = {}, {}
    for name, (file, draw) in SOURCES.items():
        try:
            figures[name] = draw(read_json(BENCHMARKS / file))
            if name in PAIRS:
                with_source(figures[name], PAIRS[name])
        except RequestError as error:
            lacking[name] = f"{file}: {error}"
    return figures, lacking


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run directory")
    arguments = parser.parse_args()
    figures, lacking = measured()
    if arguments.run is not None:
        of_run, missing = run_figures(arguments.run)
        figures = {**of_run, **figures}
        lacking = {name: why for name, why in {**missing, **lacking}.items() if name not in figures}
    for name, figure in figures.items():
        write_text(HERE / f"{name}.json", figure_json(figure))
    for name in lacking.keys() - {file.stem for file in HERE.glob("*.json")}:
        print(f"not drawn: {name} ({lacking[name]})")
    stale = {}
    for file in sorted(HERE.glob("*.json")):
        figure = plotly.io.read_json(file)
        png = file.with_suffix(".png")
        if not png.exists() or drawn_from(png) != figure_sha256(figure):
            stale[png] = figure
    write_images(stale)
    print(f"drawn: {', '.join(png.name for png in stale) or 'nothing, all are up to date'}")


if __name__ == "__main__":
    main()
