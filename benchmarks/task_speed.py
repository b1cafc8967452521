"""Time `lcc-lens eval` on the paper's tasks against plain lm-eval, and compare their answers item by item.

    python benchmarks/task_speed.py [--limit 40] [--dtypes float32 bfloat16] [--batch-sizes 1 8]
                                    [--out benchmarks/task_speed.json]

Both score the embedded model, loaded once, on the same items: reading the task, making requests, scoring. Plain lm-eval
is its HFLM with a batch size of 1, its default, and a larger one; `auto`, which first runs the longest request 64 times
over, five times, is no faster on a CPU. Its index of all tasks, which takes most of a minute to read, is left out.
Sides take turns task by task. Where other processes use the cores, set OMP_NUM_THREADS=1 and look at processor seconds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from run import command_given, describe
from transformers.utils import logging as transformers_logging

from lcc_lens.core.config import bound_kernel_cache
from lcc_lens.core.files import write_json
from lcc_lens.evaluation.lm_eval_tasks import _quiet, evaluate_task, request_length, write_local_task
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve

TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def plain_lm_eval(model: Any, tokenizer: Any, task: str, limit: int, batch_size: int) -> str:
    """1 for each item that plain lm-eval finds answered right, 0 for each other one."""
    with tempfile.TemporaryDirectory() as folder, _quiet(task):
        write_local_task(task, Path(folder), limit=limit)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=request_length(model.config))
        loaded = TaskManager(include_path=folder, include_defaults=False).load([task])
        found = lm_eval.evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return "".join(str(int(sample["acc"])) for sample in samples)


def seconds_of(work: Callable[[], str]) -> tuple[str, dict[str, float]]:
    start, start_processor = time.perf_counter(), time.process_time()
    items = work()
    return items, {"s": time.perf_counter() - start, "processor_s": time.process_time() - start_processor}


def measure(dtype: str, limit: int, batch_sizes: list[int]) -> dict[str, Any]:
    """Seconds of both sides by task, their ratios in all, and the number of items that they score differently."""
    path = resolve("smollm2")
    model, tokenizer = load_plain(path, dtype=getattr(torch, dtype)), load_tokenizer(path)
    sides: dict[str, Callable[[str], str]] = {
        "ours": lambda task: evaluate_task(model, tokenizer, task, limit=limit, with_items=True)["items"],
        **{
            f"batch {size}": lambda task, size=size: plain_lm_eval(model, tokenizer, task, limit, size)
            for size in batch_sizes
        },
    }
    evaluate_task(model, tokenizer, "rte", limit=2), plain_lm_eval(model, tokenizer, "rte", 2, 1)
    tasks: dict[str, Any] = {}
    for task in TASKS:
        tasks[task] = {}
        for name, side in sides.items():
            items, seconds = seconds_of(lambda side=side, task=task: side(task))
            tasks[task][name] = {**seconds, "acc": items.count("1") / len(items), "items": items}
    ours = [row["ours"] for row in tasks.values()]
    result: dict[str, Any] = {"n_items": sum(len(row["items"]) for row in ours), "lm-eval": {}, "tasks": tasks}
    for name in list(sides)[1:]:
        theirs = [row[name] for row in tasks.values()]
        pairs = [
            (a["items"][i], b["items"][i]) for a, b in zip(ours, theirs, strict=True) for i in range(len(a["items"]))
        ]
        result["lm-eval"][name] = {
            "ratio": sum(a["s"] for a in ours) / sum(b["s"] for b in theirs),
            "processor_ratio": sum(a["processor_s"] for a in ours) / sum(b["processor_s"] for b in theirs),
            "different_items": sum(a != b for a, b in pairs),
        }
    for row in (row for by_side in tasks.values() for row in by_side.values()):
        row.pop("items")
        row.update({key: round(row[key], 3) for key in row})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=40, help="items of each task")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "task_speed.json")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    bound_kernel_cache()
    measured = {dtype: measure(dtype, arguments.limit, arguments.batch_sizes) for dtype in arguments.dtypes}
    for dtype, found in measured.items():
        for name, row in found["lm-eval"].items():
            print(f"{dtype}, ours / lm-eval with {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in row.items()))
    machine = {**describe(), "load": round(os.getloadavg()[2], 1)}
    write_json(arguments.out, {"command": command_given("--out"), "machine": machine, "dtypes": measured})


if __name__ == "__main__":
    main()
