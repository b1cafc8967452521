"""Evaluate plain Hugging Face models on tasks: perplexity of text, response loss, and zero-shot accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.config import package_version
from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Count, Length, ranged
from lcc_lens.core.showing import Record
from lcc_lens.data.batches import TokenSequence
from lcc_lens.data.checks import check_data
from lcc_lens.data.datasets import Data, encode, load_data
from lcc_lens.data.registry import DATASETS, is_self_written, named_kind, without_self_written
from lcc_lens.data.user_files import is_data_file
from lcc_lens.evaluation.lm_eval_tasks import check_task, evaluate_task, harness_version
from lcc_lens.models.architecture.context import context_of, fitting_length
from lcc_lens.models.architecture.layers import read_config
from lcc_lens.models.architecture.whole_weights import require_complete
from lcc_lens.models.hooked.losses import sequence_loss
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

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
    references: Sequence[str | Path],
    tasks: Sequence[str | Path],
    *,
    limit: Count | None = None,
    length: Length | None = None,
    on_task: Callable[[Evaluation], None] | None = None,
) -> Evaluation:
    """The contents of ``results.json``: the scores of every model on every task, by the model's name.

    Args:
        references: the models; for ``tasks``, ``limit`` and ``length`` see :func:`evaluate_model`.
        on_task: called after every task with the results so far, whose ``missing`` names each model's tasks to come.

    Raises:
        RequestError: an unknown task or model, or data that cannot serve, checked before the first model is loaded.
    """
    if not references:
        raise RequestError("expected at least one model, got none; name some")
    named = [str(task) for task in tasks]
    check_tasks(named)
    paths = [resolve(reference) for reference in references]
    for path in paths:
        require_complete(Checkpoint(path))
    contexts = [context for path in paths if (context := context_of(read_config(path))) is not None]
    length = fitting_length(length, min(contexts, default=None), option="--length")  # perplexity depends on it
    data = _loss_data(named, limit)
    measurable = [_Measurable.on(data, path, limit, length) for path in paths]
    names, models = unique_names(references), dict[str, Scores]()
    about = {"settings": {"limit": limit, "length": length}, "harness": harness_version(), "version": package_version()}
    for name, reference, model in zip(names, references, measurable, strict=True):
        measured: dict[str, Scores] = {}
        for task, scores in model.scores(named):
            measured[task] = scores
            models[name] = {"path": str(reference), "tasks": dict(measured)}
            if on_task is not None:
                on_task(Evaluation(models=dict(models), **about, **_missing(names, named, models)))
    return Evaluation(models=models, **about)


@ranged
def evaluate_model(
    reference: str | Path,
    tasks: Sequence[str | Path],
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
    named = [str(task) for task in tasks]
    check_tasks(named)
    path = resolve(reference)
    length = fitting_length(length, context_of(read_config(path)), option="--length")
    measurable = _Measurable.on(_loss_data(named, limit), path, limit, length)
    return {"path": str(reference), "tasks": dict(measurable.scores(named, dtype))}


@dataclass(frozen=True)
class _Measurable:
    """A model that is not loaded yet, and the data of the loss tasks as its tokenizer reads them."""

    path: Path
    tokenizer: PreTrainedTokenizerBase
    data: Mapping[str, Data]
    sequences: Mapping[str, Sequence[TokenSequence]]
    limit: int | None

    @classmethod
    def on(cls, data: Mapping[str, Data], path: Path, limit: int | None, length: int) -> _Measurable:
        """Encode the data; refuses those that give no sequence."""
        tokenizer = load_tokenizer(path)
        sequences = {task: encode(part, tokenizer, max_length=length, limit=limit) for task, part in data.items()}
        return cls(path, tokenizer, data, sequences, limit)

    def scores(self, tasks: Sequence[str], dtype: torch.dtype | None = None) -> Iterator[tuple[str, Scores]]:
        """Load the model, and score one task after another."""
        model = load_plain(self.path, dtype=dtype)
        for task in tasks:
            if task in self.data:
                yield task, _named_loss(self.data[task], sequence_loss(model, self.sequences[task]))
            else:
                yield task, evaluate_task(model, self.tokenizer, task, limit=self.limit)


def _missing(names: Sequence[str], tasks: Sequence[str], models: Mapping[str, Scores]) -> dict[str, Any]:
    """The tasks of every model that are not measured yet, as part of unfinished results."""
    measured = {name: models[name]["tasks"] if name in models else () for name in names}
    missing = {name: [task for task in tasks if task not in done] for name, done in measured.items()}
    missing = {name: rest for name, rest in missing.items() if rest}
    return {"missing": missing} if missing else {}


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
    """Refuse, before any model is loaded, unknown tasks and tasks without data or without a score that is known here.

    Raises:
        RequestError: names the nearest task, or what is missing.
    """
    if not tasks:
        raise RequestError(f"expected at least one task, got none; name some of {', '.join(DATASETS)}")
    losses = [task for task in tasks if is_loss_task(task)]
    if own := next(filter(is_self_written, losses), None):
        raise RequestError(
            f"expected text that is the same for every model, got {own}, which the dense model writes; name "
            f"{without_self_written(own) or 'other data'}"
        )
    check_data(losses)
    for task in tasks:
        if task not in losses:
            check_task(task)


def is_loss_task(task: str) -> bool:
    """Whether a task is measured by a loss of ours rather than by an accuracy of lm-eval's."""
    return is_data_file(task) or named_kind(task) in ("text", "instruction")


def _loss_data(tasks: Sequence[str], limit: int | None) -> dict[str, Data]:
    """The data of the loss tasks: all of a file, the held-out part of a named set."""
    data = {}
    for task in filter(is_loss_task, tasks):
        # the limit counts blocks of text or responses; no more responses need to be read
        n = limit if named_kind(task) == "instruction" else None
        data[task] = load_data(task, n, role=None if is_data_file(task) else "held-out")
    return data


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
