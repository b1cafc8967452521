"""Scores as Hugging Face's evaluation results: ``.eval_results/*.yaml``, which the hub shows beside a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import write_text
from lcc_lens.core.outputs.folders import claim_files, require_claimable
from lcc_lens.core.ranges import ranged
from lcc_lens.core.reading import read_text
from lcc_lens.data.registry import DATASETS
from lcc_lens.data.sources import local_splits
from lcc_lens.exporters.measured import Score, task_notes
from lcc_lens.exporters.model_card import with_evaluation
from lcc_lens.restoration.record import RestorationRecord

FOLDER = ".eval_results"
#: The scores of other models: the hub reads the folder above alone, so none of them counts as this model's.
COMPARED = f"{FOLDER}/compared"
#: Begins the names of files that ``eval`` adds to an export.
_EVALUATION = "eval_"
_CARD = "README.md"


def write_eval_results(folder: Path, scores: Sequence[Score], own: str, notes: str, prefix: str = "") -> list[str]:
    """Write a file for each model's scores on data sets of the hub; gives the names of the files.

    A perplexity counts only on sets that are text themselves: those that borrow a benchmark's passages are left out.

    Args:
        folder: the exported directory.
        scores: of all models.
        own: the model that the directory holds.
        notes: what all scores of the directory's model share, added to their own notes.
        prefix: begins the names of the files.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from yaml import safe_dump  # a dependency of huggingface_hub

    entries: dict[str, list[EvalResultEntry]] = {}
    for score in scores:
        if score.data not in DATASETS:  # a file of one's own
            continue
        spec = DATASETS[score.data]
        if spec.hub is None or (score.metric == "perplexity" and spec.embedded):
            continue
        name, configuration = spec.hub
        said = "; ".join(part for part in (score.notes, notes if score.model == own else "") if part)
        entry = EvalResultEntry(
            name, configuration or "default", round(score.value, 6), _revision(score.data, name), notes=said
        )
        entries.setdefault(score.model, []).append(entry)
    files = {_file(model, own, prefix): found for model, found in entries.items()}
    for file, found in files.items():
        write_text(folder / file, safe_dump(eval_result_entries_to_yaml(found), sort_keys=False, width=1000))
    return list(files)


def require_export(directory: str | Path, models: Sequence[str], own: str) -> None:
    """Refuse, before models are measured, a directory that :func:`add_evaluation` cannot add their results to.

    Args:
        directory: what :func:`lcc_lens.export` wrote.
        models: the names of all models in the results.
        own: the name of the directory's model among them.

    Raises:
        RequestError: no model card, or a file of the same name is not this program's.
    """
    folder = Path(directory)
    if not (folder / _CARD).is_file():
        raise RequestError(f"expected an export with its model card, got no {_CARD} in {folder}; name another folder")
    require_claimable(folder, _files(models, own))


@ranged
def add_evaluation(directory: str | Path, results: Mapping[str, Any], model: str) -> list[str]:
    """Add the results of :func:`lcc_lens.evaluate` to an exported directory's model card and evaluation results.

    Earlier results that were added are replaced.

    Args:
        directory: what :func:`lcc_lens.export` wrote.
        results: scores of this and of other models on the same tasks.
        model: the name of the directory's model in the results.

    Returns:
        The names of the files in ``.eval_results``.

    Raises:
        RequestError: the results have no such model, or see :func:`require_export`.
    """
    if model not in results["models"]:
        names = ", ".join(results["models"])
        raise RequestError(f"expected results of {model}, got those of {names}; evaluate the directory, too")
    settings = results["settings"]
    limit = "" if settings["limit"] is None else f", the first {settings['limit']}"
    by = f"{results['harness']}, lcc_lens {results['version']}"
    scores = []
    for name, measured in results["models"].items():
        for task, found in measured["tasks"].items():
            if "acc" in found:
                scores.append(Score(name, task, "acc", found["acc"], f"{task_notes(found)}{limit}; {by}"))
            elif "perplexity" in found:
                blocks = f"{found['sequences']} blocks of {settings['length']} tokens"
                scores.append(Score(name, task, "perplexity", found["perplexity"], f"perplexity of {blocks}; {by}"))
    folder = Path(directory)
    claim_files(folder, _files(list(results["models"]), model))
    rows = {name: _row(measured["tasks"]) for name, measured in results["models"].items()}
    card = folder / _CARD
    write_text(card, with_evaluation(read_text(card), f"Measured by lcc-lens eval ({by})", rows))
    return write_eval_results(folder, scores, model, "", _EVALUATION)


def made_by(record: RestorationRecord) -> str:
    """What made a restored model: method, seed, version, and the weights that it was restored from."""
    return (
        f"restored by {record.method_shown} (lcc_lens {record.version}, seed {record.seed}) from weights with SHA-256 "
        f"{record.pruned_sha256[:16]}"
    )


def _row(tasks: Mapping[str, Any]) -> dict[str, str]:
    """A model's scores by task, as the card shows them."""
    return {
        task: f"{found['acc']:.1%} ± {found['stderr']:.1%}" if "acc" in found else f"loss {found['loss']:.4f}"
        for task, found in tasks.items()
    }


def _files(models: Sequence[str], own: str) -> list[str]:
    """The files of an export that results of models are added to."""
    return [_CARD, *(_file(name, own, _EVALUATION) for name in models)]


def _file(model: str, own: str, prefix: str) -> str:
    """Where a model's scores stand: this model's where the hub looks."""
    name = prefix + re.sub(r"[^\w.-]+", "_", model)
    return f"{FOLDER}/{name}.yaml" if model == own else f"{COMPARED}/{name}.yaml"


def _revision(data: str, repository: str) -> str | None:
    """The commit of a data set that was read from the hub's cache; None for local data, whose commit is not known."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="dataset")
    head = folder / "refs" / "main"
    return None if local_splits(data) or not head.is_file() else head.read_text(encoding="ascii").strip() or None
