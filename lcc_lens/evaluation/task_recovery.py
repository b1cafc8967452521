"""Task-specific recovery: train on a few right answers of one task, then measure that task and other text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from lcc_lens.core.errors import RequestError
from lcc_lens.core.metrics import bootstrap_interval, share_recovered, stratified_interval
from lcc_lens.core.ranges import Count, Length, Seed, check_numbers, ranged
from lcc_lens.core.reading import read_record, write_record
from lcc_lens.core.registry import nearest
from lcc_lens.data.batches import TokenSequence
from lcc_lens.data.datasets import Data, encode, load_data, load_records
from lcc_lens.data.prompts import Record, RecoveryTask
from lcc_lens.data.registry import data_kind
from lcc_lens.data.splits import split_examples
from lcc_lens.evaluation.evaluate import Evaluation, check_tasks
from lcc_lens.evaluation.lm_eval_tasks import evaluate_task, harness_version
from lcc_lens.models.hooked.fused_attention import fused_attention
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.losses import sequence_loss
from lcc_lens.models.hooked.weights import plain_model
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.run_folder import RUN_METRICS

RECOVERY_TASKS: tuple[str, ...] = get_args(RecoveryTask)
#: Default number of training examples and epochs; the paper takes 100 to 200 examples.
TASK_EXAMPLES, TASK_EPOCHS = 200, 3


@ranged
def load_task_data(task: str, examples: int = TASK_EXAMPLES, *, seed: int = 0) -> tuple[Data, Data]:
    """A task's training examples, and validation examples that choose the best parameters; they share no group.

    A response is the right answer to lm-eval's prompt. Validation examples, a tenth as many and at least 8, have the
    role ``train`` too, so that the held-out items are only measured.

    Args:
        task: one of :data:`RECOVERY_TASKS`.
        examples: training examples, 100 to 200 in the paper.
        seed: of the draw.

    Raises:
        RequestError: another task, or too few examples.

    Reference:
        Feng et al., arXiv 2510.21834: task-specific recovery.
    """
    if task not in RECOVERY_TASKS:
        raise RequestError(
            f"expected a task to recover ({', '.join(RECOVERY_TASKS)}), got {task!r}; {nearest(task, RECOVERY_TASKS)}"
        )
    if examples < 2:
        raise RequestError(f"expected at least 2 training examples of {task}, got {examples}; raise the number")
    n_validation = max(8, examples // 10)
    # more than needed, since examples that share a group with a training example are left out
    drawn = load_data(task, examples + 4 * n_validation, role="train", seed=seed)
    training, rest = split_examples(drawn, examples)
    validation = replace(rest, examples=rest.examples[:n_validation])
    if len(training) < examples or len(validation) < n_validation:
        raise RequestError(
            f"expected {examples} training examples of {task} and {n_validation} more to validate on, got "
            f"{len(drawn)} in {drawn.source}; lower the number of examples or add data"
        )
    return training, validation


@dataclass(frozen=True)
class TaskMeasures:
    """Data for measuring a task's recovery.

    Args:
        task: its held-out items are scored.
        items: how many of them, drawn with ``seed``; all if None.
        text: a corpus of another kind, whose perplexity shows the effect on other text.
        blocks: maximum of blocks of the corpus.
        block_length: maximum of tokens per block.
        seed: of the draw.
    """

    task: RecoveryTask
    items: Count | None = 500
    text: str = "wikitext"
    blocks: Count = 16
    block_length: Length = 512
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_numbers(self)

    def check(self) -> None:
        """Refuse a task or text without data before anything is trained."""
        if data_kind(self.text) not in (None, "text"):
            raise RequestError(f"expected running text to measure perplexity on, got {self.text}; name a corpus")
        check_tasks((self.task, self.text))

    def of(self, restoration: Restoration, pair: Pair, *, pruned: str | Path | None = None) -> Evaluation:
        """Score the dense, the pruned and the restored model on the same held-out items and text.

        Args:
            restoration: what was restored.
            pair: the models it belongs to.
            pruned: the pruned model, if the pair has one that was refitted from it.

        Returns:
            ``models`` as in ``results.json``, with ``items`` (1 for each one right), ``harness`` and ``seed``, ``gain``
            in accuracy over the pruned model, ``share_recovered`` of the lost accuracy, and their 95 % intervals from
            resampled items (None if nothing was lost; the interval None if it includes no loss).
        """
        records = load_records(self.task, self.items, role="held-out", seed=self.seed)
        length = min(self.block_length, pair.context)
        blocks = encode(
            load_data(self.text, role="held-out"), pair.tokenizer, max_length=length, limit=self.blocks
        )  # fmt: skip
        models = {"dense": {"tasks": self._hooked(pair.dense, pair, records, blocks)}}
        if pruned is None:
            models["pruned"] = {"tasks": self._hooked(pair.pruned, pair, records, blocks)}
        else:
            path = resolve(pruned)
            models["pruned"] = {"tasks": self._scores(load_plain(path), load_tokenizer(path), records, blocks)}
        with restoration.applied_to(pair.pruned) as restored:
            models["restored"] = {"tasks": self._hooked(restored, pair, records, blocks)}
        about = {"task": self.task, "text": self.text, "seed": self.seed, "harness": harness_version()}
        return Evaluation(models=models, **about, **self._gain(models))

    def _hooked(
        self, model: HookedModel, pair: Pair, records: Sequence[Record], blocks: Sequence[TokenSequence]
    ) -> dict[str, Any]:
        with fused_attention(model):
            plain = plain_model(model)
            return self._scores(plain, pair.tokenizer, records, blocks)

    def _scores(
        self, plain: Any, tokenizer: Any, records: Sequence[Record], blocks: Sequence[TokenSequence]
    ) -> dict[str, Any]:
        scored = evaluate_task(plain, tokenizer, self.task, records=records, with_items=True)
        return {self.task: scored, self.text: sequence_loss(plain, blocks)}

    def _gain(self, models: dict[str, Any]) -> dict[str, Any]:
        scores = {name: model["tasks"][self.task] for name, model in models.items()}
        right = {name: [float(item) for item in score["items"]] for name, score in scores.items()}
        gained = [r - p for r, p in zip(right["restored"], right["pruned"], strict=True)]
        lost = [d - p for d, p in zip(right["dense"], right["pruned"], strict=True)]
        interval = stratified_interval([gained], [lost])
        errors = (1 - scores[name]["acc"] for name in ("dense", "pruned", "restored"))
        return {
            "gain": scores["restored"]["acc"] - scores["pruned"]["acc"],
            "gain_interval": list(bootstrap_interval(gained)),
            "share_recovered": share_recovered(*errors),
            "share_interval": None if interval is None else list(interval),
        }


def note_task(run: Path, measured: dict[str, Any]) -> None:
    """Add the measured recovery to the run's ``metrics.json``."""
    write_record(run / RUN_METRICS, {**read_record(run / RUN_METRICS, dict[str, Any]), "recovery": measured})
