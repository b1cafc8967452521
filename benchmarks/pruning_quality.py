"""Perplexity of the embedded model after every pruner, and every pruner's time, over three seeds of calibration data.

    python benchmarks/pruning_quality.py [--folder runs/quality] [--out benchmarks/pruning_quality.json]

A cell is one model: pruned, measured on every eighth block of WikiText-2's test text (512 tokens each), noted in the
folder, and deleted. Finished cells are not computed again, so the study can be stopped at any time and goes on. The
committed file is written anew after every cell.

Times stand beside two bare forward passes of the same tokens, measured once a seed: the least that pruning layer after
layer needs is one pass to see a layer's inputs and one to feed the next. The passes run the model's body, without the
unembedding, which pruning never runs; a pruner's time goes from the request to the written checkpoint.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from run import describe, timed
from transformers.utils import logging as transformers_logging

from lcc_lens.core.files import write_json
from lcc_lens.core.reading import read_json
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.models.hooked.losses import sequence_loss
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve
from lcc_lens.pruning.calibration.texts import calibration_tokens
from lcc_lens.pruning.jobs import prune

CALIBRATION = {"calibration": "c4", "n_samples": 64, "seq_len": 512}
LENGTH, EVERY = 512, 8
METHODS: dict[str, dict[str, Any]] = {
    "wanda 50%": {"method": "wanda", "sparsity": 0.5},
    "sparsegpt 50%": {"method": "sparsegpt", "sparsity": 0.5},
    "wanda 2:4": {"method": "wanda", "pattern": "2:4"},
    "sparsegpt 2:4": {"method": "sparsegpt", "pattern": "2:4"},
}
for share in (0.1, 0.2, 0.3):
    slimgpt = {"method": "slimgpt", "sparsity": share}
    METHODS |= {
        f"slimgpt zeroed, split by error {share:.0%}": {**slimgpt, "split": "error"},
        f"slimgpt sliced {share:.0%}": {**slimgpt, "sliced": True},
        f"smallest heads {share:.0%}": {**slimgpt, "sliced": True, "choice": "magnitude"},
        f"random heads {share:.0%}": {**slimgpt, "sliced": True, "choice": "random"},
    }
# As many heads as the controls remove: what sparing them is worth.
METHODS["slimgpt sliced, heads in proportion 20%"] = {**METHODS["slimgpt sliced 20%"], "split": "proportional"}
METHODS["slimgpt zeroed 20%"] = {"method": "slimgpt", "sparsity": 0.2}
# One cell each: the smallest heads draw nothing and read no data; the others only fill in the picture.
ONCE = ("smallest heads", "slimgpt zeroed", "slimgpt sliced, heads in proportion")


def blocks() -> list[Any]:
    tokenizer = load_tokenizer(resolve("smollm2"))
    return encode(load_data("wikitext", role="held-out"), tokenizer, max_length=LENGTH)[::EVERY]


def measure(path: Path, sequences: list[Any]) -> dict[str, float]:
    loss = sequence_loss(load_plain(path), sequences, batch_tokens=4096)
    return {"perplexity": loss["perplexity"], "loss": loss["loss"], "tokens": loss["tokens"]}


def cell(name: str, seed: int, sequences: list[Any], folder: Path) -> dict[str, Any]:
    """Prune and measure one model, unless that was done before."""
    note = folder / f"{name.replace(' ', '_').replace(':', '-')}_{seed}.json"
    if note.exists():
        return read_json(note)
    model = folder / "model"
    start = time.perf_counter()
    report = prune("smollm2", model, seed=seed, overwrite=True, **CALIBRATION, **METHODS[name])
    seconds = time.perf_counter() - start
    found = {
        "seed": seed,
        **measure(model, sequences),
        "sparsity": report.get("share_removed", report["sparsity"]),
        "prune_seconds": round(seconds, 1),
    }
    shutil.rmtree(model)
    write_json(note, found)
    return found


def two_passes(seed: int, folder: Path) -> float:
    """Seconds of two passes of the body over the calibration tokens, in the batches that pruning uses."""
    note = folder / f"two_passes_{seed}.json"
    if not note.exists():
        path = resolve("smollm2")
        data = load_data(CALIBRATION["calibration"], role="calibration")
        tokens = calibration_tokens(data, path, CALIBRATION["n_samples"], CALIBRATION["seq_len"], seed)
        body = load_plain(path).get_decoder()

        def passes() -> None:
            with torch.inference_mode():
                for batch in [*tokens.split(8), *tokens.split(8)]:
                    body(batch.to(body.device), use_cache=False)

        write_json(note, {"seconds": round(timed(passes), 1)})
    return read_json(note)["seconds"]


def dense(sequences: list[Any], folder: Path) -> dict[str, Any]:
    note = folder / "dense.json"
    if not note.exists():
        write_json(note, measure(resolve("smollm2"), sequences))
    return read_json(note)


def summary(cells: list[dict[str, Any]]) -> dict[str, float]:
    values = [cell["perplexity"] for cell in cells]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), 3), "stdev": round(spread, 3), "n": len(values)}


def times(cells: list[dict[str, Any]], passes: list[float]) -> dict[str, float]:
    """A pruner's seconds over those of two forward passes, seed by seed."""
    ratios = sorted(cell["prune_seconds"] / passes[cell["seed"]] for cell in cells)
    keys = ("median", "smallest", "largest")
    return {key: round(v, 3) for key, v in zip(keys, (statistics.median(ratios), ratios[0], ratios[-1]), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pruning_quality.json")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    sequences = blocks()
    result: dict[str, Any] = {
        "command": "python benchmarks/pruning_quality.py",
        "model": "smollm2",
        "calibration": CALIBRATION,
        "measured_on": f"wikitext-2 test, every {EVERY}th of its blocks of {LENGTH} tokens",
        "machine": describe(),
        "dense": dense(sequences, arguments.folder),
        "methods": {},
    }
    print(f"dense  {result['dense']['perplexity']:.2f}", flush=True)
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    passes: list[float] = []
    for seed in range(arguments.seeds):
        passes.append(two_passes(seed, arguments.folder))
        result["two_passes_seconds"] = passes
        for name in arguments.methods:
            if seed > 0 and name.startswith(ONCE):
                continue
            cells[name].append(cell(name, seed, sequences, arguments.folder))
            last = cells[name][-1]
            print(f"{name} seed {seed}  {last['perplexity']:.2f}  ({last['prune_seconds']} s)", flush=True)
            done = {name: found for name, found in cells.items() if found}
            result["methods"] = {
                name: {**summary(found), "time / two passes": times(found, passes), "cells": found}
                for name, found in done.items()
            }
            write_json(arguments.out, result)


if __name__ == "__main__":
    main()
