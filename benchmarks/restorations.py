"""What each way to restore brings back on SmolLM2-135M: methods, baselines and controls by the same rule.

    python benchmarks/restorations.py [--models wanda50] [--minutes M]
    python benchmarks/restorations.py --zero-shot      # then, of what was trained, the accuracies on five tasks
    python benchmarks/restorations.py --latency        # and how long each way of being served takes

For each pruned model this is ``lcc-lens compare`` (see ``lcc_lens/compare.py`` for what a cell is). Cells are kept in
``benchmarks/restorations_*.json`` as they come, what they trained in ``--folder``; the study can be stopped at any
time. Delete a file to begin anew.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from run import describe
from transformers.utils import logging as transformers_logging

from lcc_lens.best import BEST_ENTRY, BEST_METHOD, BEST_OBJECTIVE, REFITTED
from lcc_lens.compare import MEASURES, compare
from lcc_lens.compare_config import CompareConfig
from lcc_lens.entries import Entry
from lcc_lens.files import read_json, write_json
from lcc_lens.pruning_jobs import prune, refit

HERE = Path(__file__).parent
MODELS: dict[str, dict[str, Any]] = {"wanda50": {"sparsity": 0.5}, "wanda24": {"pattern": "2:4"}}
#: Computed first, with every seed.
MAIN = (BEST_ENTRY, "lora", "lcc")
#: What ``best`` was when the larger part of the study ran: kept, so that its files can be completed.
FIRST_BEST = f"refit+{BEST_METHOD}:{BEST_OBJECTIVE}"
FIRST_MAIN = (FIRST_BEST, "lora", "lcc")
FIRST_REFIT = {"n_samples": 96, "follow": 0.0, "mend": 0.5, "ridge": 0.01}
#: Then, with the first seed alone: what the best is made of, the controls, baselines, and parts of the family.
OTHERS = (
    "refit", "mean-shift", "lcc@dense", "offset", "random-basis", "lcc@shuffled",
    f"{BEST_METHOD}:{BEST_OBJECTIVE}", f"lora:{BEST_OBJECTIVE}", "lora@dense", f"{BEST_METHOD}@dense:{BEST_OBJECTIVE}",
    "mean-shift-sequential", "mean-shift-sequential-mlp", "flap", "perp", "perp-lora", "lofit", "dora", "eora",
    "lora-vo", "lora=1e-2", "lora=1e-3", "lcc+mlp-lcc", "gain", "norms", "low-rank", "masked", "lcc:distillation",
)  # fmt: skip
TASKS = ("arc_easy", "hellaswag", "winogrande", "openbookqa", "boolq")
LIMIT = 500


@dataclass(frozen=True)
class Variant:
    """A comparison of a pruned model with other settings than the study's."""

    entries: tuple[str, ...] = MAIN
    main: tuple[str, ...] = MAIN
    """Of the entries, those with several seeds."""
    settings: dict[str, Any] = field(default_factory=dict)
    refit: dict[str, Any] = field(default_factory=dict)
    """Settings of the refit that differ from ``best``'s."""


def _first(entries: tuple[str, ...] = FIRST_MAIN, main: tuple[str, ...] = FIRST_MAIN, **settings: Any) -> Variant:
    return Variant(entries, main, {"refit_samples": FIRST_REFIT["n_samples"], **settings}, FIRST_REFIT)


VARIANTS = {
    "wanda50": _first((*FIRST_MAIN, *OTHERS)),
    "wanda24": Variant((*MAIN, *OTHERS)),
    # the first model with best as it is now
    "wanda50_best": Variant((BEST_ENTRY, "refit"), (BEST_ENTRY,)),
    # constants at a quarter of the heads, those with the largest mean squared difference, beside heads drawn at random
    "wanda50_quarter": _first(("lcc", "lcc@random-heads"), ("lcc", "lcc@random-heads"), heads=0.25),
    **{f"wanda50_{n}": _first(examples=n) for n in (60, 120, 240)},
}


@dataclass(frozen=True)
class Asked:
    """What of the study to compute."""

    folder: Path
    models: list[str]
    entries: list[str]
    seeds: int
    minutes: float
    zero_shot: bool
    latency: bool


def main(asked: Asked) -> None:
    """All cells that are not there, until the time is up."""
    end = time.monotonic() + 60 * asked.minutes
    tasks: dict[str, Any] = {"tasks": TASKS, "limit": LIMIT} if asked.zero_shot else {}
    for name in asked.models:
        variant = VARIANTS[name]
        config = CompareConfig(speed_rounds=15 if asked.latency else 0, **variant.settings, **tasks)
        entries = tuple(asked.entries) or variant.entries
        pruned = asked.folder / name.partition("_")[0] / "pruned"
        if not pruned.exists():
            prune("smollm2", pruned, method="wanda", calibration="c4", n_samples=64, **MODELS[pruned.parent.name])
        out = HERE / f"restorations_{name}.json"
        found = read_json(out) if out.exists() else {"cells": {}}
        refitted, usual = asked.folder / name / REFITTED, pruned.parent / REFITTED
        is_usual = variant.refit == VARIANTS[pruned.parent.name].refit  # it does not depend on the examples
        if is_usual and usual.exists() and not refitted.exists():
            shutil.copytree(usual, refitted, copy_function=os.link)
        if variant.refit and not refitted.exists() and any(Entry.parse(entry).on_refit for entry in entries):
            start = time.perf_counter()
            refit("smollm2", pruned, refitted, **variant.refit)
            found |= {"refit": variant.refit, "refit_seconds": round(time.perf_counter() - start, 1)}
        write_json(
            out, {**found, "command": f"python benchmarks/restorations.py --models {name}", "machine": describe()}
        )
        with_seeds = [entry for entry in entries if entry in variant.main and not asked.zero_shot]
        for some, n_seeds in ((with_seeds, asked.seeds), (entries, 1)):
            compare(
                "smollm2", pruned, asked.folder / name, some, seeds=n_seeds, config=config, deadline=end, out=out,
                on_cell=_say,
            )  # fmt: skip


def _say(cell: str, got: dict[str, Any]) -> None:
    figures = {key: got[key] for key in ("error", *MEASURES, "training_seconds") if got.get(key) is not None}
    accuracies = {task: score["acc"] for task, score in got.get("tasks", {}).items()}
    print(time.strftime("%H:%M"), cell, figures, accuracies, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/restorations"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many minutes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    parser.add_argument("--entries", nargs="+", default=[], help="all of the study's if not given")
    parser.add_argument("--zero-shot", action="store_true", help="accuracies on five tasks instead, one seed")
    parser.add_argument("--latency", action="store_true", help="time what is served as well")
    transformers_logging.set_verbosity_error()
    main(Asked(**vars(parser.parse_args())))
