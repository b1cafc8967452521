"""Settings of a restoration and their defaults, for Python callers, comparisons and the command line alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lcc_lens.analysis.selectors.linear_probe import Solver
from lcc_lens.analysis.selectors.names import DEFAULT_SELECTOR
from lcc_lens.core.ranges import Count, Length, Natural, Share, check_numbers
from lcc_lens.data.checks import MIX
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.pruning.calibration.texts import REFIT_SAMPLES, Calibration
from lcc_lens.restoration.injections.constants import Start
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.objectives import Objective

TRAIN_DATA, TRAIN_EXAMPLES = "alpaca", 480
SCAN_DATA, SCAN_EXAMPLES = "boolq", 256
LOW_RANK = 8

#: The paper's own settings: its probe with its solver, share of heads and epochs, and the
#: largest of its learning rates (1e-3 to 1e-5), here in units of each head's difference.
PAPER_HEADS: dict[str, Any] = {"selector": "probe", "probe_solver": "published", "fraction": 0.25}
PAPER_TRAINING: dict[str, Any] = {"epochs": 3, "lr": 1e-3}


@dataclass(frozen=True)
class RestoreSettings:
    """What decides a restoration beside models, data, heads and training."""

    rank: Count | None = None
    """Directions per head (K); all if None."""
    mlp_rank: Count | None = None
    """Directions per MLP; those that the scan holds if None."""
    low_rank: Count | None = None
    """Rank of a low-rank change of weights; the preset's, or 8, if None. ``best`` trains one if it is given."""
    start: Start = "zero"
    """See :class:`~lcc_lens.restoration.injections.constants.LccInjection`."""
    max_length: Length | None = None
    """Tokens per example at most; 512, or the models' context if shorter."""
    limit: Count | None = None
    """Training sequences at most (text is cut into many), and a tenth of it for validation."""
    shuffle_responses: bool = False
    """A control: train on every prompt with another one's response; validation stays as it is."""
    tune_lr: bool = False
    """Choose the learning rate by a short range test first; its losses are noted in the settings."""
    exportable: bool = True
    """Refuse, before anything is trained, a model whose checkpoint cannot hold the result. Without it the restoration
    works under hooks alone."""

    def __post_init__(self) -> None:
        check_numbers(self)

    def fitting(self, context: int | None) -> RestoreSettings:
        """The settings with a length that fits the models; a longer one that was asked for is refused."""
        return replace(self, max_length=fitting_length(self.max_length, context))

    def completed(self, spec: MethodSpec) -> RestoreSettings:
        """The settings with the method's own rank where none is set."""
        return replace(self, low_rank=self.low_rank or spec.preset.low_rank or LOW_RANK)


@dataclass(frozen=True)
class HeadRequest:
    """How heads are chosen, and the scan that scores them where the run directory holds none."""

    fraction: Share = 0.25
    selector: str = DEFAULT_SELECTOR
    data: str | None = None
    """What is scanned; the data of the scan that there is, or boolq, if None."""
    examples: Count = SCAN_EXAMPLES
    probe_solver: Solver = "newton"

    def __post_init__(self) -> None:
        check_numbers(self)

    def needed_by(self, spec: MethodSpec) -> tuple[float, str]:
        """The fraction and the selector that a method needs; for all heads any score serves, and ``mse`` is free."""
        fraction = self.fraction if spec.selects_heads else 1.0
        return fraction, self.selector if fraction < 1 else "mse"


@dataclass(frozen=True)
class RefitRequest:
    """What a refit is calibrated on; see :func:`~lcc_lens.pruning.jobs.refit`."""

    calibration: Calibration | None = None
    n_samples: Natural = REFIT_SAMPLES
    """Sequences; 0: no refit."""
    seq_len: Length | None = None

    def __post_init__(self) -> None:
        check_numbers(self)

    def completed(self, spec: MethodSpec) -> RefitRequest:
        """The request with the mix of texts where a method that trains on several domains names no data."""
        is_open = self.calibration is None and spec.preset.on_pool
        return replace(self, calibration=MIX) if is_open else self


def with_preset(config: TrainConfig | None, spec: MethodSpec) -> TrainConfig:
    """The training settings; where there are none, or no learning rate, batch size or patience, a preset's own."""
    preset = spec.preset
    config = config or TrainConfig(objective=Objective.parse(preset.objective or "response"))
    return replace(
        config, lr=preset.lr if config.lr is None else config.lr,
        batch_size=config.batch_size or preset.batch_size or config.examples_per_step,
        patience=preset.patience if config.patience is None else config.patience,
        reuse=config.reuse or (preset.on_pool and config.epochs > 1 and config.objective.needs_teacher),
    )  # fmt: skip
