"""Subcommands that write a pruned or a refitted model: prune and refit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from lcc_lens.frontends.cli.options import DenseModel, Out, Placed, PrunedModel
from lcc_lens.frontends.cli.show import pruning_rows, refit_rows, show_table
from lcc_lens.pruning.methods.registry import PRUNERS


@dataclass(frozen=True, kw_only=True)
class Prune(Placed):
    """Remove weights and write a plain Hugging Face directory."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """smollm2, a directory, a .gguf file, or a hub id."""
    out: Out
    """The directory to write."""
    method: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(PRUNERS)}}}")] = "wanda"
    """magnitude, wanda (size times input norm) and sparsegpt (with compensation) remove single weights; slimgpt removes
    whole heads and neurons."""
    sparsity: float | None = None
    """Fraction of the weights to remove (0.5 if no pattern is given; 0.2 for slimgpt)."""
    pattern: str | None = None
    """N:M such as 2:4 instead of a fraction: N of every M weights stay."""
    calibration: str = "c4"
    """Data whose activations the method reads: a name, or a .jsonl or .txt file."""
    n_samples: int = 128
    """Calibration sequences."""
    seq_len: int = 512
    """Tokens per calibration sequence."""
    seed: int = 0
    """Seed of the draw of calibration data."""
    sliced: bool = False
    """slimgpt: write a smaller model of standard configuration instead of zeros."""
    schedule: Literal["log", "linear", "uniform", "falling"] | None = None
    """slimgpt: how the sparsity is distributed over the layers (log; uniform if sliced)."""
    split: Literal["spared", "proportional", "error"] | None = None
    """slimgpt: heads to remove per layer: their fraction rounded down (spared), to the nearest (proportional), or by
    error; neurons make up the difference."""
    overwrite: bool = False
    """Replace an existing directory."""

    def execute(self) -> None:
        from lcc_lens.pruning.jobs import prune

        report = prune(
            self.model, self.out, method=self.method, sparsity=self.sparsity, pattern=self.pattern,
            calibration=self.calibration, n_samples=self.n_samples, seq_len=self.seq_len, seed=self.seed,
            sliced=self.sliced, schedule=self.schedule, split=self.split, overwrite=self.overwrite,
        )  # fmt: skip
        show_table(f"{self.method}: {self.out}", ["", ""], pruning_rows(report))


@dataclass(frozen=True, kw_only=True)
class Refit(Placed):
    """Fit the surviving weights of a pruned model by least squares: no training, all zeros stay."""

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it."""
    out: Out
    """The directory to write."""
    calibration: tuple[str, ...] = ("alpaca", "c4", "wikitext")
    """Data whose activations are fitted, in equal parts: names, or .jsonl or .txt files."""
    n_samples: int = 288
    """Calibration sequences in all."""
    seq_len: int = 512
    """Tokens per calibration sequence."""
    follow: float = 0.5
    """Interpolates the regression inputs between the pruned model's (0) and the dense model's (1)."""
    ridge: float = 0.03
    """Strength of the pull towards the dense weights, as a fraction of the inputs' mean square."""
    mend: float = 0.75
    """Fraction of the residual-stream error that output projections correct."""
    seed: int = 0
    """Seed of the draw of calibration data."""
    overwrite: bool = False
    """Replace an existing directory. An interrupted refit resumes by itself."""

    def execute(self) -> None:
        from lcc_lens.pruning.jobs import refit

        report = refit(
            self.dense, self.pruned, self.out, calibration=self.calibration, n_samples=self.n_samples,
            seq_len=self.seq_len, follow=self.follow, ridge=self.ridge, mend=self.mend, seed=self.seed,
            overwrite=self.overwrite,
        )  # fmt: skip
        show_table(f"refitted: {self.out}", ["", ""], refit_rows(report))
