"""Evaluation of plain Hugging Face models: perplexity, response loss, and lm-eval's tasks by name."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcc_lens.config import package_version
from lcc_lens.data import Batch, Data, TokenSequence, available_splits, batches, encode, load_data, read_records
from lcc_lens.errors import RequestError
from lcc_lens.metrics import perplexity
from lcc_lens.models import load_plain, load_tokenizer, resolve
from lcc_lens.plain_models import logits_where
from lcc_lens.progress import track
from lcc_lens.tasks import SOURCES, Record
from lcc_lens.token_losses import token_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Scores = dict[str, Any]
#: Folders of lm-eval's own task files for the named data sets: its whole index takes most of a minute to read.
_TASK_FOLDERS = {
    "boolq": "super_glue/boolq",
    "rte": "glue/rte",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "openbookqa": "openbookqa",
    "piqa": "piqa",
}


def sequence_loss(model: PreTrainedModel, sequences: Sequence[TokenSequence], *, batch_tokens: int = 1024) -> Scores:
    """Token-weighted loss of a plain model over the counted tokens of sequences.

    Returns:
        ``loss`` in nats per token, ``perplexity``, ``tokens`` (counted) and ``sequences``.
    """
    total, count = 0.0, 0
    grouped = batches(sequences, max_tokens=batch_tokens)
    with torch.inference_mode():
        for batch in track(grouped, len(grouped), "loss"):
            nll = _batch_nll(model, batch)
            total += float(nll.double().sum())
            count += len(nll)
    return {"loss": total / count, "perplexity": perplexity(total, count), "tokens": count, "sequences": len(sequences)}


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    limit: int | None = None,
    records: Sequence[Record] | None = None,
    batch_tokens: int = 1024,
    with_items: bool = False,
) -> Scores:
    """Zero-shot accuracy on one of lm-eval's tasks, with its prompts, scoring and standard error.

    Args:
        model: a plain model.
        tokenizer: its tokenizer.
        task: a named data set, or any task that lm-eval knows (needs the hub).
        limit: items at most, the first ones.
        records: the items to use instead of the task's own evaluation split.
        batch_tokens: padded tokens per forward pass.
        with_items: also say of each item whether it was right, for paired comparisons.

    Returns:
        ``acc``, ``stderr``, ``n``, and ``acc_norm`` where the task has it; ``items`` as a text of 1 and 0 if wanted.

    Raises:
        RequestError: unknown task, or no data for it.
    """
    from lm_eval import evaluate as run_lm_eval

    from lcc_lens.answer_scoring import AnswerScorer

    with tempfile.TemporaryDirectory() as folder, _quiet(f"task {task}"):
        manager, name = _task_spec(task, Path(folder), records)
        lm = AnswerScorer(model, tokenizer, max_length=_context(model), max_tokens=batch_tokens)
        loaded = manager.load([name])
        results = run_lm_eval(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=with_items)
    scores = next(iter(results["results"].values()))
    n = next(iter(results["n-samples"].values()))["effective"]
    if "acc,none" not in scores:
        raise RequestError(f"wanted a task scored by accuracy, got {task}; run it with lm-eval itself")
    accuracy = float(scores["acc,none"])
    found: Scores = {"acc": accuracy, "stderr": math.sqrt(accuracy * (1 - accuracy) / max(n - 1, 1)), "n": n}
    if "acc_norm,none" in scores:
        found["acc_norm"] = float(scores["acc_norm,none"])
    if with_items:
        samples = sorted(next(iter(results["samples"].values())), key=lambda sample: sample["doc_id"])
        found["items"] = "".join(str(int(sample["acc"])) for sample in samples)
    return found


def evaluate_model(
    reference: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    length: int = 512,
    dtype: torch.dtype | None = None,
) -> Scores:
    """All tasks of one model: perplexity on text, response loss on instructions, accuracy on lm-eval's tasks.

    Args:
        reference: a model reference.
        tasks: names of data sets or lm-eval tasks, or ``.jsonl``/``.txt`` files.
        limit: blocks, responses or items per task at most.
        length: tokens per block of text (perplexity depends on it).
        dtype: compute format.

    Raises:
        RequestError: an unknown task or model, checked before the model is loaded.
    """
    check_tasks(tasks)
    path = resolve(reference)
    model, tokenizer = load_plain(path, dtype=dtype), load_tokenizer(path)
    scores: dict[str, Scores] = {}
    for task in tasks:
        if _is_loss_task(task):
            data = _loss_data(task, limit)
            scores[task] = _named_loss(
                data, sequence_loss(model, encode(data, tokenizer, max_length=length, limit=limit))
            )
        else:
            scores[task] = evaluate_task(model, tokenizer, task, limit=limit)
    return {"path": str(reference), "tasks": scores}


def evaluate(
    references: Sequence[str | Path], tasks: Sequence[str], *, limit: int | None = None, length: int = 512
) -> Scores:
    """The contents of ``results.json``: every task of every model, by the model's name."""
    check_tasks(tasks)
    paths = [resolve(reference) for reference in references]
    models = {
        name: evaluate_model(reference, tasks, limit=limit, length=length)
        for name, reference, _ in zip(unique_names(references), references, paths, strict=True)
    }
    return {"models": models, "settings": {"limit": limit, "length": length}, "version": package_version()}


def unique_names(references: Sequence[str | Path]) -> list[str]:
    """A short name per model: the last part of its reference, or the whole where that is taken twice.

    A reference that is itself given again gets a number, so that no model takes another's place.

    Example:
        >>> unique_names(["out/wanda50", "smollm2", "smollm2"])
        ['wanda50', 'smollm2', 'smollm2 (2)']
    """
    distinct = [Path(reference).name for reference in dict.fromkeys(map(str, references))]
    names = [str(ref) if distinct.count(Path(ref).name) > 1 else Path(ref).name for ref in references]
    earlier = [names[:number].count(name) for number, name in enumerate(names)]
    return [name if n == 0 else f"{name} ({n + 1})" for name, n in zip(names, earlier, strict=True)]


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse unknown tasks, and tasks without data, before any work.

    Raises:
        RequestError: names the task and what there is.
    """
    if not tasks:
        raise RequestError(f"wanted at least one task, got none; name some of {', '.join(SOURCES)}")
    unknown = [task for task in tasks if not _is_loss_task(task) and task not in _TASK_FOLDERS]
    if unknown:
        from lm_eval.tasks import TaskManager

        known = set(TaskManager().all_tasks)
        missing = [task for task in unknown if task not in known]
        if missing:
            raise RequestError(
                f"wanted a task, got {missing[0]!r}; there are {', '.join(SOURCES)}, .jsonl and .txt files, "
                "and lm-eval's tasks"
            )
    for task in tasks:
        if Path(task).suffix in (".jsonl", ".txt") and not Path(task).exists():
            raise RequestError(f"wanted the data file {task}, got nothing there; check the path")
        if task in SOURCES:
            available_splits(task)  # a missing source should not come to light after hours


def _is_loss_task(task: str) -> bool:
    is_file = Path(task).suffix in (".jsonl", ".txt")
    return is_file or (task in SOURCES and SOURCES[task].kind != "contrastive")


def _loss_data(task: str, limit: int | None) -> Data:
    if Path(task).suffix in (".jsonl", ".txt"):
        return load_data(task)
    # Of text the limit counts blocks; of instructions, responses: more of them would be compared for nothing
    return load_data(task, None if SOURCES[task].kind == "text" else limit, role="held-out")


def _named_loss(data: Data, loss: Scores) -> Scores:
    """Text reports its perplexity first, instructions their response loss."""
    keys = ("tokens", "sequences")
    named: Scores = {"perplexity": loss["perplexity"]} if data.kind == "text" else {"response_loss": loss["loss"]}
    return {**named, "loss": loss["loss"], **{key: loss[key] for key in keys}, "source": data.source}


def _batch_nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Loss of every counted token; only their positions reach the unembedding."""
    device = model.device
    logits = logits_where(model, batch.tokens.to(device), batch.is_target().to(device))
    return token_nll(logits, batch.targets().to(device))


def _context(model: PreTrainedModel) -> int:
    return min(int(getattr(model.config.get_text_config(), "max_position_embeddings", 2048)), 2048)


def _task_spec(task: str, folder: Path, records: Sequence[Record] | None) -> tuple[Any, Any]:
    """lm-eval's task manager and its own task, reading our records where we have them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    if task not in _TASK_FOLDERS:
        return TaskManager(), task
    own = Path(lm_eval.__file__).parent / "tasks" / _TASK_FOLDERS[task]
    entry = TaskManager(include_path=str(own), include_defaults=False).task_index[task]
    evaluated = str(entry.cfg.get("test_split") or entry.cfg["validation_split"])
    if records is None:
        splits = available_splits(task)
        evaluated = evaluated if evaluated in splits else "validation"
        if evaluated not in splits:
            raise RequestError(f"wanted a validation split of {task}, got {', '.join(splits)}; add the file")
        records, _ = read_records(task, evaluated)
    file = folder / "items.jsonl"
    file.write_text("".join(json.dumps(_with_hub_fields(task, record)) + "\n" for record in records), encoding="utf-8")
    settings = {
        "include": str(entry.yaml_path),
        "task": f"{task}_local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(file)}, "cache_dir": str(folder)},
        "training_split": None,
        "fewshot_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
    (folder / f"{task}.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return TaskManager(include_path=str(folder), include_defaults=False), f"{task}_local"


def _with_hub_fields(task: str, record: Record) -> Mapping[str, Any]:
    """Fields that lm-eval's prompts read and some copies of the data sets name otherwise."""
    if task == "boolq" and "label" not in record:
        return {**record, "label": int(record["answer"])}
    if task == "rte" and "sentence1" not in record:
        return {**record, "sentence1": record["premise"], "sentence2": record["hypothesis"]}
    return record


class _Bar:
    """Stands in for the tqdm bar within lm-eval and moves ours."""

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
    """Keep lm-eval's and datasets' own notes out of ours, and show its progress as one of our bars."""
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
    theirs = {module: vars(module)["tqdm"] for module in bars}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for module, bar in bars.items():
        vars(module)["tqdm"] = bar
    try:
        yield
    finally:
        for module, bar in theirs.items():
            vars(module)["tqdm"] = bar
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if was_on:
            datasets.enable_progress_bars()
