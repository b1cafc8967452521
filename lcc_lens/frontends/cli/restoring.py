"""The subcommand restore: recover what pruning took, in general or for one task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lcc_lens.core.errors import RequestError
from lcc_lens.core.processes import is_first_process
from lcc_lens.data.prompts import RecoveryTask
from lcc_lens.frontends.cli.options import DenseModel, Placed, PrunedModel, RunPath
from lcc_lens.frontends.cli.show import show_losses, show_recovery

if TYPE_CHECKING:
    from lcc_lens.data.datasets import Data
    from lcc_lens.evaluation.task_recovery import TaskMeasures
    from lcc_lens.restoration.injections.spec import MethodSpec
    from lcc_lens.restoration.settings import RefitRequest
    from lcc_lens.restoration.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Restore(Placed):
    """Train a constant per head that recovers what pruning took (scans first where RUN holds no scan)."""

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it."""
    run: RunPath
    """The run directory: holds the scan, receives the restoration."""
    method: str = "lcc"
    """lcc: trained magnitudes over lost directions plus an offset, a constant per head. Its controls: offset without
    directions; mean-shift (the scan's mean difference, nothing trained); random-basis (the same training over random
    directions); mean-shift-sequential (each layer's mean measured after the layers below it are corrected; -mlp: MLPs
    too). mlp-lcc, mlp-offset, mlp-mean-shift, mlp-gain: the same at the MLP. Changed weights, whose zeros stay: gain
    (of head outputs), norms, low-rank (on every linear layer), masked (all remaining weights). Joined by + they train
    together: lcc+low-rank. best recovers most: a refit by least squares, then a low-rank change that follows the dense
    model. perp, perp-lora and lofit are baselines; the other baselines run in compare."""
    task: RecoveryTask | None = None
    """Recover this task: train on the right answers of its training split, choose heads on other examples of it,
    then measure the task's held-out items and another text's perplexity. Sets data, examples, epochs."""
    data: str | None = None
    """Training data: instructions, questions or text (alpaca if not given)."""
    examples: int | None = None
    """Training examples at most (480 if not given; 200 of a task, no fewer)."""
    items: int = 500
    """With a task: held-out items to measure at most."""
    text: str = "wikitext"
    """With a task: another text, to measure perplexity on."""
    heads: float = 0.25
    """Fraction of all heads to restore."""
    selector: str = "probe"
    """How heads are chosen: probe, interaction, attribution, patching, mse, kl, gradient, random, or a
    selector that an installed package registers."""
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
    """Calibration sequences of best's refit (288 if not given); fewer take less time and recover less."""
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
    """Minimise the loss of the response (response) or of all tokens (lm), the distance to the dense model's
    distribution (distillation) or to its head outputs (heads), or several joined by +, as in lm+3*distillation
    (response if not given; best: lm+distillation)."""
    temperature: float = 1.0
    """Temperature of distillation."""
    patience: int | None = None
    """Stop after this many validations without improvement."""
    max_length: int = 512
    """Tokens per example at most."""
    shuffle_responses: bool = False
    """A control: train on every prompt with the response of another."""
    hooks_only: bool = False
    """Restore even where the checkpoint cannot hold the result (it then works under hooks alone;
    lcc_lens.load_restored serves it)."""
    checkpoint_every: int = 20
    """Optimiser steps between checkpoints."""
    micro_tokens: int | None = None
    """Padded tokens of one backward pass; a larger batch is split and its gradients accumulated (1024 on a CPU, 4096 on
    a GPU if not given)."""
    reuse: bool = False
    """Cache activations below the lowest trained layer: faster over several epochs, but takes memory and disk."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input and recompute the rest for gradients: less memory, a third more time."""
    one_at_a_time: bool = False
    """Hold one model in memory at a time (for methods that do not run both side by side)."""
    seed: int = 0
    """Seed of the draw and order of the training data."""
    resume: bool = False
    """Resume from the run's checkpoint."""
    overwrite: bool = False
    """Replace an existing restoration."""

    def execute(self) -> None:
        from lcc_lens.analysis.selectors.registry import check_selectors
        from lcc_lens.evaluation.task_recovery import note_task
        from lcc_lens.restoration.checks import check_restores
        from lcc_lens.restoration.injections.spec import MethodSpec
        from lcc_lens.restoration.jobs import restore_models
        from lcc_lens.restoration.settings import HeadRequest, RestoreSettings

        self._check_folder()
        spec = MethodSpec.parse(self.method)
        check_restores(spec, one_at_a_time=self.one_at_a_time)
        check_selectors([self.selector])
        measures = self._measures()
        data, validation = self._examples()
        settings = RestoreSettings(
            rank=self.rank, mlp_rank=self.mlp_rank, low_rank=self.low_rank, start=self.start,
            max_length=self.max_length, limit=self._n_examples, shuffle_responses=self.shuffle_responses,
            tune_lr=self.tune_lr, exportable=not self.hooks_only,
        )  # fmt: skip
        heads = HeadRequest(
            self.heads, self.selector, self.task or self.scan_data or HeadRequest.data, self.scan_examples
        )  # fmt: skip
        restoration, pair = restore_models(
            self.dense, self.pruned, self.run, data, method=self.method, config=self._config(spec),
            validation=validation, settings=settings, heads=heads, one_at_a_time=self.one_at_a_time,
            refitting=self._refitting(), resume=self.resume,
        )  # fmt: skip
        if is_first_process():
            show_losses(restoration.record.losses, len(restoration.record.settings["heads"]), self.run)
            if measures is not None:
                recovery = measures.of(restoration, pair, bare=self.pruned if spec.preset.on_refit else None)
                note_task(self.run, recovery)
                show_recovery(recovery, self.run)

    def _check_folder(self) -> None:
        """Refuse options that exclude each other, and a run directory with another result."""
        from lcc_lens.analysis.scan.scan import SCAN_RECORD, Scan
        from lcc_lens.restoration.result import RESTORATION_TENSORS

        if (self.run / RESTORATION_TENSORS).exists() and not (self.overwrite or self.resume):
            raise RequestError(f"{self.run} holds a restoration already; name another run or pass --overwrite")
        if self.task is None:
            return
        if self.data is not None or self.scan_data is not None:
            raise RequestError(
                "expected a task or data of your own, got both; leave out --task, or --data and --scan-data"
            )
        scanned = Scan.load(self.run).record.data if (self.run / SCAN_RECORD).exists() else self.task
        if scanned != self.task:
            raise RequestError(f"expected a scan of {self.task} in {self.run}, got one of {scanned}; name another run")

    def _refitting(self) -> RefitRequest:
        from lcc_lens.restoration.settings import RefitRequest

        return RefitRequest() if self.refit_samples is None else RefitRequest(n_samples=self.refit_samples)

    @property
    def _n_examples(self) -> int:
        from lcc_lens.evaluation.task_recovery import TASK_EXAMPLES
        from lcc_lens.restoration.settings import TRAIN_EXAMPLES

        if self.examples is not None:
            return self.examples
        return TRAIN_EXAMPLES if self.task is None else TASK_EXAMPLES

    def _examples(self) -> tuple[Data, Data]:
        """Training and validation data."""
        from lcc_lens.evaluation.task_recovery import load_task_data
        from lcc_lens.restoration.settings import TRAIN_DATA
        from lcc_lens.restoration.training_data import load_role

        n = self._n_examples
        if self.task is not None:
            return load_task_data(self.task, n, seed=self.seed)
        name = self.data or TRAIN_DATA
        return load_role(name, n, "train", self.seed), load_role(name, max(8, n // 10), "held-out", self.seed)

    def _config(self, spec: MethodSpec) -> TrainConfig:
        from lcc_lens.evaluation.task_recovery import TASK_EPOCHS
        from lcc_lens.restoration.training.config import TrainConfig
        from lcc_lens.restoration.training.objectives import Objective

        objective = self.objective or spec.preset.objective or "response"
        return TrainConfig(
            epochs=self.epochs or (1 if self.task is None else TASK_EPOCHS), batch_size=self.batch_size, lr=self.lr,
            checkpoint_every=self.checkpoint_every, seed=self.seed, patience=self.patience,
            micro_tokens=self.micro_tokens, reuse=self.reuse, gradient_checkpointing=self.gradient_checkpointing,
            objective=Objective.parse(objective, temperature=self.temperature),
        )  # fmt: skip

    def _measures(self) -> TaskMeasures | None:
        """The measures of the task, if one is named; refuses missing data before any work."""
        from lcc_lens.evaluation.task_recovery import TaskMeasures

        if self.task is None:
            return None
        measures = TaskMeasures(self.task, items=self.items, text=self.text, seed=self.seed)
        measures.check()
        return measures
