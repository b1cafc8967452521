"""The subcommand restore: recover what pruning took, in general or for one task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from lcc_lens.core.errors import RequestError
from lcc_lens.core.machine.processes import is_first_process
from lcc_lens.core.ranges import Seed, Share
from lcc_lens.data.prompts import RecoveryTask
from lcc_lens.frontends.cli.options import SELECTOR_HELP, DenseModel, Maybe, PrunedModel, RunPath, Switch, Tabled
from lcc_lens.frontends.cli.restore_options import (
    BUDGET_HELP,
    METHODS_HELP,
    PAPER_HELP,
    TASK_HELP,
    RestoreData,
    Training,
    TrainingMemory,
    check_used,
    given_options,
)
from lcc_lens.frontends.cli.show import console, loss_table, show_losses, show_panel, show_recovery

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lcc_lens.data.batches import TokenSequence
    from lcc_lens.data.datasets import Data
    from lcc_lens.evaluation.task_recovery import TaskMeasures
    from lcc_lens.models.pair import Pair
    from lcc_lens.restoration.budget import BudgetPlan
    from lcc_lens.restoration.injections.spec import MethodSpec
    from lcc_lens.restoration.result import Restoration
    from lcc_lens.restoration.settings import HeadRequest, RefitRequest
    from lcc_lens.restoration.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Restore(Tabled):
    """Recover what pruning took: by the best method in 15 minutes, or by a constant per head if heads are named."""

    example: ClassVar[str] = "smollm2 out/wanda50 runs/mine --data alpaca --heads 0.25"

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it."""
    run: RunPath
    """The run directory: holds the scan, receives the restoration."""
    method: Annotated[Maybe[str], tyro.conf.arg(help=METHODS_HELP)] = None
    task: Annotated[Maybe[RecoveryTask], tyro.conf.arg(help=TASK_HELP)] = None
    budget: Annotated[Maybe[str], tyro.conf.arg(help=BUDGET_HELP)] = None
    heads: Maybe[Share] = None
    """Fraction of all heads to restore (0.25 if not given)."""
    selector: Annotated[Maybe[str], tyro.conf.arg(help=SELECTOR_HELP)] = None
    paper: Annotated[Switch, tyro.conf.arg(help=PAPER_HELP)] = False
    hooks_only: Switch = False
    """Restore even where no checkpoint can hold the result (for lcc_lens.load_restored)."""
    seed: Seed = 0
    """Seed of the draw and order of the training data."""
    resume: Switch = False
    """Go on with an interrupted run: with its refit, its scan, and the checkpoint of its training."""
    overwrite: Switch = False
    """Replace an existing restoration."""
    log: Maybe[Literal["trackio"]] = None
    """Also log every step there (pip install trackio; trackio show opens its dashboard)."""
    data: RestoreData = field(default_factory=RestoreData)
    training: Training = field(default_factory=Training)
    memory: TrainingMemory = field(default_factory=TrainingMemory)

    def execute(self) -> None:
        from lcc_lens.core.outputs.places import RESUMED, writing_run
        from lcc_lens.models.loading.references import resolve
        from lcc_lens.restoration.checks import check_restores
        from lcc_lens.restoration.injections.spec import MethodSpec

        self._check_folder()
        check_restores(MethodSpec.parse(self.chosen_method), one_at_a_time=self.memory.one_at_a_time)
        with writing_run(self.run, inputs=[resolve(self.dense), resolve(self.pruned)], again=RESUMED):
            self._restore()

    def _restore(self) -> None:
        from lcc_lens.data.checks import check_data
        from lcc_lens.data.registry import without_self_written
        from lcc_lens.evaluation.task_recovery import note_task
        from lcc_lens.restoration.advice import better_method
        from lcc_lens.restoration.in_memory import method_in_memory
        from lcc_lens.restoration.jobs import check_job, restore_models
        from lcc_lens.restoration.settings import SCAN_DATA, RestoreSettings

        spec = method_in_memory(self.chosen_method, self.pruned, low_rank=self.training.low_rank)
        heads = self._heads()
        config, measures = self._config(spec), self._measures()
        check_used(given_options(self, self.data, self.training, self.memory), spec, config.objective)
        train_data = self._train_data(spec)
        check_data([train_data, self._scan_data or SCAN_DATA, *(self.data.panel or ())])
        check_job(
            self.dense, self.pruned, self.run, spec, heads, max_length=self.data.max_length,
            refitting=self._refitting(None), one_at_a_time=self.memory.one_at_a_time, resume=self.resume, log=self.log,
        )  # fmt: skip
        texts = [*self._panel(self.data.panel)] if self.data.panel else []
        plan = self._plan(spec, config, train_data)
        if plan is not None and not plan.writes:
            train_data = without_self_written(train_data)
        n_examples = self._n_examples if plan is None else plan.examples
        data, validation = self._examples(spec, train_data, n_examples)
        panel = self._panel(texts, validation)
        training = self.training
        settings = RestoreSettings(
            rank=training.rank, mlp_rank=training.mlp_rank, low_rank=training.low_rank, start=training.start,
            max_length=self.data.max_length, limit=n_examples, shuffle_responses=self.data.shuffle_responses,
            tune_lr=training.tune_lr, exportable=not self.hooks_only,
        )  # fmt: skip
        restoration, pair = restore_models(
            self.dense, self.pruned, self.run, data, method=spec, config=config,
            validation=validation, settings=settings, heads=heads, one_at_a_time=self.memory.one_at_a_time,
            refitting=self._refitting(plan), budget=plan, resume=self.resume, log=self.log,
        )  # fmt: skip
        if is_first_process():
            show_losses(restoration.record.losses, len(restoration.record.settings["heads"]), self.run)
            before_refit = self.pruned if spec.preset.on_refit else None
            self._measure_panel(restoration, pair, panel, before_refit)
            if not self.quiet and (advice := better_method(self.chosen_method)):
                console().print(advice, soft_wrap=True)
            if measures is None:
                self.write(lambda: loss_table(restoration.record.losses))
                return
            recovery = measures.of(restoration, pair, pruned=before_refit)
            note_task(self.run, recovery)
            show_recovery(recovery, self.run)
            self.write(recovery.table)

    @property
    def chosen_method(self) -> str:
        """The method that is named; else the paper's where its heads, scan or directions are, else the best."""
        named = (self.heads, self.selector, self.task, self.data.scan_data, self.training.rank, self.training.mlp_rank)
        switches = (self.paper, self.data.shuffle_responses, self.memory.one_at_a_time)
        is_papers = any(switches) or any(value is not None for value in named)
        return self.method or ("lcc" if is_papers else "best")

    def _heads(self) -> HeadRequest:
        """How heads are chosen: as named, else as in the paper if asked for, else by default."""
        from lcc_lens.restoration.settings import PAPER_HEADS, HeadRequest

        named = {"fraction": self.heads, "selector": self.selector}
        chosen = (PAPER_HEADS if self.paper else {}) | {key: value for key, value in named.items() if value is not None}
        return HeadRequest(data=self._scan_data, examples=self.data.scan_examples, **chosen)

    def _panel(self, texts: Sequence[str], validation: Data | None = None) -> dict[str, list[TokenSequence]]:
        """Held-out blocks of texts, or of every kind of text, without what chooses the parameters; none if not asked.

        They are cut before the work, which no text that is too short then spoils.
        """
        from lcc_lens.evaluation.panel import panel_blocks
        from lcc_lens.models.architecture.context import DEFAULT_LENGTH, context_of
        from lcc_lens.models.architecture.layers import read_config
        from lcc_lens.models.loading.hooked import load_tokenizer
        from lcc_lens.models.loading.references import resolve

        if not self.data.panel_blocks:
            return {}
        models = [resolve(model) for model in (self.dense, self.pruned)]
        return panel_blocks(
            load_tokenizer(models[0]), texts, blocks=self.data.panel_blocks,
            length=min(DEFAULT_LENGTH, *(context_of(read_config(model)) or DEFAULT_LENGTH for model in models)),
            without=frozenset[str]() if validation is None else validation.groups,
        )  # fmt: skip

    def _measure_panel(
        self, restoration: Restoration, pair: Pair, panel: Mapping[str, Sequence[TokenSequence]],
        before_refit: str | None,
    ) -> None:  # fmt: skip
        """Measure recovery on every kind of text."""
        from lcc_lens.evaluation.panel import measure_panel, note_panel

        if panel:
            measured = measure_panel(restoration, pair, panel, before_refit=before_refit)
            note_panel(self.run, measured)
            show_panel(measured)

    def _check_folder(self) -> None:
        """Refuse options that exclude each other, and a run directory with another result."""
        from lcc_lens.restoration.result import RESTORATION_TENSORS

        if (self.run / RESTORATION_TENSORS).exists() and not (self.overwrite or self.resume):
            raise RequestError(f"{self.run} holds a restoration already; name another run or pass --overwrite")
        if self.task is None:
            return
        if self.data.data is not None or self.data.scan_data is not None:
            raise RequestError(
                "expected a task or data of your own, got both; leave out --task, or --data and --scan-data"
            )

    def _plan(self, spec: MethodSpec, config: TrainConfig, train_data: str) -> BudgetPlan | None:
        """The sizes that fit the time budget, told before the work; None where sizes are named."""
        from lcc_lens.data.panel import available_panel
        from lcc_lens.data.registry import fraction_of
        from lcc_lens.models.architecture.context import DEFAULT_LENGTH
        from lcc_lens.restoration.budget import DEFAULT_BUDGET, plan_budget

        named = {
            "--task": self.task, "--examples": self.data.examples, "--refit-samples": self.training.refit_samples,
            "--epochs": self.training.epochs,
        }  # fmt: skip
        given = [name for name, value in named.items() if value is not None]
        budget = self.budget or (None if given or not spec.preset.on_refit else DEFAULT_BUDGET)
        if budget is None:
            return None
        if given:
            raise RequestError(f"expected --budget to choose the sizes, got {given[0]} too; leave one of them out")
        n_measured = len(self.data.panel or available_panel()) * self.data.panel_blocks * DEFAULT_LENGTH
        own = fraction_of("self", train_data)
        plan = plan_budget(
            self.dense, self.pruned, budget, method=spec, length=self.data.max_length, n_measured=n_measured,
            self_written=own, may_skip_writing=self.data.data is None or not own, config=config,
            run=self.run, resume=self.resume,
        )  # fmt: skip
        console().print(f"plan for {plan}", highlight=False, soft_wrap=True)
        return plan

    def _refitting(self, plan: BudgetPlan | None) -> RefitRequest:
        from lcc_lens.restoration.settings import RefitRequest

        n = self.training.refit_samples
        if plan is not None:
            return plan.refitting
        return RefitRequest() if n is None else RefitRequest(n_samples=n)

    @property
    def _n_examples(self) -> int:
        from lcc_lens.evaluation.task_recovery import TASK_EXAMPLES
        from lcc_lens.restoration.settings import TRAIN_EXAMPLES

        if self.data.examples is not None:
            return self.data.examples
        return TRAIN_EXAMPLES if self.task is None else TASK_EXAMPLES

    def _train_data(self, spec: MethodSpec) -> str:
        from lcc_lens.data.checks import MIX, or_mix
        from lcc_lens.restoration.settings import TRAIN_DATA

        return self.task or self.data.data or "+".join(or_mix(MIX if spec.preset.on_pool else TRAIN_DATA))

    @property
    def _scan_data(self) -> str | None:
        return self.task or self.data.scan_data

    def _examples(self, spec: MethodSpec, name: str, n: int) -> tuple[Data, Data | None]:
        """Training and validation data: of running text a part of the training text, of a pool other domains."""
        from lcc_lens.evaluation.task_recovery import load_task_data
        from lcc_lens.restoration.training_data import is_corpus, load_role, run_writer

        if self.task is not None:
            return load_task_data(self.task, n, seed=self.seed)
        training = load_role(name, n, "train", self.seed, run_writer(self.dense, self.run, n, self.data.max_length))
        if spec.preset.on_pool or is_corpus(name):  # the held-out text is only measured
            return training, None
        return training, load_role(name, max(8, n // 10), "held-out", self.seed)

    def _config(self, spec: MethodSpec) -> TrainConfig:
        from lcc_lens.evaluation.task_recovery import TASK_EPOCHS
        from lcc_lens.restoration.settings import PAPER_TRAINING
        from lcc_lens.restoration.training.config import TrainConfig
        from lcc_lens.restoration.training.objectives import Objective

        training, memory, paper = self.training, self.memory, PAPER_TRAINING if self.paper else {}
        objective = training.objective or spec.preset.objective or "response"
        return TrainConfig(
            epochs=training.epochs or paper.get("epochs") or (1 if self.task is None else TASK_EPOCHS),
            batch_size=training.batch_size, lr=training.lr or paper.get("lr"),
            checkpoint_every=training.checkpoint_every, seed=self.seed, patience=training.patience,
            micro_tokens=memory.micro_tokens, reuse=memory.reuse, gradient_checkpointing=memory.gradient_checkpointing,
            objective=Objective.parse(objective, temperature=training.temperature),
        )  # fmt: skip

    def _measures(self) -> TaskMeasures | None:
        """The measures of the task, if one is named; refuses missing data before any work."""
        from lcc_lens.data.checks import or_mix
        from lcc_lens.evaluation.task_recovery import TaskMeasures

        if self.task is None:
            return None
        (text,) = (self.data.text,) if self.data.text else or_mix("wikitext", instead="wikipedia")
        measures = TaskMeasures(self.task, items=self.data.items, text=text, seed=self.seed)
        measures.check()
        return measures
