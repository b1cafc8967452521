"""Settings of a training run, and its record of a step."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any

from lcc_lens.core.ranges import Count, Range, Rate, Seed, check_numbers
from lcc_lens.core.showing import Shown
from lcc_lens.restoration.training.objectives import Objective

if TYPE_CHECKING:
    import pandas as pd

_BATCH_SIZE, _EXAMPLES_BETWEEN = 8, 160


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; one epoch is enough for a constant.

    ``micro_tokens`` and ``gradient_checkpointing`` save memory and do not change the result.
    """

    epochs: Count = 1
    batch_size: Count | None = None
    """Examples per optimiser step; the method's own, or 8, if None."""
    lr: Rate | None = None
    """Learning rate of the first injection, with the others in proportion; each one's own if None. A constant's is in
    units of each head's root mean square difference (see
    :class:`~lcc_lens.restoration.injections.constants.LccInjection`), so that one rate fits all heads and models; the
    paper's 1e-3 to 1e-5 are in units of activations."""
    weight_decay: Annotated[float, Range(0, 1000)] = 0.0
    micro_tokens: Count | None = None
    """Padded tokens of one backward pass at most (1024 on a CPU, 4096 on a GPU): a larger batch is split, and
    the gradients of its parts are summed with the whole batch's token counts."""
    validate_every: Count | None = None
    """Steps between validations; those of 160 examples if None, as for ``checkpoint_every``."""
    checkpoint_every: Count | None = None
    seed: Seed = 0
    patience: Count | None = None
    """Stop after this many validations in a row without a new best."""
    objective: Objective = field(default_factory=Objective)
    reuse: bool = False
    """Cache activations below the lowest trained layer (see :mod:`lcc_lens.restoration.training.reuse`): faster over
    several epochs, but it takes memory and disk, and results are equal within rounding only."""
    gradient_checkpointing: bool = False
    """Store only each layer's input and compute the rest again in the backward pass: the same gradients from less
    memory, in a third more time."""

    def __post_init__(self) -> None:
        check_numbers(self)

    @property
    def examples_per_step(self) -> int:
        """``batch_size``, or its default."""
        return self.batch_size or _BATCH_SIZE

    @property
    def steps_per_validation(self) -> int:
        """``validate_every``, or its default."""
        return self.validate_every or max(1, _EXAMPLES_BETWEEN // self.examples_per_step)

    @property
    def steps_per_checkpoint(self) -> int:
        """``checkpoint_every``, or its default."""
        return self.checkpoint_every or max(1, _EXAMPLES_BETWEEN // self.examples_per_step)

    def n_steps(self, n_examples: int) -> int:
        """Optimiser steps of all epochs over so many examples."""
        return self.epochs * -(-n_examples // self.examples_per_step)


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


class Steps(Shown, tuple[Step, ...]):
    """Optimiser steps with a short representation."""

    def table(self) -> pd.DataFrame:
        """One row per step: the fields of :class:`Step`."""
        import pandas as pd

        return pd.DataFrame([vars(step) for step in self], columns=[field.name for field in fields(Step)])

    def _facts(self) -> dict[str, Any]:
        if not self:
            return {"steps": 0}
        measured = [step for step in self if step.validation_loss is not None]
        facts: dict[str, Any] = {
            "steps": len(self), "loss": f"{self[0].loss:.4f} first, {self[-1].loss:.4f} last",
            "learning rate": f"{self[0].lr:.2g} first, {self[-1].lr:.2g} last",
            "seconds": f"{sum(step.seconds for step in self):.1f}",
        }  # fmt: skip
        if measured:
            best = min(measured, key=lambda step: step.validation_loss or 0.0)
            facts["held-out loss"] = ", ".join(f"{step.validation_loss:.4f} ({step.step})" for step in measured[-8:])
            facts["best"] = f"{best.validation_loss:.4f} after step {best.step}"
        return facts
