"""Training of injections: gradients only where needed, resumable at every checkpoint."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcc_lens.data import Batch, TokenSequence, batches
from lcc_lens.errors import InterruptedRun, RequestError
from lcc_lens.files import read_tensors, write_tensors
from lcc_lens.hooks import HookedModel
from lcc_lens.injections.base import Injection
from lcc_lens.models import device_of
from lcc_lens.objectives import Objective, Source
from lcc_lens.reuse import CachedTeacher, StartedLater, reused

logger = logging.getLogger(__name__)
CHECKPOINT = "checkpoint.safetensors"
_DIVERGED = 2.0  # times the validation loss before the first step
_BUCKET = 8  # batches among which sequences are sorted by length: less padding, order still random


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; one epoch is enough for a constant.

    ``lr`` is each injection's own if not given; given, it is that of the first injection, and the others keep their
    ratio to it. A constant's is in units of each head's root mean square difference (see
    :class:`~lcc_lens.injections.LccInjection`), so that one rate fits all heads and models; the paper's 1e-3 to 1e-5
    are in units of activations. ``patience`` ends the run after so many validations in a row without a new best.
    ``micro_tokens`` bounds the padded tokens of one backward pass (a batch is split and its gradients summed, with
    the same result); it decides memory, not the outcome. ``reuse`` computes once per sequence what no step changes (see
    :mod:`lcc_lens.reuse`): faster over several epochs, in return for memory and for equality within rounding only.
    """

    epochs: int = 1
    batch_size: int = 8
    lr: float | None = None
    weight_decay: float = 0.0
    micro_tokens: int = 1024
    validate_every: int = 20
    checkpoint_every: int = 20
    seed: int = 0
    patience: int | None = None
    objective: Objective = field(default_factory=Objective)
    reuse: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_tokens", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise RequestError(f"wanted {name} of at least 1, got {getattr(self, name)}")
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise RequestError(f"wanted a learning rate above 0, got {self.lr}")
        if self.patience is not None and self.patience < 1:
            raise RequestError(f"wanted a patience of at least 1 validation, got {self.patience}")


@dataclass(frozen=True)
class Step:
    """One optimiser step: objective per counted token, learning rate (the first part's), response tokens, seconds."""

    step: int
    n_steps: int
    loss: float
    lr: float
    n_targets: int
    seconds: float
    validation_loss: float | None = None


class Interruption:
    """Whether the user asked to stop (Ctrl-C); a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def watched(self) -> Iterator[Interruption]:
        """Catch Ctrl-C inside the block, so that a step ends whole before the state is saved."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def request(number: int, frame: Any) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True

        previous = signal.signal(signal.SIGINT, request)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, previous)


def response_nll(model: HookedModel, batch: Batch, hooks: Sequence[Any] = ()) -> Tensor:
    """Summed negative log-likelihood (nats) of a batch's counted tokens; logits only at their positions."""
    return Objective().terms(model, batch, hooks)["response"]


def validation_loss(
    model: HookedModel | StartedLater,
    injection: Injection | None,
    sequences: Sequence[TokenSequence],
    micro_tokens: int = 1024,
    objective: Objective | None = None,
    teacher: HookedModel | Source | None = None,
) -> float:
    """The objective per counted token (the response loss if none is given); of the bare model without an injection."""
    objective = objective or Objective()
    terms = validation_terms(model, injection, sequences, micro_tokens, objective, teacher)
    return sum(objective.weights[name] * value for name, value in terms.items())


def validation_terms(
    model: HookedModel | StartedLater,
    injection: Injection | None,
    sequences: Sequence[TokenSequence],
    micro_tokens: int,
    objective: Objective,
    teacher: HookedModel | Source | None = None,
) -> dict[str, float]:
    """Every loss of an objective by its name, not weighted, per counted token, all from the same passes."""
    totals: dict[str, float] = {}
    counts = objective.counts(sequences)
    with torch.inference_mode(), (injection or Injection()).attached(_hooked(model)):
        hooks = injection.hooks() if injection is not None else []
        for batch in batches(sequences, max_tokens=micro_tokens):
            for name, term in objective.terms(model, batch, hooks, teacher).items():
                totals[name] = totals.get(name, 0.0) + float(term)
    return {name: total / counts[name] for name, total in totals.items()}


def train(
    model: HookedModel,
    injection: Injection,
    sequences: Sequence[TokenSequence],
    validation: Sequence[TokenSequence],
    config: TrainConfig,
    *,
    teacher: HookedModel | None = None,
    run: Path | None = None,
    resume: bool = False,
    identity: str = "",
) -> Iterator[Step]:
    r"""Train an injection on the objective; yields a record per optimiser step.

    AdamW with linear decay to zero. The model's weights take no gradient, so backward work stops at the lowest
    injected layer, and logits are computed only where the loss counts. Between steps the model is as it was. At the
    end the injection holds the numbers with the lowest objective on the held-out data (the start included). A run that
    diverges (a loss that is not finite, or a validation loss of twice the first one) stops there, with a warning, and
    keeps the best.

    Args:
        model: the hooked pruned model.
        injection: what to train, in place.
        sequences: training data.
        validation: held-out data of the same kind.
        config: settings.
        teacher: the dense model, for distillation.
        run: where ``checkpoint.safetensors`` is kept; none if not given.
        resume: go on from the checkpoint in ``run``; the result equals an unbroken run's.
        identity: a text that a checkpoint must share to be resumed (weights, data, heads).

    Raises:
        RequestError: nothing to resume, or a checkpoint of another run.
        InterruptedRun: Ctrl-C; the state was saved.
    """
    state = _State(injection, config, n_sequences=len(sequences), identity=identity)
    injection.to(device_of(model))
    kept_teacher = None if teacher is None else CachedTeacher(teacher)
    source: HookedModel | StartedLater = model
    teaching: HookedModel | Source | None = teacher
    if config.reuse:
        source, teaching = reused(model, injection), kept_teacher

    def validate() -> float:
        return validation_loss(source, injection, validation, config.micro_tokens, config.objective, kept_teacher)

    if resume:
        state.load(run)
    if state.step == 0:
        state.first_loss = validate()
        state.keep_best(state.first_loss)
    with Interruption().watched() as interruption:
        for index in state.remaining_batches(sequences):
            start, lr = time.perf_counter(), state.begin_step()
            loss, n_targets = _optimise(source, injection, state, [sequences[i] for i in index], teaching)
            if not math.isfinite(loss):
                _warn_of_divergence(state.step + 1, state.n_steps, f"a loss of {loss}", state.rates[0])
                break
            state.step += 1
            is_last = state.step == state.n_steps
            measured = None
            if is_last or state.step % config.validate_every == 0:
                measured = validate()
                state.keep_best(measured)
            yield Step(state.step, state.n_steps, loss, lr, n_targets, time.perf_counter() - start, measured)
            if measured is not None and not measured <= _DIVERGED * state.first_loss:
                what = f"a validation loss of {measured:.3g} ({state.first_loss:.3g} at first)"
                _warn_of_divergence(state.step, state.n_steps, what, state.rates[0])
                break  # before the state is saved: a resumed run meets the same end
            if run is not None and (is_last or interruption.requested or state.step % config.checkpoint_every == 0):
                state.save(run)
            if interruption.requested and not is_last:
                what = f"state saved in {run}; go on with --resume" if run else "nothing saved: no run directory"
                raise InterruptedRun(f"stopped after step {state.step} of {state.n_steps}; {what}")
            if config.patience is not None and state.n_worse >= config.patience and not is_last:
                logger.info("stopped at step %d: %d validations without a new best", state.step, state.n_worse)
                break
    state.restore_best()


def _warn_of_divergence(step: int, n_steps: int, got: str, lr: float) -> None:
    logger.warning(
        "stopped at step %d of %d: training diverged, got %s; the best numbers so far are kept; lower the learning "
        "rate (%g)", step, n_steps, got, lr,
    )  # fmt: skip


def _optimise(
    model: HookedModel | StartedLater,
    injection: Injection,
    state: _State,
    chosen: Sequence[TokenSequence],
    teacher: HookedModel | Source | None,
) -> tuple[float, int]:
    """One optimiser step over one batch, in micro-batches; gives the objective and the response's token count."""
    objective, n_targets = state.config.objective, sum(len(s) - s.loss_from for s in chosen)
    counts = objective.counts(chosen)
    state.optimizer.zero_grad(set_to_none=True)
    total = 0.0
    with injection.attached(_hooked(model)):
        for batch in batches(chosen, max_tokens=state.config.micro_tokens):
            loss = objective.loss(model, batch, counts, injection.hooks(), teacher)
            loss.backward()
            total += float(loss.detach())
        penalty = injection.penalty()
        if penalty is not None:
            penalty.backward()
            total += float(penalty.detach())
    if math.isfinite(total):
        state.optimizer.step()
    return total, n_targets


def _hooked(model: HookedModel | StartedLater) -> HookedModel:
    return model.model if isinstance(model, StartedLater) else model


class _State:
    """Everything that decides how a run goes on: numbers, optimiser, schedule, position, best so far."""

    def __init__(self, injection: Injection, config: TrainConfig, *, n_sequences: int, identity: str) -> None:
        self.injection, self.config = injection, config
        self.n_sequences = n_sequences
        self.identity = json.dumps({**asdict(config), "n": n_sequences, "identity": identity}, sort_keys=True)
        self.rates = learning_rates(injection, config.lr)
        groups = [
            {"params": [n for n in part.parameters() if n.requires_grad], "lr": rate}
            for part, rate in zip(_trained_parts(injection), self.rates, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        self.n_steps = config.epochs * math.ceil(n_sequences / config.batch_size)
        self.step = self.n_worse = 0
        self.first_loss = self.best_loss = math.inf
        self.best = self._numbers()

    def remaining_batches(self, sequences: Sequence[TokenSequence]) -> Iterator[list[int]]:
        """The batches of all epochs in their fixed order, without those done before."""
        order = [
            batch for epoch in range(self.config.epochs)
            for batch in epoch_batches(sequences, self.config.batch_size, self.config.seed + epoch)
        ]  # fmt: skip
        yield from order[self.step :]

    def begin_step(self) -> float:
        """Set the learning rates of the coming step, with linear decay to zero after the last; gives the first."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 - self.step / self.n_steps)
        return float(self.optimizer.param_groups[0]["lr"])

    def keep_best(self, loss: float) -> None:
        """Remember the present numbers if no earlier ones were better."""
        self.n_worse += 1
        if loss < self.best_loss:
            self.best_loss, self.best, self.n_worse = loss, self._numbers(), 0

    def restore_best(self) -> None:
        """Put the best numbers back into the injection."""
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(self.best[name])

    def save(self, run: Path) -> None:
        """Write one atomic file."""
        tensors = {f"now.{name}": value for name, value in self._numbers().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for name, parameter in self._trained():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value
        losses = {"first_loss": repr(self.first_loss), "best_loss": repr(self.best_loss)}
        record = {"step": str(self.step), "n_worse": str(self.n_worse), **losses, "identity": self.identity}
        write_tensors(run / CHECKPOINT, tensors, record)

    def load(self, run: Path | None) -> None:
        """Continue from the checkpoint."""
        if run is None or not (run / CHECKPOINT).exists():
            raise RequestError(f"wanted a checkpoint to resume in {run}, got none; start without --resume")
        tensors, record = read_tensors(run / CHECKPOINT)
        if record.get("identity") != self.identity:
            raise RequestError(
                f"wanted a checkpoint of the same models, data, heads and settings in {run}, got another run's; "
                "repeat its settings or start without --resume"
            )
        self.step, self.best_loss = int(record["step"]), float(record["best_loss"])
        self.n_worse = int(record.get("n_worse", "0"))
        self.first_loss = float(record.get("first_loss", "inf"))
        self.best = {name: tensors[f"best.{name}"] for name, _ in self._trained()}
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(tensors[f"now.{name}"])
                keys = [key for key in tensors if key.startswith(f"adam.{name}.")]
                self.optimizer.state[parameter] = {key.rsplit(".", 1)[1]: tensors[key] for key in keys}

    def _numbers(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._trained()}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, number) for name, number in self.injection.named_parameters() if number.requires_grad]


def learning_rates(injection: Injection, lr: float | None) -> list[float]:
    """The learning rate of every part that trains: its own, or scaled so that the first one's is ``lr``."""
    rates = [part.default_lr for part in _trained_parts(injection)]
    scale = 1.0 if lr is None or not rates else lr / rates[0]
    return [rate * scale for rate in rates]


def _trained_parts(injection: Injection) -> list[Injection]:
    return [part for part in injection.parts if part.n_trained]


def epoch_batches(sequences: Sequence[TokenSequence], batch_size: int, seed: int) -> list[list[int]]:
    """One epoch's batches: random order, but similar lengths together so that little is padding."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    grouped: list[list[int]] = []
    for start in range(0, len(order), batch_size * _BUCKET):
        bucket = sorted(order[start : start + batch_size * _BUCKET], key=lambda i: len(sequences[i]))
        grouped += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [grouped[i] for i in torch.randperm(len(grouped), generator=generator).tolist()]
