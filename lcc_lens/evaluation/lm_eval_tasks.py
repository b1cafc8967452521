"""Run lm-eval's tasks on a model, with items from local data sets where there are any."""

from __future__ import annotations

import functools
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcc_lens.core import hub
from lcc_lens.core.config import tokens_per_pass
from lcc_lens.core.errors import RequestError, first_line
from lcc_lens.core.machine.garbage import uncollected
from lcc_lens.core.progress import track
from lcc_lens.data.prompts import Record
from lcc_lens.data.registry import DATASETS
from lcc_lens.data.sources import available_splits, read_records
from lcc_lens.models.architecture.context import context_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: lm-eval's folders of the task files for our data sets; its whole index takes most of a minute to read.
HARNESS_FOLDERS = {
    "boolq": "super_glue/boolq",
    "rte": "glue/rte",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "openbookqa": "openbookqa",
    "piqa": "piqa",
}


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    limit: int | None = None,
    records: Sequence[Record] | None = None,
    batch_tokens: int | None = None,
    with_items: bool = False,
) -> dict[str, Any]:
    """Zero-shot accuracy on one of lm-eval's tasks, with its prompts, scoring and standard error.

    Args:
        task: a named data set, or any task that lm-eval knows (needs the hub).
        records: the items to use instead of the task's own evaluation split.
        batch_tokens: padded tokens per forward pass; 1024 on a CPU and 4096 on a GPU if not given.
        with_items: also return whether each item was right, for paired comparisons.

    Returns:
        ``acc``, ``stderr``, ``n``, and ``acc_norm`` if the task has it; ``items``, if requested, as a string of 1
        (right) and 0 (wrong).
    """
    with uncollected():
        from lm_eval import evaluate as run_lm_eval

        from lcc_lens.evaluation.answers.scorer import AnswerScorer

    with tempfile.TemporaryDirectory() as folder, _quiet(f"task {task}"):
        max_tokens = batch_tokens or tokens_per_pass(model.device)
        lm = AnswerScorer(model, tokenizer, max_length=request_length(model.config), max_tokens=max_tokens)
        loaded = _loaded(task, Path(folder), records, limit)
        results = run_lm_eval(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=with_items)
    scores = next(iter(results["results"].values()))
    n = next(iter(results["n-samples"].values()))["effective"]
    accuracy = float(scores["acc,none"])
    scored: dict[str, Any] = {"acc": accuracy, "stderr": math.sqrt(accuracy * (1 - accuracy) / max(n - 1, 1)), "n": n}
    if "acc_norm,none" in scores:
        scored["acc_norm"] = float(scores["acc_norm,none"])
    if with_items:
        samples = sorted(next(iter(results["samples"].values())), key=lambda sample: sample["doc_id"])
        scored["items"] = "".join(str(int(sample["acc"])) for sample in samples)
    return scored


def request_length(config: Any) -> int:
    """The tokens of a request at most; longer ones are cut from the left."""
    return min(context_of(config) or 2048, 2048)


def harness_version() -> str:
    """lm-eval's name and version, which results record."""
    return f"lm-eval {version('lm-eval')}"


def check_task(task: str) -> None:
    """Refuse a task of lm-eval's that cannot be measured, by loading it.

    Raises:
        RequestError: lm-eval has no such task, its data cannot be had, or it is not scored by accuracy.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet(f"task {task}"):
        _loaded(task, Path(folder), None, 1)


def _loaded(task: str, folder: Path, records: Sequence[Record] | None, limit: int | None) -> Any:
    """A task as lm-eval loads it; it reads our records where there are any."""
    if task in HARNESS_FOLDERS:
        from lm_eval.tasks import TaskManager

        write_local_task(task, folder, records, limit)
        return TaskManager(include_path=str(folder), include_defaults=False).load([task])
    manager = _all_tasks()
    if task not in manager.all_tasks:
        near = get_close_matches(task, [*DATASETS, *manager.all_tasks], n=1)
        hint = f"did you mean {near[0]!r}, or " if near else ""
        raise RequestError(
            f"expected a task, got {task!r}; {hint}choose one of {', '.join(DATASETS)}, a .jsonl or .txt file, or one "
            "of lm-eval's tasks"
        )
    hub.reach()
    try:
        loaded = manager.load([task])
    except Exception as error:  # offline, unreachable, gated: the library raises many types
        raise RequestError(
            f"expected the data of lm-eval's task {task}, got none ({first_line(error)}); let the hub be reached, or "
            "leave the task out"
        ) from error
    if not any("acc" in part.aggregation() for part in loaded["tasks"].values()):
        raise RequestError(f"expected a task scored by accuracy, got {task}; run it with lm-eval itself")
    return loaded


@functools.cache
def _all_tasks() -> Any:
    """lm-eval's own tasks, whose files take seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def write_local_task(
    task: str, folder: Path, records: Sequence[Record] | None = None, limit: int | None = None
) -> None:
    """Write one of our data sets' tasks as a task of lm-eval's that reads its items from a file beside it.

    It has the name of lm-eval's own task and is found first where lm-eval is told to include the folder.

    Args:
        task: one of :data:`HARNESS_FOLDERS`.
        folder: gets the items and the task's file.
        records: the items; those of the task's own evaluation split if not given.
        limit: only the first items, which are all that lm-eval's own limit takes.

    Raises:
        RequestError: no source of the split.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder_of_task = Path(lm_eval.__file__).parent / "tasks" / HARNESS_FOLDERS[task]
    entry = TaskManager(include_path=str(folder_of_task), include_defaults=False).task_index[task]
    evaluated = str(entry.cfg.get("test_split") or entry.cfg["validation_split"])
    if records is None:
        splits = available_splits(task)
        evaluated = evaluated if evaluated in splits else "validation"
        if evaluated not in splits:
            raise RequestError(f"expected a validation split of {task}, got {', '.join(splits)}; add the file")
        records, _ = read_records(task, evaluated)
    items, file = folder / f"{task}_items.jsonl", folder / f"{task}.yaml"
    items.write_text(
        "".join(json.dumps(_with_hub_fields(task, record)) + "\n" for record in records[:limit]), encoding="utf-8"
    )
    settings = {
        "include": str(entry.yaml_path),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(items)}, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "fewshot_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
    file.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML


def _with_hub_fields(task: str, record: Record) -> Mapping[str, Any]:
    """A record with the field names that lm-eval's prompts read, which some copies of the data sets change."""
    if task == "boolq" and "label" not in record:
        return {**record, "label": int(record["answer"])}
    if task == "rte" and "sentence1" not in record:
        return {**record, "sentence1": record["premise"], "sentence2": record["hypothesis"]}
    return record


class _Bar:
    """Replaces lm-eval's tqdm bar and advances one of ours."""

    def __init__(self, description: str, total: int) -> None:
        self._ticks = track(range(total), total, description)

    def update(self, n: int = 1) -> None:
        for _ in range(n):
            next(self._ticks, None)

    def close(self) -> None:
        for _ in self._ticks:
            pass


@contextmanager
def _quiet(description: str) -> Iterator[None]:
    """Silence lm-eval's and datasets' messages, and show lm-eval's progress in one of our bars."""
    import datasets
    from lm_eval.api import model, task
    from lm_eval.models import huggingface

    names = ("lm_eval", "lm-eval", "datasets")
    levels = {name: logging.getLogger(name).level for name in names}
    was_on = datasets.is_progress_bar_enabled()
    bars: dict[Any, Any] = {
        huggingface: lambda *args, total=0, **kwargs: _Bar(description, total),
        model: lambda items, *args, **kwargs: items,
        task: lambda items, *args, **kwargs: items,
    }
    originals = {module: vars(module)["tqdm"] for module in bars}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for module, bar in bars.items():
        vars(module)["tqdm"] = bar
    try:
        yield
    finally:
        for module, bar in originals.items():
            vars(module)["tqdm"] = bar
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if was_on:
            datasets.enable_progress_bars()
