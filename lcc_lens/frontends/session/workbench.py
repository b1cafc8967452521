"""Computations of a session: build, train and measure injections on fixed data, with caches between calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from statistics import median

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import InterruptedRun, RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.batches import TokenSequence
from lcc_lens.data.datasets import Data
from lcc_lens.frontends.session.refitting import SessionRefit, on_blank_refit
from lcc_lens.frontends.session.state import SessionState
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.checks import require_slots
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.record import RestorationRecord
from lcc_lens.restoration.scans import check_scan
from lcc_lens.restoration.settings import LOW_RANK, RefitRequest, with_preset
from lcc_lens.restoration.training.config import Step, TrainConfig
from lcc_lens.restoration.training.loop import train
from lcc_lens.restoration.training.objectives import Objective, Source
from lcc_lens.restoration.training.reuse import CachedTeacher, StartedLater, reused
from lcc_lens.restoration.training.validation import validation_loss
from lcc_lens.restoration.training_data import training_sequences


@dataclass(frozen=True)
class Trained:
    """Result of one call of training: its steps, the best held-out objective, and whether it was stopped early."""

    steps: tuple[Step, ...]
    held_out: float
    is_cut: bool


def session_method(method: str) -> MethodSpec:
    """What a session trains under a method's name: the leaner preset where there are two, as undo keeps every state."""
    return MethodSpec.parse(method).leaner


@dataclass
class Workbench:
    """Builds, trains and measures injections on the same data.

    ``data`` is the training data's name, ``held_out`` the sequences that choose the best parameters, ``config`` the
    settings of every training but for the objective, which is the method's own if None. See
    :class:`~lcc_lens.frontends.session.session.RestoreSession` for the rest.
    """

    pair: Pair
    scan: Scan | None
    data: str
    sequences: Sequence[TokenSequence]
    held_out: Sequence[TokenSequence]
    config: TrainConfig
    objective: Objective | None
    low_rank: int | None
    exportable: bool
    refit: SessionRefit
    seconds_per_step: dict[tuple[str, int], float] = field(default_factory=dict)
    """Measured, by method and number of heads."""
    _teacher: CachedTeacher = field(init=False)
    _started: StartedLater | None = field(default=None, init=False)
    _baselines: dict[Objective, dict[str, float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._teacher = CachedTeacher(self.pair.dense)

    @classmethod
    def open(
        cls, pair: Pair, scan: Scan | None, data: Data, validation: Data | None, *, config: TrainConfig,
        objective: Objective | None, max_length: int, low_rank: int | None, exportable: bool,
        refitting: RefitRequest | None,
    ) -> Workbench:  # fmt: skip
        """Check a session's request and encode its data."""
        if scan is not None:
            check_scan(scan, pair)
        if pair.one_at_a_time:
            raise RequestError(
                "expected both models in memory, got a pair that loads one at a time; load it without one_at_a_time"
            )
        sequences, held_out = training_sequences(pair, scan, data, validation, max_length, None, None)
        roles = [part for part in (data, validation) if part is not None and part.role is not None]
        groups = frozenset[str]().union(*(part.groups for part in roles))
        refit = SessionRefit(pair, refitting or RefitRequest(), groups)
        return cls(pair, scan, data.name, sequences, held_out, config, objective, low_rank, exportable, refit)

    def spec(self, method: str) -> MethodSpec:
        """A method, checked.

        Raises:
            RequestError: an unknown one, one that sessions do not run, one that lacks a scan, or a model that cannot be
                exported.
        """
        spec = session_method(method)
        if spec.compare_only or spec.preset.choose_heads:
            raise RequestError(f"expected a method for a session, got {method}; run it by compare or restore")
        if self.scan is None and spec.on_heads:
            raise RequestError(f"expected a scan of this pair for {method}, got none; scan it first")
        if self.exportable:
            require_slots(self.pair, spec)
        return spec

    def settings(self, method: str) -> TrainConfig:
        """The settings of a method's training."""
        spec = session_method(method)
        objective = self.objective or Objective.parse(spec.preset.objective or "response")
        return with_preset(replace(self.config, objective=objective), spec)

    def build(self, method: str, heads: tuple[Head, ...], rank: int | None, *, refitted: bool = False) -> Injection:
        """A method's injection before any training; ``refitted``: on top of a refit, to be loaded."""
        spec = self.spec(method)
        ingredients = Ingredients.of(
            self.pair, self.scan, heads, rank=rank, low_rank=self._rank_of(spec), sequences=self.sequences,
            seed=self.config.seed,
        )  # fmt: skip
        injection = spec.build(ingredients)
        return on_blank_refit(self.pair, injection) if refitted else injection

    def _rank_of(self, spec: MethodSpec) -> int:
        """The rank of low-rank changes."""
        return self.low_rank or spec.preset.low_rank or LOW_RANK

    def train(
        self,
        injection: Injection,
        state: SessionState,
        n_steps: int,
        lr: float | None,
        is_over: Callable[[Step], bool],
    ) -> Trained:
        """Continue training from a state on the examples after those it has seen; keeps the best parameters.

        Args:
            injection: a copy of the state's injection, trained in place.
            lr: see :class:`~lcc_lens.restoration.training.config.TrainConfig`.
            is_over: called after every step; whether to stop there.
        """
        config = self.settings(state.method)
        first_loss = self._objective(injection, config) if state.held_out is None else state.held_out
        steps, is_cut = list[Step](), False
        # closing the iteration puts the best parameters into the injection
        config = config if lr is None else replace(config, lr=lr)
        with closing(self._steps(injection, n_steps, config, len(state.steps), first_loss)) as training:
            try:
                for step in training:
                    steps.append(step)
                    is_cut = is_over(step) and step.step < n_steps
                    if is_cut:
                        break
            except InterruptedRun:
                is_cut = True
        if steps:  # most steps measure no held-out loss
            self.seconds_per_step[state.method, len(state.heads)] = median(step.seconds for step in steps)
        measured = (step.validation_loss for step in steps if step.validation_loss is not None)
        return Trained(tuple(steps), min([first_loss, *measured]), is_cut)

    def time_step(self, injection: Injection, state: SessionState) -> float:
        """Seconds of one optimiser step of a copy of a state's injection; measured once per method and heads."""
        key = state.method, len(state.heads)
        if key not in self.seconds_per_step:
            self.train(injection, replace(state, held_out=state.held_out or math.inf), 2, None, lambda step: True)
        return self.seconds_per_step[key]

    def loss_of(self, model: HookedModel) -> float:
        """Held-out loss of a model as it is, in nats per response token."""
        return validation_loss(model, None, self.held_out)

    def losses(self, injection: Injection | None) -> dict[str, float]:
        """Held-out loss in nats per response token; without an injection the restored model is the pruned one."""
        baseline = self._baseline(Objective())
        if injection is None:
            return {**baseline, "restored": baseline["pruned"]}
        return {**baseline, "restored": validation_loss(self._model_for(injection), injection, self.held_out)}

    def levels(self, method: str) -> dict[str, float]:
        """What a method's training minimises, of the dense and the pruned model on the held-out data."""
        return self._baseline(self.settings(method).objective)

    def record(self, state: SessionState, history: Sequence[str]) -> RestorationRecord:
        """Provenance and losses of a state."""
        config, n_steps, injection = self.settings(state.method), len(state.steps), state.trained()
        data, n_examples = self.data, min(len(self.sequences), n_steps * config.examples_per_step)
        if self.scan is not None and not injection.n_trained:
            data, n_examples = self.scan.record.data, self.scan.record.n_examples
        settings = {
            "objective": asdict(config.objective), "batch_size": config.examples_per_step, "rank": state.rank,
            "low_rank": self._rank_of(self.spec(state.method)), "scale": state.scale, "steps": n_steps,
            "heads": [str(head) for head in state.heads], "history": list(history),
        }  # fmt: skip
        spec = session_method(state.method)
        return RestorationRecord(
            dense=self.pair.dense_id.reference, pruned=self.pair.pruned_id.reference,
            dense_sha256=self.pair.dense_id.sha256, pruned_sha256=self.pair.pruned_id.sha256,
            method=spec.text, preset=spec.preset_name, data=data, n_examples=n_examples, seed=config.seed,
            settings=settings, losses=self.losses(state.scaled()), n_trained=injection.n_trained,
        )  # fmt: skip

    def _steps(
        self, injection: Injection, n_steps: int, config: TrainConfig, n_before: int, first_loss: float
    ) -> Generator[Step, None, None]:
        config = replace(config, seed=config.seed + n_before)
        first, n = n_before * config.examples_per_step, len(self.sequences)
        upcoming = [self.sequences[index % n] for index in range(first, first + n_steps * config.examples_per_step)]
        yield from train(
            self._model_for(injection), injection, upcoming, self.held_out, config,
            teacher=self._teacher_for(config.objective), first_loss=first_loss,
        )  # fmt: skip

    def _objective(self, injection: Injection, config: TrainConfig) -> float:
        settings = config.micro_tokens, config.objective, self._teacher_for(config.objective)
        return validation_loss(self._model_for(injection), injection, self.held_out, *settings)

    def _baseline(self, objective: Objective) -> dict[str, float]:
        """An objective of both models on the held-out data, measured once."""
        if objective not in self._baselines:
            models = {"dense": self.pair.dense, "pruned": self.pair.pruned}
            teacher = self._teacher_for(objective)
            self._baselines[objective] = {
                name: validation_loss(model, None, self.held_out, None, objective, teacher)
                for name, model in models.items()
            }
        return self._baselines[objective]

    def _teacher_for(self, objective: Objective) -> CachedTeacher | None:
        return self._teacher if objective.needs_teacher else None

    def _model_for(self, injection: Injection) -> HookedModel | Source:
        """The pruned model, started at the injection's lowest layer where the layers below can be cached."""
        model = reused(self.pair.pruned, injection, self._started)
        self._started = model if isinstance(model, StartedLater) else None
        return model
