"""Evaluate plain Hugging Face models on tasks: perplexity of text, response loss, and zero-shot accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.config import package_version
from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Count, Length, ranged
from lcc_lens.core.showing import Record
from lcc_lens.data.checks import check_data
from lcc_lens.data.datasets import Data, encode, load_data
from lcc_lens.data.registry import DATASETS, named_kind
from lcc_lens.data.user_files import is_data_file
from lcc_lens.evaluation.lm_eval_tasks import HARNESS_FOLDERS, evaluate_task, harness_version
from lcc_lens.models.architecture.context import context_of, fitting_length
from lcc_lens.models.architecture.layers import read_config
from lcc_lens.models.architecture.whole_weights import require_complete
from lcc_lens.models.hooked.losses import sequence_loss
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve

if TYPE_CHECKING:
    import pandas as pd

Scores = dict[str, Any]


class Evaluation(Record):
    """Scores of models by name, the contents of ``results.json`` or a part of them."""

    def table(self) -> pd.DataFrame:
        """One row per model and task: the scores that the task has (perplexity, loss, accuracy, standard error)."""
        import pandas as pd

        return pd.DataFrame(
            {"model": name, "task": task, **{key: value for key, value in scores.items() if key != "items"}}
            for name, model in self["models"].items()
            for task, scores in model["tasks"].items()
        )

    def _facts(self) -> dict[str, Any]:
        return {
            name: ", ".join(f"{column} {score}" for column, score in format_scores(model["tasks"]).items())
            for name, model in self["models"].items()
        }


@ranged
def evaluate(
    references: Sequence[str | Path], tasks: Sequence[str], *, limit: Count | None = None, length: Length | None = None
) -> Evaluation:
    """The contents of ``results.json``: the scores of every model on every task, by the model's name."""
    check_tasks(tasks)
    paths = [resolve(reference) for reference in references]
    for path in paths:
        require_complete(Checkpoint(path))  # of every model before the first one runs
    contexts = [context for path in paths if (context := context_of(read_config(path))) is not None]
    length = fitting_length(length, min(contexts, default=None), option="--length")  # perplexity depends on it
    models = {
        name: evaluate_model(reference, tasks, limit=limit, length=length)
        for name, reference, _ in zip(unique_names(references), references, paths, strict=True)
    }
    settings = {"limit": limit, "length": length}
    return Evaluation(models=models, settings=settings, harness=harness_version(), version=package_version())


@ranged
def evaluate_model(
    reference: str | Path,
    tasks: Sequence[str],
    *,
    limit: Count | None = None,
    length: Length | None = None,
    dtype: torch.dtype | None = None,
) -> Scores:
    """Score one model: perplexity on text, response loss on instructions, accuracy on lm-eval's tasks.

    Args:
        tasks: names of data sets or lm-eval tasks, or ``.jsonl``/``.txt`` files.
        limit: maximum of blocks, responses or items per task.
        length: tokens per block of text (perplexity depends on it); 512, or the model's context if shorter.
        dtype: number format of the model; the device's default if not given.

    Raises:
        RequestError: an unknown task or model, checked before the model is loaded.
    """
    check_tasks(tasks)
    path = resolve(reference)
    length = fitting_length(length, context_of(read_config(path)), option="--length")
    model, tokenizer = load_plain(path, dtype=dtype), load_tokenizer(path)
    scores: dict[str, Scores] = {}
    for task in tasks:
        if is_loss_task(task):
            data = _loss_data(task, limit)
            scores[task] = _named_loss(
                data, sequence_loss(model, encode(data, tokenizer, max_length=length, limit=limit))
            )
        else:
            scores[task] = evaluate_task(model, tokenizer, task, limit=limit)
    return {"path": str(reference), "tasks": scores}


def unique_names(references: Sequence[str | Path]) -> list[str]:
    """A short name per model: the last part of its reference, or all of it if two references end alike.

    A repeated reference gets a number, so that no model replaces another.

    Example:
        >>> unique_names(["out/wanda50", "smollm2", "smollm2"])
        ['wanda50', 'smollm2', 'smollm2 (2)']
    """
    distinct = [Path(reference).name for reference in dict.fromkeys(map(str, references))]
    names = [str(ref) if distinct.count(Path(ref).name) > 1 else Path(ref).name for ref in references]
    earlier = [names[:number].count(name) for number, name in enumerate(names)]
    return [name if n == 0 else f"{name} ({n + 1})" for name, n in zip(names, earlier, strict=True)]


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse unknown tasks and tasks without data."""
    if not tasks:
        raise RequestError(f"expected at least one task, got none; name some of {', '.join(DATASETS)}")
    unknown = [task for task in tasks if not is_loss_task(task) and task not in HARNESS_FOLDERS]
    if unknown:
        from lm_eval.tasks import TaskManager

        known = set(TaskManager().all_tasks)
        missing = [task for task in unknown if task not in known]
        if missing:
            near = get_close_matches(missing[0], [*DATASETS, *known], n=1)
            hint = f"did you mean {near[0]!r}, or " if near else ""
            raise RequestError(
                f"expected a task, got {missing[0]!r}; {hint}choose one of {', '.join(DATASETS)}, a .jsonl or .txt "
                "file, or one of lm-eval's tasks"
            )
    check_data(task for task in tasks if is_data_file(task) or task in DATASETS)


def is_loss_task(task: str) -> bool:
    """Whether a task is measured by a loss of ours rather than by an accuracy of lm-eval's."""
    return is_data_file(task) or named_kind(task) in ("text", "instruction")


def _loss_data(task: str, limit: int | None) -> Data:
    if is_data_file(task):
        return load_data(task)
    # the limit counts blocks of text or responses; no more responses need to be read
    return load_data(task, None if named_kind(task) == "text" else limit, role="held-out")


def _named_loss(data: Data, loss: Scores) -> Scores:
    """The scores of a loss task: perplexity first for text, response loss for instructions."""
    keys = ("tokens", "sequences")
    named: Scores = {"perplexity": loss["perplexity"]} if data.kind == "text" else {"response_loss": loss["loss"]}
    return {**named, "loss": loss["loss"], **{key: loss[key] for key in keys}, "source": data.source}


def format_scores(tasks: dict[str, Any]) -> dict[str, str]:
    """One model's scores as text by column title: perplexity, response loss, accuracy ± standard error."""
    columns: dict[str, str] = {}
    for name, scores in tasks.items():
        if "perplexity" in scores:
            columns[f"{name}: perplexity"] = f"{scores['perplexity']:.2f}"
        elif "response_loss" in scores:
            columns[f"{name}: loss"] = f"{scores['response_loss']:.3f}"
        else:
            columns[f"{name}: accuracy (n = {scores['n']})"] = (
                f"{100 * scores['acc']:.1f} ± {100 * scores['stderr']:.1f} %"
            )
    return columns
