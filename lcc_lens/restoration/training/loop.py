"""Training of injections: resumable, in one process or several."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from lcc_lens.core.config import tokens_per_pass
from lcc_lens.core.errors import InterruptedRun
from lcc_lens.core.machine.interruption import Interruption
from lcc_lens.core.machine.processes import is_first_process, n_processes, own_part, summed
from lcc_lens.data.batches import TokenSequence
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.training.config import Step, TrainConfig
from lcc_lens.restoration.training.objectives import Checkpointed, Source
from lcc_lens.restoration.training.reuse import CachedTeacher, reused
from lcc_lens.restoration.training.state import TrainingState
from lcc_lens.restoration.training.validation import hooked_of, validation_loss

logger = logging.getLogger(__name__)
_DIVERGED = 2.0  # times the validation loss before the first step


def train(
    model: HookedModel | Source,
    injection: Injection,
    sequences: Sequence[TokenSequence],
    validation: Sequence[TokenSequence],
    config: TrainConfig,
    *,
    teacher: HookedModel | Source | None = None,
    run: Path | None = None,
    resume: bool = False,
    identity: str = "",
    first_loss: float | None = None,
) -> Iterator[Step]:
    """Train an injection on the objective by AdamW with linear decay; yields a record per optimiser step.

    The model's weights get no gradient, and the model is unchanged between steps. At the end, also of an abandoned
    iteration, the injection has the parameters with the lowest held-out objective, the initial ones included. A run
    that diverges (a loss that is not finite, or a held-out loss of twice the first one) stops with a warning.

    Several processes (``accelerate launch``) share the examples of every batch and of the held-out data; gradients are
    summed with the whole batch's token counts, so the result is that of one process within rounding.

    Args:
        model: the hooked pruned model, or a source of its outputs (which then handles ``reuse`` and
            ``gradient_checkpointing``).
        injection: what to train, in place.
        sequences: training data; ``validation``: held-out data of the same kind; ``config``: settings.
        teacher: the dense model, for distillation, or a source of its outputs.
        run: the directory of ``checkpoint.safetensors``; no checkpoint if not given.
        resume: go on from the checkpoint in ``run``; the result equals that of a run without interruption.
        identity: a text that the checkpoint must match to be resumed (weights, data, heads).
        first_loss: the held-out objective before the first step, if known.

    Raises:
        RequestError: nothing to resume, or a checkpoint of another run.
        InterruptedRun: Ctrl-C; the state was saved.
    """
    state = TrainingState(injection, config, n_sequences=len(sequences), identity=identity)
    injection.to(device_of(hooked_of(model)))
    source = model if isinstance(model, Source) else _source(model, injection, config)
    cached = teacher if teacher is None or isinstance(teacher, Source) else CachedTeacher(teacher)

    def validate() -> float:
        return validation_loss(source, injection, validation, config.micro_tokens, config.objective, cached)

    if resume:
        state.load(run)
    if state.step == 0:
        state.first_loss = validate() if first_loss is None else first_loss
        state.keep_best(state.first_loss)
    try:
        yield from _steps(source, state, sequences, cached if config.reuse else teacher, validate, run)
    finally:
        state.restore_best()


def _steps(
    model: HookedModel | Source,
    state: TrainingState,
    sequences: Sequence[TokenSequence],
    teacher: HookedModel | Source | None,
    validate: Callable[[], float],
    run: Path | None,
) -> Iterator[Step]:
    """The remaining steps of a run, until the last one, divergence, patience or Ctrl-C; saves the state."""
    config, longest = state.config, state.config.objective.longest(sequences)
    with Interruption().watched() as interruption:
        for index in state.remaining_batches(sequences):
            start, lr = time.perf_counter(), state.begin_step()
            loss, n_targets = optimise(model, state.injection, state, [sequences[i] for i in index], teacher, longest)
            if not math.isfinite(loss):
                return _warn_of_divergence(state.step + 1, state.n_steps, f"a loss of {loss}", state.rates[0])
            state.step += 1
            is_last, is_best, measured = state.step == state.n_steps, False, None
            if is_last or state.step % config.steps_per_validation == 0:
                measured = validate()
                is_best = state.keep_best(measured)
            yield Step(state.step, state.n_steps, loss, lr, n_targets, time.perf_counter() - start, measured)
            if measured is not None and not measured <= _DIVERGED * state.first_loss:
                what = f"a validation loss of {measured:.3g} ({state.first_loss:.3g} at first)"
                # the state is not saved, so a resumed run stops here too
                return _warn_of_divergence(state.step, state.n_steps, what, state.rates[0])
            is_due, is_interrupted = state.step % config.steps_per_checkpoint == 0, interruption.is_agreed()
            if run is not None and (is_due or is_best or is_last or is_interrupted):
                state.save(run)
            if is_interrupted and not is_last:
                what = f"state saved in {run}; go on with --resume" if run else "nothing saved: no run directory"
                raise InterruptedRun(f"stopped after step {state.step} of {state.n_steps}; {what}")
            if config.patience is not None and state.n_worse >= config.patience and not is_last:
                logger.info("stopped at step %d: %d validations without a new best", state.step, state.n_worse)
                return None


def _source(model: HookedModel, injection: Injection, config: TrainConfig) -> HookedModel | Source:
    """The source of the model's outputs under the settings."""
    source = reused(model, injection, checkpoint_layers=config.gradient_checkpointing) if config.reuse else model
    return source if isinstance(source, Source) or not config.gradient_checkpointing else Checkpointed(source)


def _warn_of_divergence(step: int, n_steps: int, got: str, lr: float) -> None:
    logger.warning(
        "stopped at step %d of %d: training diverged, got %s; the best parameters so far are kept; lower the learning "
        "rate (%g)", step, n_steps, got, lr,
    )  # fmt: skip


def optimise(
    model: HookedModel | Source,
    injection: Injection,
    state: TrainingState,
    chosen: Sequence[TokenSequence],
    teacher: HookedModel | Source | None,
    longest: int | None = None,
) -> tuple[float, int]:
    """One optimiser step over one batch, with gradients summed over micro-batches and processes.

    Args:
        longest: see :func:`~lcc_lens.data.batches.batches`.

    Returns:
        The objective, and the number of response tokens.
    """
    objective, n_targets = state.config.objective, sum(len(s) - s.loss_from for s in chosen)
    counts = objective.counts(chosen)
    state.optimizer.zero_grad(set_to_none=True)
    total = 0.0
    with injection.attached(hooked_of(model)):
        max_tokens = state.config.micro_tokens or tokens_per_pass(device_of(hooked_of(model)))
        for batch in objective.batches(own_part(chosen), max_tokens, longest):
            loss = objective.loss(model, batch, counts, injection.hooks(), teacher)
            loss.backward()
            total += float(loss.detach())
        penalty = injection.penalty() if is_first_process() else None
        if penalty is not None:
            penalty.backward()
            total += float(penalty.detach())
    total = _over_processes(injection, total)
    if math.isfinite(total):
        state.optimizer.step()
    return total, n_targets


def _over_processes(injection: Injection, total: float) -> float:
    """Replace the gradients by their sums over all processes; returns the sum of the objective."""
    if n_processes() == 1:
        return total
    parameters = [parameter for parameter in injection.parameters() if parameter.requires_grad]
    local = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    *gradients, objective = summed([*local, local[0].new_tensor([total])])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return float(objective)
