"""Subcommands that put back what pruning took: restore and export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lcc_lens.cli.options import Common, DenseModel, Out, PrunedModel, RunPath, load_role
from lcc_lens.errors import RequestError
from lcc_lens.selectors import SelectorName
from lcc_lens.show import show_losses, show_table

if TYPE_CHECKING:
    from lcc_lens.heads import Head
    from lcc_lens.pair import Pair
    from lcc_lens.scan import Scan


@dataclass(frozen=True, kw_only=True)
class Restore(Common):
    """Find a constant per head that makes up for what pruning took (scans first where RUN holds no scan)."""

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it."""
    run: RunPath
    """The run directory: holds the scan, receives the restoration."""
    method: str = "lcc"
    """lcc: magnitudes over lost directions plus an offset, a constant per head. Its controls: offset without
    directions; mean-shift (the scan's mean difference, nothing trained); random-basis (the same training over random
    directions). Changed weights, whose zeros stay: gain (of head outputs), norms, low-rank (on every linear map),
    masked (all surviving weights). Joined by + they train together: lcc+low-rank. best: what brings back most, a refit
    by least squares and then a low-rank that follows the dense model."""
    data: str = "alpaca"
    """Training data: instructions, questions or text."""
    examples: int = 480
    """Training examples at most."""
    heads: float = 0.25
    """Share of all heads to restore."""
    selector: SelectorName = "probe"
    """How heads are chosen."""
    scan_data: str = "boolq"
    """Data for the scan where RUN holds none."""
    scan_examples: int = 256
    """Examples for that scan."""
    rank: int | None = None
    """Directions per head (all if not given)."""
    low_rank: int | None = None
    """Rank of low-rank (8 if not given; best: 16)."""
    start: Literal["zero", "mean"] = "zero"
    """Where the magnitudes start: at the pruned model, or at the mean difference."""
    epochs: int = 1
    """Passes over the training data."""
    batch_size: int = 8
    """Examples per optimiser step."""
    lr: float | None = None
    """AdamW's learning rate of the method's first part (its own if not given; a constant's is in units of each head's
    difference); decays linearly to zero."""
    tune_lr: bool = False
    """Choose the learning rate by a few steps at each of five first."""
    objective: str | None = None
    """Minimise the loss of the response (response) or of all tokens (text), the distance to the dense model's
    distribution (distillation) or to its head outputs (heads), or several joined by +, as in text+3*distillation
    (response if not given; best: text+distillation)."""
    temperature: float = 1.0
    """Of distillation."""
    patience: int | None = None
    """Stop after so many validations without a new best."""
    max_length: int = 512
    """Tokens per example at most."""
    shuffle_responses: bool = False
    """A control: train on every prompt with another one's response."""
    hooks_only: bool = False
    """Restore even where the checkpoint cannot hold the result (it then works under hooks alone)."""
    checkpoint_every: int = 20
    """Optimiser steps between checkpoints."""
    seed: int = 0
    """Of the draw and order of the training data."""
    resume: bool = False
    """Go on from the run's checkpoint."""
    overwrite: bool = False
    """Replace a restoration that is there."""

    def execute(self) -> None:
        from lcc_lens.best import BEST_LOW_RANK, BEST_OBJECTIVE, restore_best
        from lcc_lens.injections import parse_method, uses_components, uses_heads
        from lcc_lens.objectives import Objective
        from lcc_lens.pair import load_pair
        from lcc_lens.recipe import restore
        from lcc_lens.restoration import RESTORATION_TENSORS
        from lcc_lens.training import TrainConfig

        if (self.run / RESTORATION_TENSORS).exists() and not (self.overwrite or self.resume):
            raise RequestError(f"{self.run} holds a restoration already; name another run or pass --overwrite")
        is_best = self.method == "best"
        if not is_best:
            parse_method(self.method)
        objective = self.objective or (BEST_OBJECTIVE if is_best else "response")
        config = TrainConfig(
            epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, checkpoint_every=self.checkpoint_every,
            seed=self.seed, patience=self.patience,
            objective=Objective.parse(objective, temperature=self.temperature),
        )  # fmt: skip
        data = load_role(self.data, self.examples, "train", self.seed)
        validation = load_role(self.data, max(8, self.examples // 10), "held-out", self.seed)
        if is_best:
            restoration = restore_best(
                self.dense, self.pruned, self.run, data, config=config, validation=validation,
                low_rank=self.low_rank or BEST_LOW_RANK, max_length=self.max_length, limit=self.examples,
                resume=self.resume,
            )  # fmt: skip
            show_losses(restoration.record.losses, 0, self.run)
            return
        pair = load_pair(self.dense, self.pruned)
        found = self._scan(pair) if uses_components(self.method) or uses_heads(self.method) else None
        heads = self._heads(found) if found is not None else []
        restoration = restore(
            pair, found, heads, data, method=self.method, config=config, validation=validation, rank=self.rank,
            low_rank=self.low_rank or 8, start=self.start, max_length=self.max_length, limit=self.examples,
            exportable=not self.hooks_only, shuffle_responses=self.shuffle_responses, tune_lr=self.tune_lr,
            run=self.run, resume=self.resume,
        )  # fmt: skip
        show_losses(restoration.record.losses, len(heads), self.run)

    def _scan(self, pair: Pair) -> Scan:
        from lcc_lens.scan import SCAN_RECORD, Scan, scan

        if (self.run / SCAN_RECORD).exists():
            return Scan.load(self.run)
        data = load_role(self.scan_data, self.scan_examples, "probe", self.seed)
        named = None if self.selector in ("mse", "random") else (self.selector,)
        return scan(
            pair, data, selectors=named, max_length=min(self.max_length, pair.context), limit=self.scan_examples,
            seed=self.seed, run=self.run,
        )  # fmt: skip

    def _heads(self, found: Scan) -> list[Head]:
        return found.select(self.selector, share=self.heads, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Export(Common):
    """Fold a restoration into a plain Hugging Face directory and verify it."""

    run: RunPath
    """The run directory with the restoration."""
    out: Out
    """The directory to write."""
    pruned: str | None = None
    """Where the pruned model lies now (where the run found it, if not given)."""
    overwrite: bool = False
    """Replace an existing directory."""

    def execute(self) -> None:
        from lcc_lens.export import export
        from lcc_lens.restoration import Restoration

        restoration = Restoration.load(self.run)
        report = export(restoration, self.pruned or restoration.record.pruned, self.out, overwrite=self.overwrite)
        rows = [
            ["biases added", str(len(report.added))],
            ["tensors changed", str(len(report.changed))],
            ["tensors bit-identical", str(report.identical_tensors)],
            ["zeros in matrices", f"{report.zeros:,}"],
            ["largest logit difference to the hooked model", f"{report.logit_difference:.2g}"],
            ["largest effect on the logits", f"{report.logit_effect:.2g}"],
        ]
        show_table(f"exported and verified: {self.out}", ["", ""], rows)
