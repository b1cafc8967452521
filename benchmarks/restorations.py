"""What each way to restore brings back on SmolLM2-135M: methods, baselines and controls by the same rule.

    python benchmarks/restorations.py [--models wanda50] [--minutes M] [--processes 12]
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
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from run import describe
from transformers.utils import logging as transformers_logging

from lcc_lens.best import BEST_ENTRY, BEST_METHOD, BEST_OBJECTIVE, REFITTED
from lcc_lens.compare import MEASURES, compare, read_part
from lcc_lens.compare_config import CompareConfig
from lcc_lens.entries import Entry
from lcc_lens.files import read_json, write_json
from lcc_lens.locking import locked
from lcc_lens.pruning_jobs import prune, refit
from lcc_lens.task_recovery import RECOVERY_TASKS, TASK_EPOCHS, TASK_EXAMPLES

HERE = Path(__file__).parent
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
    "lora-vo", "lora=1e-2", "lora=1e-3", "lcc+mlp-lcc", "gain", "norms", "low-rank", "masked", "lcc:distillation",
)  # fmt: skip
TASKS = ("arc_easy", "hellaswag", "winogrande", "openbookqa", "boolq")
LIMIT = 500
#: What one task is trained by.
TASK = {"examples": TASK_EXAMPLES, "epochs": TASK_EPOCHS, "limit": LIMIT}


@dataclass(frozen=True)
class Variant:
    """A comparison of a pruned model, the first word of its name."""

    entries: tuple[str, ...] = MAIN
    settings: dict[str, Any] = field(default_factory=dict)
    """Those that differ from the study's."""


VARIANTS = {
    "wanda50": Variant((*MAIN, *OTHERS)),
    "wanda24": Variant((*MAIN, *OTHERS)),
    # constants at a quarter of the heads, those with the largest mean squared difference, beside heads drawn at random
    "wanda50_quarter": Variant(("lcc", "lcc@random-heads"), {"heads": 0.25}),
    **{f"wanda50_{n}": Variant(MAIN, {"examples": n}) for n in (60, 120, 240)},
    **{
        f"{model}_{task}": Variant(MAIN, {**TASK, "data": task, "tasks": (task,)})
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
    minutes: float
    zero_shot: bool
    latency: bool
    part: str
    processes: int


def main(asked: Asked) -> None:
    """All cells that are not there, until the time is up."""
    end = time.monotonic() + 60 * asked.minutes
    if asked.processes > 1:
        divide(asked.processes)
    part = read_part(asked.part)
    first = part[0] % len(asked.models)  # processes begin with different models: each is pruned and refitted by one
    tasks: dict[str, Any] = {"tasks": TASKS, "limit": LIMIT} if asked.zero_shot else {}
    for name in (*asked.models[first:], *asked.models[:first]):
        variant, model = VARIANTS[name], name.partition("_")[0]
        config = CompareConfig(**{"speed_rounds": 15 if asked.latency else 0, **variant.settings, **tasks})
        entries = tuple(asked.entries) or variant.entries
        needs_refit = any(Entry.parse(entry).on_refit for entry in entries)
        run, out = asked.folder / name, HERE / f"restorations_{name}.json"
        pruned, refitting = _prepared(asked.folder, model, run, needs_refit=needs_refit)
        command = f"python benchmarks/restorations.py --models {name}"
        with locked(run, "comparison"):
            found = read_json(out) if out.exists() else {"cells": {}}
            write_json(out, {**found, **refitting, "command": command, "machine": describe()})
        compare(
            "smollm2", pruned, run, entries, seeds=1 if asked.zero_shot else asked.seeds, config=config, deadline=end,
            out=out, part=part, on_cell=_say,
        )  # fmt: skip


def divide(n: int) -> None:
    """Let so many processes of this command share what can be shared; what is left is this one's."""
    given = [*sys.argv[1:], "--processes", "1"]
    parts = [[sys.executable, __file__, *given, "--part", f"{i + 1}/{n}"] for i in range(n)]
    children = [subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) for command in parts]
    for child in children:
        child.wait()


def _prepared(folder: Path, model: str, run: Path, *, needs_refit: bool) -> tuple[Path, dict[str, Any]]:
    """The pruned model; it and, where it is needed, its refit are made once, the refit linked into ``run``.

    Returns:
        The pruned model's folder, and how long its refit took.
    """
    pruned, refitted, record = folder / model / "pruned", folder / model / REFITTED, folder / model / "refit.json"
    with locked(folder, model):
        if not pruned.exists():
            settings = {"method": "wanda", "calibration": "c4", "n_samples": 64, **MODELS[model]}
            prune("smollm2", pruned, **settings)
        if needs_refit and not refitted.exists():
            start = time.perf_counter()
            refit("smollm2", pruned, refitted)
            write_json(record, {"refit_seconds": round(time.perf_counter() - start, 1)})
        if needs_refit and not (run / REFITTED).exists():
            shutil.copytree(refitted, run / REFITTED, copy_function=os.link)
    return pruned, read_json(record) if needs_refit and record.exists() else {}


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
    parser.add_argument("--part", default="1/1", help="i/n: every n-th cell from the i-th")
    parser.add_argument("--models", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    parser.add_argument("--entries", nargs="+", default=[], help="all of the study's if not given")
    parser.add_argument("--zero-shot", action="store_true", help="accuracies on five tasks instead, one seed")
    parser.add_argument("--latency", action="store_true", help="time what is served as well")
    transformers_logging.set_verbosity_error()
    main(Asked(**vars(parser.parse_args())))
