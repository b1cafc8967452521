"""The subcommand restore: puts back what pruning took, in general or for one task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lcc_lens.analysis.selectors.names import SelectorName
from lcc_lens.core.errors import RequestError
from lcc_lens.core.processes import is_first_process
from lcc_lens.data.prompts import RecoveryTask
from lcc_lens.frontends.cli.options import DenseModel, Placed, PrunedModel, RunPath, load_role
from lcc_lens.frontends.cli.show import show_losses, show_recovery

if TYPE_CHECKING:
    from lcc_lens.analysis.scan.scan import Scan
    from lcc_lens.data.datasets import Data
    from lcc_lens.evaluation.task_recovery import TaskMeasures
    from lcc_lens.models.pair import Pair
    from lcc_lens.restoration.result import Restoration
    from lcc_lens.restoration.training.loop import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Restore(Placed):
    """Find a constant per head that makes up for what pruning took (scans first where RUN holds no scan)."""

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it."""
    run: RunPath
    """The run directory: holds the scan, receives the restoration."""
    method: str = "lcc"
    """lcc: magnitudes over lost directions plus an offset, a constant per head. Its controls: offset without
    directions; mean-shift (the scan's mean difference, nothing trained); random-basis (the same training over random
    directions); mean-shift-sequential (each layer's mean measured behind mended ones; -mlp: MLPs too). mlp-lcc,
    mlp-offset, mlp-mean-shift, mlp-gain: the same at the MLP. Changed weights, whose zeros stay: gain (of head
    outputs), norms, low-rank (on every linear map), masked (all surviving weights). Joined by + they train together:
    lcc+low-rank. best: what brings back most, a refit by least squares and then a low-rank that follows the dense
    model."""
    task: RecoveryTask | None = None
    """Recover this task: train on the right answers of its training split, choose heads on other examples of it,
    then measure the task's held-out items and what another text's perplexity cost. Sets data, examples, epochs."""
    data: str | None = None
    """Training data: instructions, questions or text (alpaca if not given)."""
    examples: int | None = None
    """Training examples at most (480 if not given; 200 of a task, no fewer)."""
    items: int = 500
    """With a task: held-out items to measure at most."""
    text: str = "wikitext"
    """With a task: the other text."""
    heads: float = 0.25
    """Share of all heads to restore."""
    selector: SelectorName = "probe"
    """How heads are chosen."""
    scan_data: str | None = None
    """Data for the scan where RUN holds none (boolq, or the task)."""
    scan_examples: int = 256
    """Examples for that scan."""
    rank: int | None = None
    """Directions per head (all if not given)."""
    mlp_rank: int | None = None
    """Directions per MLP (those that the scan holds if not given)."""
    low_rank: int | None = None
    """Rank of low-rank (8 if not given; best: 16)."""
    refit_samples: int | None = None
    """Calibration sequences of best's refit (288 if not given); fewer take less time and bring less back."""
    start: Literal["zero", "mean"] = "zero"
    """Where the magnitudes start: at the pruned model, or at the mean difference."""
    epochs: int | None = None
    """Passes over the training data (1 if not given; 3 over a task)."""
    batch_size: int = 8
    """Examples per optimiser step."""
    lr: float | None = None
    """AdamW's learning rate of the method's first part (its own if not given; best: 5e-3; a constant's is in units of
    each head's difference); decays linearly to zero."""
    tune_lr: bool = False
    """Choose the learning rate by a few steps at each of five first."""
    objective: str | None = None
    """Minimise the loss of the response (response) or of all tokens (text), the distance to the dense model's
    distribution (distillation) or to its head outputs (heads), or several joined by +, as in text+3*distillation
    (response if not given; best: text+distillation)."""
    temperature: float = 1.0
    """Of distillation."""
    patience: int | None = None
    """Stop after so many validations without a new best."""
    max_length: int = 512
    """Tokens per example at most."""
    shuffle_responses: bool = False
    """A control: train on every prompt with another one's response."""
    hooks_only: bool = False
    """Restore even where the checkpoint cannot hold the result (it then works under hooks alone;
    lcc_lens.load_restored serves it)."""
    checkpoint_every: int = 20
    """Optimiser steps between checkpoints."""
    micro_tokens: int | None = None
    """Padded tokens of one backward pass; a larger batch is split and its gradients accumulated (1024 on a CPU, 4096 on
    a GPU if not given)."""
    reuse: bool = False
    """Compute once per example what no step changes: faster over several epochs, for memory and disk."""
    gradient_checkpointing: bool = False
    """Keep only what enters each layer and compute the rest again for gradients: less memory, a third more time."""
    one_at_a_time: bool = False
    """Hold one model in memory at a time (for methods that do not run both side by side)."""
    seed: int = 0
    """Of the draw and order of the training data."""
    resume: bool = False
    """Go on from the run's checkpoint."""
    overwrite: bool = False
    """Replace a restoration that is there."""

    def execute(self) -> None:
        from lcc_lens.restoration.injections.methods import parse_method
        from lcc_lens.restoration.result import RESTORATION_TENSORS

        if (self.run / RESTORATION_TENSORS).exists() and not (self.overwrite or self.resume):
            raise RequestError(f"{self.run} holds a restoration already; name another run or pass --overwrite")
        if self.task is not None and (self.data is not None or self.scan_data is not None):
            raise RequestError(
                "expected a task or data of your own, got both; leave out --task, or --data and --scan-data"
            )
        if self.method != "best":
            parse_method(self.method)
        elif self.one_at_a_time:
            raise RequestError("expected both models in memory for best, got one at a time; leave out --one-at-a-time")
        measures = self._measures()
        data, validation = self._examples()
        if self.method == "best":
            restoration = self._best(data, validation)
            pair, n_heads = None, 0
        else:
            restoration, pair, n_heads = self._one_method(data, validation)
        if is_first_process():
            show_losses(restoration.record.losses, n_heads, self.run)
            if measures is not None:
                self._measure(measures, restoration, pair)

    @property
    def _n_examples(self) -> int:
        from lcc_lens.evaluation.task_recovery import TASK_EXAMPLES

        if self.examples is not None:
            return self.examples
        return 480 if self.task is None else TASK_EXAMPLES

    def _examples(self) -> tuple[Data, Data]:
        """Training and validation data."""
        from lcc_lens.evaluation.task_recovery import load_task_data

        n = self._n_examples
        if self.task is not None:
            return load_task_data(self.task, n, seed=self.seed)
        name = self.data or "alpaca"
        return load_role(name, n, "train", self.seed), load_role(name, max(8, n // 10), "held-out", self.seed)

    def _config(self) -> TrainConfig:
        from lcc_lens.evaluation.task_recovery import TASK_EPOCHS
        from lcc_lens.restoration.best import BEST_LR, BEST_OBJECTIVE
        from lcc_lens.restoration.training.loop import TrainConfig
        from lcc_lens.restoration.training.objectives import Objective

        is_best = self.method == "best"
        objective = self.objective or (BEST_OBJECTIVE if is_best else "response")
        rate = BEST_LR if is_best and self.lr is None else self.lr
        usual = 1 if self.task is None else TASK_EPOCHS
        return TrainConfig(
            epochs=usual if self.epochs is None else self.epochs, batch_size=self.batch_size, lr=rate,
            checkpoint_every=self.checkpoint_every, seed=self.seed, patience=self.patience,
            micro_tokens=self.micro_tokens, reuse=self.reuse, gradient_checkpointing=self.gradient_checkpointing,
            objective=Objective.parse(objective, temperature=self.temperature),
        )  # fmt: skip

    def _best(self, data: Data, validation: Data) -> Restoration:
        from lcc_lens.pruning.jobs import REFIT_SAMPLES
        from lcc_lens.restoration.best import BEST_LOW_RANK, restore_best

        return restore_best(
            self.dense, self.pruned, self.run, data, config=self._config(), validation=validation,
            low_rank=self.low_rank or BEST_LOW_RANK, n_samples=self.refit_samples or REFIT_SAMPLES,
            max_length=self.max_length, limit=self._n_examples, resume=self.resume,
        )  # fmt: skip

    def _one_method(self, data: Data, validation: Data) -> tuple[Restoration, Pair, int]:
        from lcc_lens.models.pair import load_pair
        from lcc_lens.restoration.injections.methods import uses_components, uses_heads
        from lcc_lens.restoration.restore import restore

        config = self._config()
        pair = load_pair(self.dense, self.pruned, one_at_a_time=self.one_at_a_time)
        found = None
        if uses_components(self.method) or uses_heads(self.method):
            found = self._scan(pair)
        heads = [] if found is None else found.select(self.selector, share=self.heads, seed=self.seed)
        restoration = restore(
            pair, found, heads, data, method=self.method, config=config, validation=validation, rank=self.rank,
            mlp_rank=self.mlp_rank, low_rank=self.low_rank or 8, start=self.start, max_length=self.max_length,
            limit=self._n_examples, exportable=not self.hooks_only, shuffle_responses=self.shuffle_responses,
            tune_lr=self.tune_lr, run=self.run, resume=self.resume,
        )  # fmt: skip
        return restoration, pair, len(heads)

    def _scan(self, pair: Pair) -> Scan:
        from lcc_lens.analysis.scan.scan import SCAN_RECORD, Scan, scan
        from lcc_lens.restoration.injections.methods import scanned_sites

        name = self.task or self.scan_data or "boolq"
        if (self.run / SCAN_RECORD).exists():
            found = Scan.load(self.run)
            if self.task is not None and found.record.data != self.task:
                raise RequestError(
                    f"expected a scan of {self.task} in {self.run}, got one of {found.record.data}; name another run"
                )
            return found
        data = load_role(name, self.scan_examples, "probe", self.seed)
        named = None if self.selector in ("mse", "random") else (self.selector,)
        return scan(
            pair, data, selectors=named, spectra=scanned_sites(self.method)[1], limit=self.scan_examples,
            max_length=min(self.max_length, pair.context), seed=self.seed, run=self.run,
        )  # fmt: skip

    def _measures(self) -> TaskMeasures | None:
        """What a task is measured on, if there is one; what has no data is refused before any work."""
        from lcc_lens.evaluation.task_recovery import TaskMeasures

        if self.task is None:
            return None
        measures = TaskMeasures(self.task, items=self.items, text=self.text, seed=self.seed)
        measures.check()
        return measures

    def _measure(self, measures: TaskMeasures, restoration: Restoration, pair: Pair | None) -> None:
        from lcc_lens.evaluation.task_recovery import note_task
        from lcc_lens.models.pair import load_pair
        from lcc_lens.restoration.best import REFITTED

        bare = self.pruned if pair is None else None
        found = measures.of(restoration, pair or load_pair(self.dense, self.run / REFITTED), bare=bare)
        note_task(self.run, found)
        show_recovery(found, self.run)
