"""Training of injections: response loss only, gradients only where needed, resumable at every checkpoint."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcc_lens.data import Batch, TokenSequence, batches
from lcc_lens.errors import InterruptedRun, RequestError
from lcc_lens.files import read_tensors, write_tensors
from lcc_lens.hooks import HookedModel, logits_at
from lcc_lens.injection import LccInjection
from lcc_lens.metrics import token_nll
from lcc_lens.models import device_of
from lcc_lens.running import forward

logger = logging.getLogger(__name__)
CHECKPOINT = "checkpoint.safetensors"
_DIVERGED = 2.0  # times the validation loss before the first step
_BUCKET = 8  # batches among which sequences are sorted by length: less padding, order still random


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; one epoch is enough for a constant.

    ``lr`` is in units of each head's root mean square difference (see :class:`~lcc_lens.injection.LccInjection`), so
    that one rate fits all heads and models; the paper's 1e-3 to 1e-5 are in units of activations.
    ``micro_tokens`` bounds the padded tokens of one backward pass (a batch is split and its gradients summed, with
    the same result); it decides memory, not the outcome.
    """

    epochs: int = 1
    batch_size: int = 8
    lr: float = 3e-2
    weight_decay: float = 0.0
    micro_tokens: int = 1024
    validate_every: int = 20
    checkpoint_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_tokens", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise RequestError(f"wanted {name} of at least 1, got {getattr(self, name)}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise RequestError(f"wanted a learning rate above 0, got {self.lr}")


@dataclass(frozen=True)
class Step:
    """One optimiser step: loss in nats per response token, learning rate, response tokens, seconds."""

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
    device = device_of(model)
    logits = forward(model, batch.tokens.to(device), [*hooks, *logits_at(model, batch.is_target().to(device))])
    return token_nll(logits[0], batch.targets().to(device)).sum()


def validation_loss(
    model: HookedModel, injection: LccInjection | None, sequences: Sequence[TokenSequence], micro_tokens: int = 1024
) -> float:
    """Token-weighted response loss in nats; of the bare model where there is no injection."""
    total, count = 0.0, 0
    with torch.inference_mode():
        hooks = injection.hooks() if injection is not None else []
        for batch in batches(sequences, max_tokens=micro_tokens):
            total += float(response_nll(model, batch, hooks))
            count += int(batch.is_target().sum())
    return total / count


def train(
    model: HookedModel,
    injection: LccInjection,
    sequences: Sequence[TokenSequence],
    validation: Sequence[TokenSequence],
    config: TrainConfig,
    *,
    run: Path | None = None,
    resume: bool = False,
    identity: str = "",
) -> Iterator[Step]:
    r"""Train an injection on the response loss; yields a record per optimiser step.

    AdamW with linear decay to zero. The model's weights take no gradient, so backward work stops at the lowest
    injected layer, and logits are computed only where the loss counts. At the end the injection holds the numbers with
    the lowest validation loss (the start included). A run that diverges (a loss that is not finite, or a validation
    loss of twice the first one) stops there, with a warning, and keeps the best.

    Args:
        model: the hooked pruned model.
        injection: what to train, in place.
        sequences: training data.
        validation: held-out data of the same kind.
        config: settings.
        run: where ``checkpoint.safetensors`` is kept; none if not given.
        resume: go on from the checkpoint in ``run``; the result equals an unbroken run's.
        identity: a text that a checkpoint must share to be resumed (weights, data, heads).

    Raises:
        RequestError: nothing to resume, or a checkpoint of another run.
        InterruptedRun: Ctrl-C; the state was saved.
    """
    state = _State(injection, config, n_sequences=len(sequences), identity=identity)
    injection.to(device_of(model))
    if resume:
        state.load(run)
    if state.step == 0:
        state.first_loss = validation_loss(model, injection, validation, config.micro_tokens)
        state.keep_best(state.first_loss)
    with Interruption().watched() as interruption:
        for index in state.remaining_batches(sequences):
            start, lr = time.perf_counter(), state.begin_step()
            loss, n_targets = _optimise(model, injection, state, sequences, index)
            if not math.isfinite(loss):
                _warn_of_divergence(state.step + 1, state.n_steps, f"a loss of {loss}", config.lr)
                break
            state.step += 1
            is_last = state.step == state.n_steps
            measured = None
            if is_last or state.step % config.validate_every == 0:
                measured = validation_loss(model, injection, validation, config.micro_tokens)
                state.keep_best(measured)
            yield Step(state.step, state.n_steps, loss, lr, n_targets, time.perf_counter() - start, measured)
            if measured is not None and not measured <= _DIVERGED * state.first_loss:
                what = f"a validation loss of {measured:.3g} ({state.first_loss:.3g} at first)"
                _warn_of_divergence(state.step, state.n_steps, what, config.lr)
                break  # before the state is saved: a resumed run meets the same end
            if run is not None and (is_last or interruption.requested or state.step % config.checkpoint_every == 0):
                state.save(run)
            if interruption.requested and not is_last:
                what = f"state saved in {run}; go on with --resume" if run else "nothing saved: no run directory"
                raise InterruptedRun(f"stopped after step {state.step} of {state.n_steps}; {what}")
    state.restore_best()


def _warn_of_divergence(step: int, n_steps: int, got: str, lr: float) -> None:
    logger.warning(
        "stopped at step %d of %d: training diverged, got %s; the best numbers so far are kept; lower the learning "
        "rate (%g)", step, n_steps, got, lr,
    )  # fmt: skip


def _optimise(
    model: HookedModel, injection: LccInjection, state: _State, sequences: Sequence[TokenSequence], index: Sequence[int]
) -> tuple[float, int]:
    """One optimiser step over one batch, in micro-batches; gives the loss per token and the token count."""
    chosen = [sequences[i] for i in index]
    n_targets = sum(len(s) - s.loss_from for s in chosen)
    state.optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches(chosen, max_tokens=state.config.micro_tokens):
        loss = response_nll(model, batch, injection.hooks()) / n_targets
        loss.backward()
        total += float(loss.detach())
    if math.isfinite(total):
        state.optimizer.step()
    return total, n_targets


class _State:
    """Everything that decides how a run goes on: numbers, optimiser, schedule, position, best so far."""

    def __init__(self, injection: nn.Module, config: TrainConfig, *, n_sequences: int, identity: str) -> None:
        self.injection, self.config = injection, config
        self.n_sequences = n_sequences
        self.identity = json.dumps({**asdict(config), "n": n_sequences, "identity": identity}, sort_keys=True)
        self.optimizer = torch.optim.AdamW(injection.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.n_steps = config.epochs * math.ceil(n_sequences / config.batch_size)
        self.step = 0
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
        """Set and give the learning rate of the coming step: linear decay from the first to zero after the last."""
        lr = self.config.lr * (1 - self.step / self.n_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def keep_best(self, loss: float) -> None:
        """Remember the present numbers if no earlier ones were better."""
        if loss < self.best_loss:
            self.best_loss, self.best = loss, self._numbers()

    def restore_best(self) -> None:
        """Put the best numbers back into the injection."""
        with torch.no_grad():
            for name, parameter in self.injection.named_parameters():
                parameter.copy_(self.best[name])

    def save(self, run: Path) -> None:
        """Write one atomic file."""
        tensors = {f"now.{name}": value for name, value in self._numbers().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for name, parameter in self.injection.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value
        losses = {"first_loss": repr(self.first_loss), "best_loss": repr(self.best_loss)}
        record = {"step": str(self.step), **losses, "identity": self.identity}
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
        self.first_loss = float(record.get("first_loss", "inf"))
        self.best = {name: tensors[f"best.{name}"] for name, _ in self.injection.named_parameters()}
        with torch.no_grad():
            for name, parameter in self.injection.named_parameters():
                parameter.copy_(tensors[f"now.{name}"])
                keys = [key for key in tensors if key.startswith(f"adam.{name}.")]
                self.optimizer.state[parameter] = {key.rsplit(".", 1)[1]: tensors[key] for key in keys}

    def _numbers(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.injection.named_parameters()}


def epoch_batches(sequences: Sequence[TokenSequence], batch_size: int, seed: int) -> list[list[int]]:
    """One epoch's batches: random order, but similar lengths together so that little is padding."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    grouped: list[list[int]] = []
    for start in range(0, len(order), batch_size * _BUCKET):
        bucket = sorted(order[start : start + batch_size * _BUCKET], key=lambda i: len(sequences[i]))
        grouped += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [grouped[i] for i in torch.randperm(len(grouped), generator=generator).tolist()]
