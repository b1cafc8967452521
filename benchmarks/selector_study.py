"""How well each selector ranks heads: against exact activation patching, and by what training its choice recovers.

    python benchmarks/selector_study.py [--folder runs/selectors] [--out benchmarks/selector_study.json]

A cell is one pruned model, one task and one seed (which draws the examples). All heads are scored by all selectors on
questions that nothing else uses. Then a constant is trained for the 10 % and the 25 % of heads that each selector
chooses, on training questions (all but the heads is the same for all), and measured on held-out ones, two ways: the
share of the lost log-likelihood of the right answers that came back, which fitting the task raises too, even above 100
%; and the share of the divergence from the dense model's predictions that went away, which only restoring lowers.
Training keeps its end, or its start where validation questions, which are not those it is measured on, say so.

Every score and every training run is noted in the folder as soon as it is there; the study can be stopped at any time
and goes on. The committed file is written anew after every cell, and its cells are not computed again: delete the file
to begin anew.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from run import describe
from transformers.utils import logging as transformers_logging

from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.analysis.selectors.names import SELECTORS
from lcc_lens.core.files import write_json
from lcc_lens.core.metrics import share_recovered
from lcc_lens.core.reading import read_json
from lcc_lens.data.batches import Batch, TokenSequence, batches
from lcc_lens.data.datasets import Data, encode, load_data
from lcc_lens.models.hooked.forward import forward
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook, logits_at
from lcc_lens.models.hooked.losses import measure
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.pruning.jobs import prune
from lcc_lens.restoration.injections.constants import LccInjection
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.loop import train

MODELS: dict[str, dict[str, Any]] = {"wanda 50%": {"sparsity": 0.5}, "wanda 2:4": {"pattern": "2:4"}}
SHARES = (0.1, 0.25)
MEASURES = ("recovered", "kl_removed")
#: By task: pairs to scan, examples to patch, to train on, to validate on and to measure on; tokens at most.
TASKS: dict[str, dict[str, int]] = {
    "arc_easy": {"scan": 192, "patch": 24, "train": 80, "validate": 12, "measure": 64, "length": 96},
    "openbookqa": {"scan": 192, "patch": 40, "train": 96, "validate": 16, "measure": 96, "length": 64},
    "alpaca": {"scan": 96, "patch": 10, "train": 40, "validate": 8, "measure": 32, "length": 96},
}


def pruned(name: str, folder: Path) -> Path:
    path = folder / name.replace(" ", "_").replace(":", "-")
    if not path.exists():
        prune("smollm2", path, method="wanda", calibration="c4", n_samples=64, **MODELS[name])
    return path


def part(data: Data, start: int, end: int) -> Data:
    return Data(data.name, data.kind, data.examples[start:end], data.source, data.role, data.negatives)


def scored(pair: Pair, task: str, seed: int, run: Path) -> tuple[Scan, dict[str, HeadScores]]:
    """Scan the pair and score all heads by all selectors."""
    sizes = TASKS[task]
    if not (run / "scan.json").exists():
        data = load_data(task, sizes["scan"], role="probe", seed=seed)
        scan(
            pair, data, sites=("z",), display=0, max_length=sizes["length"], selectors=SELECTORS, seed=seed,
            selector_examples=sizes["patch"], run=run,
        )  # fmt: skip
    found = Scan.load(run)
    return found, {name: found.scores(name, seed=seed) for name in SELECTORS}


class Held:
    """Held-out sequences with the dense model's logits at their answers."""

    def __init__(self, pair: Pair, sequences: list[TokenSequence]) -> None:
        self.pair, self.batches = pair, batches(sequences, max_tokens=2048)
        self.dense = [self._logits(pair.dense, batch, []) for batch in self.batches]

    def measure(self, model: HookedModel, injection: LccInjection | None = None) -> dict[str, float]:
        """Mean over examples of the answer's loss and of the divergence from the dense model, nats per token."""
        hooks = [] if injection is None else injection.hooks()
        found = [
            measure(self._logits(model, batch, hooks), batch, dense)
            for batch, dense in zip(self.batches, self.dense, strict=True)
        ]
        loss = -torch.cat([outcome.log_likelihood for outcome in found])
        return {"loss": float(loss.mean()), "kl": float(torch.cat([o.divergence for o in found]).mean())}

    @staticmethod
    def _logits(model: HookedModel, batch: Batch, hooks: list[NamedHook]) -> torch.Tensor:
        with torch.inference_mode():
            return forward(model, batch.tokens, [*hooks, *logits_at(model, batch.is_target())])[0]


def recovered(
    pair: Pair, found: Scan, task: str, seed: int, note: Path, selectors: Sequence[str] = SELECTORS
) -> list[dict[str, Any]]:
    """Train what each selector chooses; equal choices are trained once."""
    sizes = TASKS[task]
    done: dict[str, Any] = read_json(note) if note.exists() else {}
    data = load_data(task, sizes["train"], role="train", seed=seed)
    held_out = load_data(task, sizes["validate"] + sizes["measure"], role="held-out", seed=seed)
    train_on, validate, rest = (
        encode(d, pair.tokenizer, max_length=sizes["length"])
        for d in (data, part(held_out, 0, sizes["validate"]), part(held_out, sizes["validate"], len(held_out)))
    )
    held = Held(pair, rest)
    if "bare" not in done:
        done["bare"] = {name: held.measure(getattr(pair, name)) for name in ("dense", "pruned")}
    dense, pruned = done["bare"]["dense"], done["bare"]["pruned"]
    rows = []
    for share in SHARES:
        for name in selectors:
            heads = found.select(name, share=share, seed=seed)
            key = " ".join(map(str, heads))
            if key not in done:
                start, injection = time.perf_counter(), LccInjection(found.components, heads)
                for _ in train(pair.pruned, injection, train_on, validate, TrainConfig(seed=seed, validate_every=100)):
                    pass
                done[key] = {**held.measure(pair.pruned, injection), "seconds": round(time.perf_counter() - start, 1)}
                write_json(note, done)
            shares = {
                "recovered": share_recovered(dense["loss"], pruned["loss"], done[key]["loss"]),
                "kl_removed": 1 - done[key]["kl"] / pruned["kl"],
            }
            rows.append({"selector": name, "share": share, **shares, **done[key], "dense": dense, "pruned": pruned})
    return rows


def cell(model: str, task: str, seed: int, folder: Path) -> dict[str, Any]:
    pair = load_pair("smollm2", pruned(model, folder))
    note = folder / f"{model}_{task}_{seed}".replace(" ", "_").replace(":", "-")
    found, scores = scored(pair, task, seed, note)
    gold = scores["patching"]
    return {
        "model": model, "task": task, "seed": seed, "sizes": TASKS[task], "negatives": found.record.negatives,
        "correlation": {name: scores[name].rank_correlation(gold) for name in SELECTORS if name != "patching"},
        "gold": short(gold.value), "gold_stderr": short(gold.stderr),
        "recovery": recovered(pair, found, task, seed, note.with_suffix(".training.json")),
    }  # fmt: skip


def short(values: torch.Tensor) -> list[float]:
    """Few digits, for a file that people read."""
    return [float(f"{value:.4g}") for value in values.flatten().tolist()]


def interval(values: list[float]) -> dict[str, float | int | None]:
    """Mean with its 95 % interval (Student's t over cells)."""
    from scipy.stats import t

    n, mean = len(values), statistics.mean(values)
    if n < 2:
        return {"mean": round(mean, 4), "low": None, "high": None, "n": n}
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4), "n": n}


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Per model: rank correlations with the gold standard, recovery, and recovery above random heads, over cells."""
    result: dict[str, Any] = {}
    for model in MODELS:
        mine = [c for c in cells if c["model"] == model]
        if not mine:
            continue
        correlation = {n: interval([c["correlation"][n] for c in mine]) for n in SELECTORS if n != "patching"}
        by_task = {
            t: {n: round(statistics.mean(c["correlation"][n] for c in mine if c["task"] == t), 3) for n in correlation}
            for t in dict.fromkeys(c["task"] for c in mine)
        }
        recovery: dict[str, Any] = {}
        for share in SHARES:
            recovery[f"{share:.0%}"] = {
                name: {
                    **{what: interval(pick(mine, name, share, what)) for what in MEASURES},
                    **{f"{what} above random": interval(above(mine, name, share, what)) for what in MEASURES},
                }
                for name in SELECTORS
            }
        result[model] = {
            "correlation": correlation, "correlation_by_task": by_task, "recovery": recovery,
            "gold_with_itself": agreement(mine),
        }  # fmt: skip
    return result


def pick(cells: list[dict[str, Any]], selector: str, share: float, what: str) -> list[float]:
    """One selector's recovery, cell by cell; a cell in which pruning lost nothing has none."""
    rows = [r for c in cells for r in c["recovery"] if r["selector"] == selector and r["share"] == share]
    return [r[what] for r in rows if r["recovered"] is not None]


def above(cells: list[dict[str, Any]], selector: str, share: float, what: str) -> list[float]:
    """The same above random heads of the same cell."""
    both = zip(pick(cells, selector, share, what), pick(cells, "random", share, what), strict=True)
    return [own - random for own, random in both]


def agreement(cells: list[dict[str, Any]]) -> dict[str, float | int]:
    """The gold standard's rank correlation between seeds of one task: no selector can be expected to do better."""
    values = []
    for i, first in enumerate(cells):
        for second in cells[i + 1 :]:
            if first["task"] == second["task"]:
                pair = [torch.tensor(c["gold"])[None] for c in (first, second)]
                scores = [HeadScores("patching", value, torch.zeros_like(value), 0) for value in pair]
                values.append(scores[0].rank_correlation(scores[1]))
    return {"mean": round(statistics.mean(values), 3), "n": len(values)} if values else {"n": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/selectors"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/selector_study.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    known = read_json(arguments.out)["cells"] if arguments.out.exists() else []
    cells = {(c["model"], c["task"], c["seed"]): c for c in known}
    wanted = [(m, t, seed) for t in arguments.tasks for seed in range(arguments.seeds) for m in arguments.models]
    for key in wanted:
        if key not in cells:
            start = time.perf_counter()
            cells[key] = cell(*key, arguments.folder)
            print(*key, f"{time.perf_counter() - start:.0f} s", flush=True)
        result = {"command": "python benchmarks/selector_study.py", "machine": describe()}
        found = list(cells.values())
        write_json(arguments.out, {**result, "summary": summary(found), "cells": found})


if __name__ == "__main__":
    main()
