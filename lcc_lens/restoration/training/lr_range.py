"""Learning-rate range test: the same few steps at several rates, compared on held-out data."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lcc_lens.core.progress import track
from lcc_lens.data.batches import TokenSequence
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.loop import train
from lcc_lens.restoration.training.reuse import CachedTeacher
from lcc_lens.restoration.training.validation import validation_loss

logger = logging.getLogger(__name__)
#: Multiples of the method's own rate.
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class RangeTest:
    """Held-out objective (nats per counted token) after a few steps at each rate; infinite where it diverged.

    ``start_loss`` is that before the first step.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    n_steps: int
    start_loss: float

    @property
    def best(self) -> float:
        """The rate with the lowest loss; if equal, the smallest."""
        return min(zip(self.losses, self.rates, strict=True))[1]

    @property
    def by_rate(self) -> dict[str, float | None]:
        """The losses by rate as JSON values: None if it diverged."""
        losses = (loss if math.isfinite(loss) else None for loss in self.losses)
        return dict(zip(map(str, self.rates), losses, strict=True))

    @property
    def is_at_edge(self) -> bool:
        """Whether the best rate is the smallest or largest tried, so that a better one may be outside."""
        return self.best in (self.rates[0], self.rates[-1])


def range_test(
    model: HookedModel,
    injection: Injection,
    sequences: Sequence[TokenSequence],
    validation: Sequence[TokenSequence],
    config: TrainConfig,
    *,
    teacher: HookedModel | None = None,
    factors: Sequence[float] = FACTORS,
    n_steps: int = 10,
) -> RangeTest:
    """Train a few steps at several learning rates from the same initial values; the injection is unchanged afterwards.

    Args:
        sequences: training data, of which the first few are used.
        config: settings of the run to come; rates are multiples of its rate, or of the method's own.
        n_steps: steps at each rate, with the decay of a whole run.
    """
    middle = config.lr if config.lr is not None else injection.default_lr
    rates = tuple(sorted(middle * factor for factor in factors))
    start = {name: value.clone() for name, value in injection.state_dict().items()}
    few = list(sequences[: n_steps * config.examples_per_step])
    cached = None if teacher is None else CachedTeacher(teacher)  # every rate uses the same sequences
    start_loss = validation_loss(model, injection, validation, config.micro_tokens, config.objective, cached)
    losses = []
    for rate in track(rates, len(rates), "learning rates"):
        settings = replace(config, lr=rate, epochs=1, validate_every=n_steps, patience=None)
        last = math.inf
        for step in train(model, injection, few, validation, settings, teacher=cached, first_loss=start_loss):
            last = step.validation_loss if step.validation_loss is not None else math.inf
        losses.append(last if math.isfinite(last) else math.inf)
        injection.load_state_dict(start)
    result = RangeTest(rates, tuple(losses), min(n_steps, replace(config, epochs=1).n_steps(len(few))), start_loss)
    tried = ", ".join(f"{rate:.2g}: {loss:.4f}" for rate, loss in zip(rates, losses, strict=True))
    edge = "; it is the outermost one tried" if result.is_at_edge else ""
    logger.info("learning rate %g, by held-out loss after %d steps (%s)%s", result.best, result.n_steps, tried, edge)
    return result


def tuned(
    config: TrainConfig,
    model: HookedModel,
    injection: Injection,
    sequences: Sequence[TokenSequence],
    validation: Sequence[TokenSequence],
    *,
    teacher: HookedModel | None = None,
) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings with the rate that a :func:`range_test` chooses; and a record of its losses by rate and seconds."""
    start = time.perf_counter()
    tested = range_test(model, injection, sequences, validation, config, teacher=teacher)
    seconds = round(time.perf_counter() - start, 1)
    return replace(config, lr=tested.best), {"lr_range": tested.by_rate, "tuning_seconds": seconds}
