"""Subcommands that write a pruned model, or one with new weights under its mask: prune, refit and reconstruct."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from lcc_lens.core.ranges import Count, Fraction, Length, Positive, Seed, Sparsity
from lcc_lens.frontends.cli.options import DenseModel, Maybe, Out, Placement, PrunedModel, Switch, Tabled
from lcc_lens.frontends.cli.show import show_facts
from lcc_lens.pruning.methods.registry import PRUNERS

_PRUNERS = (
    "magnitude, wanda (size times input norm) and sparsegpt (with compensation) remove single weights; slimgpt removes "
    "whole heads and neurons."
)
_SPLIT = (
    "Heads to remove per layer: their fraction rounded down (spared), to the nearest (proportional), or by error; "
    "neurons make up the difference."
)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Text whose activations the method reads."""

    calibration: Maybe[str] = None
    """Data by name or file, several joined by + (c4 if not given, or mix); self is text that the model writes."""
    n_samples: Count = 128
    """Calibration sequences."""
    seq_len: Maybe[Length] = None
    """Tokens per calibration sequence (512, or the model's context if shorter)."""


@dataclass(frozen=True, kw_only=True)
class Slimgpt:
    """For slimgpt alone."""

    sliced: Switch = False
    """Write a smaller model of standard configuration instead of zeros."""
    schedule: Maybe[Literal["log", "linear", "uniform", "falling"]] = None
    """How the sparsity is distributed over the layers (log if not given; uniform if sliced)."""
    split: Annotated[Maybe[Literal["spared", "proportional", "error"]], tyro.conf.arg(help=_SPLIT)] = None


@dataclass(frozen=True, kw_only=True)
class Prune(Tabled):
    """Remove weights and write a plain Hugging Face directory."""

    example: ClassVar[str] = "smollm2 out/wanda50 --method wanda --sparsity 0.5 --calibration boolq"

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """smollm2, a directory, a .gguf file, or a hub id."""
    out: Out
    """The directory to write."""
    method: Annotated[str, tyro.conf.arg(help=_PRUNERS, metavar=f"{{{','.join(PRUNERS)}}}")] = "wanda"
    sparsity: Maybe[Sparsity] = None
    """Fraction of the weights to remove (0.5 if no pattern is given; 0.2 for slimgpt)."""
    pattern: Maybe[str] = None
    """N:M such as 2:4 instead of a fraction: N of every M weights stay."""
    seed: Seed = 0
    """Seed of the draw of calibration data."""
    overwrite: Switch = False
    """Replace an existing directory."""
    data: Calibration = Calibration()
    slimgpt: Slimgpt = Slimgpt()
    memory: Placement = field(default_factory=Placement)

    def execute(self) -> None:
        from lcc_lens.pruning.jobs import prune

        report = prune(
            self.model, self.out, method=self.method, sparsity=self.sparsity, pattern=self.pattern, seed=self.seed,
            overwrite=self.overwrite, **asdict(self.data), **asdict(self.slimgpt),
        )  # fmt: skip
        show_facts(f"{self.method}: {self.out}", report)
        self.write(report.table)


@dataclass(frozen=True, kw_only=True)
class RefitCalibration:
    """Text whose activations are fitted."""

    calibration: Annotated[Maybe[tuple[str, ...]], tyro.conf.arg(metavar="DATA [DATA ...]")] = None
    """Data in equal parts: names, or .jsonl or .txt files (alpaca c4 wikitext if not given, or mix)."""
    n_samples: Count = 288
    """Calibration sequences in all."""
    seq_len: Maybe[Length] = None
    """Tokens per calibration sequence (512, or the model's context if shorter)."""


@dataclass(frozen=True, kw_only=True)
class LeastSquares:
    """How the weights are fitted."""

    follow: Fraction = 0.5
    """Interpolates the regression inputs between the pruned model's (0) and the dense model's (1)."""
    ridge: Positive = 0.03
    """Strength of the pull towards the dense weights, as a fraction of the inputs' mean square."""
    mend: Fraction = 0.75
    """Fraction of the residual-stream error that output projections correct."""


@dataclass(frozen=True, kw_only=True)
class Refit(Tabled):
    """Fit the surviving weights of a pruned model by least squares: no training, all zeros stay."""

    example: ClassVar[str] = "smollm2 out/wanda50 out/refit --calibration boolq"

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it."""
    out: Out
    """The directory to write."""
    seed: Seed = 0
    """Seed of the draw of calibration data."""
    overwrite: Switch = False
    """Replace an existing directory. An interrupted refit resumes by itself."""
    data: RefitCalibration = RefitCalibration()
    fit: LeastSquares = LeastSquares()
    memory: Placement = field(default_factory=Placement)

    def execute(self) -> None:
        from lcc_lens.pruning.jobs import refit

        report = refit(
            self.dense, self.pruned, self.out, seed=self.seed, overwrite=self.overwrite, **asdict(self.data),
            **asdict(self.fit),
        )  # fmt: skip
        show_facts(f"refitted: {self.out}", report)
        self.write(report.table)


@dataclass(frozen=True, kw_only=True)
class ReconstructCalibration:
    """Text whose hidden states are matched; one sequence in sixteen is held out."""

    calibration: Annotated[Maybe[tuple[str, ...]], tyro.conf.arg(metavar="DATA [DATA ...]")] = None
    """Data in equal parts: names, or .jsonl or .txt files (mix if not given)."""
    n_samples: Count = 128
    """Sequences in all."""
    seq_len: Maybe[Length] = None
    """Tokens per sequence (512, or the model's context if shorter)."""


@dataclass(frozen=True, kw_only=True)
class WindowTraining:
    """How each window of layers is trained."""

    window: Count = 5
    """Decoder layers that are trained together; fewer take less memory."""
    epochs: Count = 3
    """Passes over the sequences, for each window."""
    lr: Positive = 3e-4
    """Learning rate at the first step; it falls to zero."""
    batch_size: Count = 2
    """Sequences of an optimiser step."""


@dataclass(frozen=True, kw_only=True)
class Reconstruct(Tabled):
    """Train a pruned model's layers, some at a time, to give the dense model's hidden states; all zeros stay.

    Best after refit, for models that do not fit for restore's training.
    """

    example: ClassVar[str] = "smollm2 out/refit out/reconstructed"

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it, best refitted."""
    out: Out
    """The directory to write."""
    seed: Seed = 0
    """Seed of the draws of data, of held-out sequences and of their order."""
    overwrite: Switch = False
    """Replace an existing directory. An interrupted reconstruction resumes by itself."""
    data: ReconstructCalibration = ReconstructCalibration()
    training: WindowTraining = WindowTraining()
    memory: Placement = field(default_factory=Placement)

    def execute(self) -> None:
        from lcc_lens.pruning.jobs import reconstruct

        report = reconstruct(
            self.dense, self.pruned, self.out, seed=self.seed, overwrite=self.overwrite, **asdict(self.data),
            **asdict(self.training),
        )  # fmt: skip
        show_facts(f"reconstructed: {self.out}", report)
        self.write(report.table)
