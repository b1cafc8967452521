"""What each way to restore brings back on SmolLM2-135M: methods, baselines and controls by the same rule.

    python benchmarks/restorations.py [--models wanda50] [--minutes M] [--processes 12]
    python benchmarks/restorations.py --times          # before anything else: what best takes beside LoRA
    python benchmarks/restorations.py --zero-shot      # then, of what was trained, the accuracies on five tasks
    python benchmarks/restorations.py --latency        # and how long each way of being served takes

For each pruned model this is ``lcc-lens compare`` (see ``lcc_lens/evaluation/comparison/compare.py`` for what a cell
is). Cells are kept in
``benchmarks/restorations_*.json`` as they come, what they trained in ``--folder``; the study can be stopped at any
time. Delete a file to begin anew.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from run import describe
from transformers.utils import logging as transformers_logging

from lcc_lens.core.files import locked, write_json
from lcc_lens.core.reading import read_json
from lcc_lens.evaluation.comparison.compare import MEASURES, compare, read_part
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.evaluation.comparison.runner import Runner
from lcc_lens.evaluation.task_recovery import RECOVERY_TASKS, TASK_EPOCHS, TASK_EXAMPLES
from lcc_lens.pruning.calibration.texts import REFIT_DATA
from lcc_lens.pruning.jobs import prune, refit
from lcc_lens.restoration.refitted import REFITTED

HERE, DENSE = Path(__file__).parent, "smollm2"
BEST_METHOD, BEST_OBJECTIVE = "low-rank", "text+distillation"
BEST_ENTRY = f"{REFITTED}+{BEST_METHOD}:{BEST_OBJECTIVE}=0.005"
MODELS: dict[str, dict[str, Any]] = {
    "wanda50": {"sparsity": 0.5},
    "wanda24": {"pattern": "2:4"},
    "wanda60": {"sparsity": 0.6},
    "structured40": {"method": "slimgpt", "sparsity": 0.4},
}
#: Computed first.
MAIN = (BEST_ENTRY, "lora", "lcc")
#: Then what the best is made of, the controls, baselines, and parts of the family.
OTHERS = (
    "refit", "mean-shift", "lcc@dense", "offset", "random-basis", "lcc@shuffled",
    f"{BEST_METHOD}:{BEST_OBJECTIVE}", f"lora:{BEST_OBJECTIVE}", "lora@dense", f"{BEST_METHOD}@dense:{BEST_OBJECTIVE}",
    "mean-shift-sequential", "mean-shift-sequential-mlp", "flap", "perp", "perp-lora", "lofit", "dora", "eora",
    "lora-vo", "lcc+mlp-lcc", "gain", "norms", "low-rank", "masked", "lcc:distillation",
    f"{REFITTED}+masked:{BEST_OBJECTIVE}=3e-4",
    # rates beside each one's own
    "lora=1e-3", "lora=1e-2", "lcc=1e-2", "lcc=1e-1", "perp=3e-3", "perp-lora=1e-3", "perp-lora=1e-2",
    "dora=1e-3", "dora=1e-2", "lofit=1e-2", "lofit=1e-1", "norms=3e-3", "norms=1e-2", "gain=3e-3", "low-rank=1e-3",
    "masked=3e-4",
)  # fmt: skip
#: Scored on five tasks (``--zero-shot``): methods, controls and baselines.
SCORED = (
    BEST_ENTRY, "lora", "lcc", "refit", "mean-shift", "lcc@dense", "offset", "lcc@shuffled", "random-basis", "eora",
    "flap", "perp", "dora", "lofit", "norms", "perp-lora", "low-rank", "masked", "gain", "lora@dense",
    f"{BEST_METHOD}@dense:{BEST_OBJECTIVE}", f"{BEST_METHOD}:{BEST_OBJECTIVE}", f"lora:{BEST_OBJECTIVE}",
)  # fmt: skip
#: What methods learn from, and two texts to measure.
DATA: dict[str, Any] = {"data": "alpaca", "texts": ("wikitext", "c4"), "blocks": 16, "refit_data": REFIT_DATA}
TASKS = ("arc_easy", "hellaswag", "winogrande", "openbookqa", "boolq")
LIMIT = 500
#: What one task is trained by.
TASK = {"examples": TASK_EXAMPLES, "epochs": TASK_EPOCHS, "limit": LIMIT}


@dataclass(frozen=True)
class Variant:
    """A comparison of a pruned model, the first word of its name."""

    main: tuple[str, ...] = MAIN
    others: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    """Those that differ from the study's."""


VARIANTS = {
    "wanda50": Variant(others=OTHERS),
    "wanda24": Variant(others=OTHERS),
    # where more is lost, accuracies tell more apart
    "wanda24_scored": Variant(others=SCORED, main=()),
    # constants at a quarter of the heads, those with the largest mean squared difference, beside heads drawn at random
    "wanda50_quarter": Variant(("lcc", "lcc@random-heads"), settings={"heads": 0.25}),
    # the same where more is lost, and chosen by attribution patching
    "wanda24_quarter": Variant(("lcc", "lcc@random-heads"), settings={"heads": 0.25, "selector": "attribution"}),
    **{f"wanda50_{n}": Variant(settings={"examples": n}) for n in (60, 120, 240)},
    **{
        f"{model}_{task}": Variant(settings={**TASK, "data": task, "tasks": (task,)})
        for model in ("wanda60", "structured40") for task in RECOVERY_TASKS
    },
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What of the study to compute."""

    folder: Path
    models: list[str]
    entries: list[str]
    seeds: int
    other_seeds: int
    scored_seeds: int
    minutes: float
    times: bool
    zero_shot: bool
    latency: bool
    part: str
    processes: int


def main(asked: Asked) -> None:
    """All cells that are not there, until the time is up."""
    end = time.monotonic() + 60 * asked.minutes
    if asked.times:
        for name in asked.models:
            time_best(asked.folder, name)
        return
    if asked.processes > 1:
        divide(asked.processes)
    begun = 0
    for which, n_seeds in (("main", asked.seeds), ("others", asked.other_seeds)):
        for name in asked.models:
            entries: tuple[str, ...] = getattr(VARIANTS[name], which)
            if asked.entries:
                entries = tuple(asked.entries) if which == "main" else ()
            if entries:
                n = asked.scored_seeds if asked.zero_shot else n_seeds
                fill(asked, name, entries, n, first=begun, end=end)
                begun += len(entries) * n


def fill(asked: Asked, name: str, entries: tuple[str, ...], n_seeds: int, *, first: int, end: float) -> None:
    """Compute this process's part of a comparison; so many cells stand before it in the whole study."""
    variant, i, n = VARIANTS[name], *read_part(asked.part)
    tasks: dict[str, Any] = {"tasks": TASKS, "limit": LIMIT} if asked.zero_shot else {}
    config = CompareConfig(
        **{**DATA, "selector": "mse", "speed_rounds": 15 if asked.latency else 0, **variant.settings, **tasks}
    )
    run, out = asked.folder / name, HERE / f"restorations_{name}.json"
    pruned, refitting = prepared(
        asked.folder, name, needs_refit=any(Entry.parse(entry).on_refit for entry in entries)
    )  # fmt: skip
    with locked(run, "comparison"):
        found = read_json(out) if out.exists() else {"cells": {}}
        command = f"python benchmarks/restorations.py --models {name}"
        write_json(out, {**found, **refitting, "command": command, "machine": describe()})
    compare(
        DENSE, pruned, run, entries, seeds=n_seeds, config=config, deadline=end, out=out, part=((i - first) % n, n),
        on_cell=_say,
    )  # fmt: skip


def divide(n: int) -> None:
    """Let so many processes of this command share what can be shared; what is left is this one's."""
    given = [*sys.argv[1:], "--processes", "1"]
    parts = [[sys.executable, __file__, *given, "--part", f"{i + 1}/{n}"] for i in range(n)]
    children = [subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) for command in parts]
    for child in children:
        child.wait()


def prepared(folder: Path, name: str, *, needs_refit: bool) -> tuple[Path, dict[str, Any]]:
    """The pruned model; it and, where it is needed, its refit are made once, the refit linked into the comparison.

    Returns:
        The pruned model's folder, and how long its refit took.
    """
    model, run = name.partition("_")[0], folder / name
    pruned, refitted, record = folder / model / "pruned", folder / model / REFITTED, folder / model / "refit.json"
    with locked(folder, model):
        if not pruned.exists():
            prune(DENSE, pruned, **{"method": "wanda", "calibration": "c4", "n_samples": 64, **MODELS[model]})
        if needs_refit and not refitted.exists():
            start = time.perf_counter()
            refit(DENSE, pruned, refitted)
            write_json(record, {"refit_seconds": round(time.perf_counter() - start, 1)})
        if needs_refit and not (run / REFITTED).exists():
            shutil.copytree(refitted, run / REFITTED, copy_function=os.link)
    return pruned, read_json(record) if needs_refit and record.exists() else {}


def time_best(folder: Path, name: str, n_steps: int = 12) -> None:
    """Seconds of the refit and of training steps of LoRA and of the low rank after it, with nothing else at work."""
    with locked(folder, f"{name} alone"):
        pruned, refitting = prepared(folder, name, needs_refit=True)
        runner = Runner(DENSE, pruned, folder / name, CompareConfig(**DATA, selector="mse", speed_rounds=0))
        steps = {
            entry: [step.seconds for step in itertools.islice(runner.steps(Entry.parse(entry), seed=0), n_steps)]
            for entry in ("lora", BEST_ENTRY)
        }
        found = {
            **refitting,
            "command": f"python benchmarks/restorations.py --times --models {name}",
            "machine": describe(),
            "step_seconds": {entry: [round(one, 4) for one in seconds] for entry, seconds in steps.items()},
        }
        write_json(HERE / f"best_times_{name}.json", found)
        print(name, refitting, {entry: statistics.median(seconds) for entry, seconds in steps.items()}, flush=True)


def _say(cell: str, got: dict[str, Any]) -> None:
    figures = {key: got[key] for key in ("error", *MEASURES, "training_seconds") if got.get(key) is not None}
    accuracies = {task: score["acc"] for task, score in got.get("tasks", {}).items()}
    print(time.strftime("%H:%M"), cell, figures, accuracies, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/restorations"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many minutes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="so many divide the cells among them")
    parser.add_argument("--other-seeds", type=int, default=1, help="of what is no part of the main comparison")
    parser.add_argument("--scored-seeds", type=int, default=1, help="of what accuracies are asked of")
    parser.add_argument("--times", action="store_true", help="only time best and LoRA; let nothing else run beside it")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th cell from the i-th")
    parser.add_argument("--models", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    parser.add_argument("--entries", nargs="+", default=[], help="all of the study's if not given")
    parser.add_argument("--zero-shot", action="store_true", help="accuracies on five tasks instead")
    parser.add_argument("--latency", action="store_true", help="time what is served as well")
    transformers_logging.set_verbosity_error()
    main(Asked(**vars(parser.parse_args())))
