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
from lcc_lens.frontends.session.state import SessionState
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.checks import require_slots
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.record import RestorationRecord
from lcc_lens.restoration.scans import check_scan
from lcc_lens.restoration.training.config import Step, TrainConfig
from lcc_lens.restoration.training.loop import train
from lcc_lens.restoration.training.objectives import Source
from lcc_lens.restoration.training.reuse import CachedTeacher, StartedLater, reused
from lcc_lens.restoration.training.validation import validation_loss
from lcc_lens.restoration.training_data import training_sequences


@dataclass(frozen=True)
class Trained:
    """Result of one call of training: its steps, the best held-out objective, and whether it was stopped early."""

    steps: tuple[Step, ...]
    held_out: float
    is_cut: bool


@dataclass
class Workbench:
    """Builds, trains and measures injections on the same data.

    ``data`` is the training data's name, ``held_out`` the sequences that choose the best parameters, and ``config``
    the settings of every training. See :class:`~lcc_lens.frontends.session.session.RestoreSession` for the rest.
    """

    pair: Pair
    scan: Scan | None
    data: str
    sequences: Sequence[TokenSequence]
    held_out: Sequence[TokenSequence]
    config: TrainConfig
    low_rank: int
    exportable: bool
    seconds_per_step: dict[tuple[str, int], float] = field(default_factory=dict)
    """Measured, by method and number of heads."""
    _teacher: CachedTeacher | None = field(init=False)
    _started: StartedLater | None = field(default=None, init=False)
    _baseline: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._teacher = CachedTeacher(self.pair.dense) if self.config.objective.needs_teacher else None

    @classmethod
    def open(
        cls, pair: Pair, scan: Scan | None, data: Data, validation: Data | None, *, config: TrainConfig,
        max_length: int, low_rank: int, exportable: bool,
    ) -> Workbench:  # fmt: skip
        """Check a session's request and encode its data."""
        if scan is not None:
            check_scan(scan, pair)
        if pair.one_at_a_time:
            raise RequestError(
                "expected both models in memory, got a pair that loads one at a time; load it without one_at_a_time"
            )
        sequences, held_out = training_sequences(pair, scan, data, validation, max_length, None, None)
        return cls(pair, scan, data.name, sequences, held_out, config, low_rank, exportable)

    def spec(self, method: str) -> MethodSpec:
        """A method, parsed and checked.

        Raises:
            RequestError: an unknown one, one that sessions do not run, one that lacks a scan, or a model that cannot be
                exported.
        """
        spec = MethodSpec.parse(method)
        if spec.compare_only or spec.preset.on_refit or spec.preset.choose_heads:
            raise RequestError(f"expected a method for a session, got {method}; run it by compare or restore")
        if self.scan is None and spec.on_heads:
            raise RequestError(f"expected a scan of this pair for {method}, got none; scan it first")
        if self.exportable:
            require_slots(self.pair, spec)
        return spec

    def build(self, method: str, heads: tuple[Head, ...], rank: int | None) -> Injection:
        """A method's injection before any training."""
        ingredients = Ingredients.of(
            self.pair, self.scan, heads, rank=rank, low_rank=self.low_rank, sequences=self.sequences,
            seed=self.config.seed,
        )  # fmt: skip
        return self.spec(method).build(ingredients)

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
        first_loss = self._objective(injection) if state.held_out is None else state.held_out
        steps, is_cut = list[Step](), False
        # closing the iteration puts the best parameters into the injection
        with closing(self._steps(injection, n_steps, lr, len(state.steps), first_loss)) as training:
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
        if not self._baseline:
            models = {"dense": self.pair.dense, "pruned": self.pair.pruned}
            self._baseline = {name: self.loss_of(model) for name, model in models.items()}
        if injection is None:
            return {**self._baseline, "restored": self._baseline["pruned"]}
        return {**self._baseline, "restored": validation_loss(self._model_for(injection), injection, self.held_out)}

    def record(self, state: SessionState, history: Sequence[str]) -> RestorationRecord:
        """Provenance and losses of a state."""
        config, n_steps, injection = self.config, len(state.steps), state.trained()
        data, n_examples = self.data, min(len(self.sequences), n_steps * config.batch_size)
        if self.scan is not None and not injection.n_trained:
            data, n_examples = self.scan.record.data, self.scan.record.n_examples
        settings = {
            "objective": asdict(config.objective), "batch_size": config.batch_size, "rank": state.rank,
            "low_rank": self.low_rank, "scale": state.scale, "steps": n_steps,
            "heads": [str(head) for head in state.heads], "history": list(history),
        }  # fmt: skip
        return RestorationRecord(
            dense=self.pair.dense_id.reference, pruned=self.pair.pruned_id.reference,
            dense_sha256=self.pair.dense_id.sha256, pruned_sha256=self.pair.pruned_id.sha256,
            method=MethodSpec.parse(state.method).text,
            data=data, n_examples=n_examples, seed=config.seed, settings=settings, losses=self.losses(state.scaled()),
            n_trained=injection.n_trained,
        )  # fmt: skip

    def _steps(
        self, injection: Injection, n_steps: int, lr: float | None, n_before: int, first_loss: float
    ) -> Generator[Step, None, None]:
        config = replace(self.config, lr=lr, seed=self.config.seed + n_before)
        first, n = n_before * config.batch_size, len(self.sequences)
        upcoming = [self.sequences[index % n] for index in range(first, first + n_steps * config.batch_size)]
        yield from train(
            self._model_for(injection), injection, upcoming, self.held_out, config, teacher=self._teacher,
            first_loss=first_loss,
        )  # fmt: skip

    def _objective(self, injection: Injection) -> float:
        settings = self.config.micro_tokens, self.config.objective, self._teacher
        return validation_loss(self._model_for(injection), injection, self.held_out, *settings)

    def _model_for(self, injection: Injection) -> HookedModel | Source:
        """The pruned model, started at the injection's lowest layer where the layers below can be cached."""
        model = reused(self.pair.pruned, injection, self._started)
        self._started = model if isinstance(model, StartedLater) else None
        return model
