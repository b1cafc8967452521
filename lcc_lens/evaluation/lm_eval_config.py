"""Configurations by which plain lm-eval measures the same accuracies as ``lcc-lens eval``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lcc_lens.core.config import compute_dtype, default_device
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import write_text
from lcc_lens.core.outputs.folders import claim_files, require_claimable
from lcc_lens.evaluation.evaluate import is_loss_task, unique_names
from lcc_lens.evaluation.lm_eval_tasks import HARNESS_FOLDERS, request_length, write_local_task
from lcc_lens.models.architecture.layers import read_config
from lcc_lens.models.loading.references import resolve


def require_lm_eval_configs(folder: str | Path, references: Sequence[str | Path], tasks: Sequence[str]) -> None:
    """Refuse, before models are measured, what :func:`write_lm_eval_configs` refuses.

    Raises:
        RequestError: none of the tasks is lm-eval's, or a file of the same name is not this program's.
    """
    accuracy_tasks(tasks)
    require_claimable(Path(folder).resolve(), _names(references))


def write_lm_eval_configs(
    folder: str | Path, references: Sequence[str | Path], tasks: Sequence[str], *, limit: int | None = None
) -> list[Path]:
    """Write a configuration for each model: ``lm-eval run --config FILE`` then gives the accuracies of ``evaluate``.

    Tasks with local data read their items from files in ``folder/tasks``, so that nothing is fetched. Both compute in
    the same format; log-likelihoods are float32 in both.

    Args:
        folder: for the files.
        references: the models.
        tasks: tasks of lm-eval; perplexities and losses of :func:`~lcc_lens.evaluation.evaluate.evaluate` are its own
            and left out.
        limit: the first items of each task at most.

    Returns:
        A file for each model.

    Raises:
        RequestError: see :func:`require_lm_eval_configs`.
    """
    from yaml import safe_dump

    own = accuracy_tasks(tasks)
    folder = Path(folder).resolve()
    names = _names(references)
    claim_files(folder, names)
    (folder / "tasks").mkdir(exist_ok=True)
    for task in own:
        if task in HARNESS_FOLDERS:
            write_local_task(task, folder / "tasks")
    device = default_device()
    files = []
    for name, reference in zip(names, references, strict=True):
        path = resolve(reference)
        model = {
            "pretrained": str(Path(path).resolve()), "dtype": str(compute_dtype(device)).removeprefix("torch."),
            "softmax_dtype": "float32", "max_length": request_length(read_config(path)),
        }  # fmt: skip
        config = {
            "model": "hf", "model_args": model, "tasks": own, "include_path": str(folder / "tasks"), "limit": limit,
            "batch_size": 1, "device": str(device),
        }  # fmt: skip
        write_text(folder / name, safe_dump(config, sort_keys=False))
        files.append(folder / name)
    return files


def accuracy_tasks(tasks: Sequence[str]) -> list[str]:
    """The tasks that lm-eval scores.

    Raises:
        RequestError: none of them.
    """
    own = [task for task in tasks if not is_loss_task(task)]
    if not own:
        raise RequestError(f"expected a task of lm-eval's, got {', '.join(tasks)}; add one such as boolq")
    return own


def _names(references: Sequence[str | Path]) -> list[str]:
    """A file for each model."""
    return [f"{Path(name).name}.yaml" for name in unique_names(references)]
