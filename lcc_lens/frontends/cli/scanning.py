"""The subcommand scan: what pruning took from each head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lcc_lens.core.errors import RequestError
from lcc_lens.core.processes import is_first_process
from lcc_lens.frontends.cli.options import DenseModel, Placed, PrunedModel, RunPath
from lcc_lens.frontends.cli.show import show_scan


@dataclass(frozen=True, kw_only=True)
class ScanPair(Placed):
    """See what pruning took from every attention head."""

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it."""
    run: RunPath
    """The run directory to write."""
    data: str = "boolq"
    """Data to compare on; data with right and wrong answers also give the probe's scores."""
    examples: int = 256
    """Examples (blocks of text for a corpus)."""
    positions: Literal["all", "last", "end", "response"] | tuple[int, ...] = "all"
    """Compare at all tokens, at the question's last one as in the paper, at the end, at those that predict the
    response, or at chosen positions (-1 is the last)."""
    selectors: tuple[str, ...] | None = None
    """Scores to compute; by default probe and interaction. attribution and gradient take one backward pass,
    kl reads every head's contribution, patching runs the model once per head; mse and random are always computed.
    Selectors that an installed package registers work by their names."""
    selector_examples: int = 32
    """Examples for attribution, gradient, patching and kl."""
    probe_rank: int = 1
    """Directions in the probes' activation editing."""
    probe_solver: Literal["newton", "published"] = "newton"
    """Fit the linear probe to convergence, or by the published 200 steps."""
    probe_folds: int | None = None
    """Cross-validate the linear probe in this many parts (one split of 70/30 if not given)."""
    sites: tuple[Literal["z", "mlp", "resid"], ...] = ("z", "mlp", "resid")
    """Compare head outputs, the MLP's post-activation, the residual stream."""
    spectra: tuple[Literal["z", "mlp", "resid"], ...] = ("z",)
    """Sites to compute singular values at; memory grows with the square of the site's width."""
    max_length: int | None = None
    """Tokens per example at most (512, or the models' context where that is shorter)."""
    one_at_a_time: bool = False
    """Hold one model in memory at a time."""
    seed: int = 0
    """Seed of the draw of examples and of the probes."""
    overwrite: bool = False
    """Replace an existing scan. An interrupted scan resumes by itself."""

    def execute(self) -> None:
        from lcc_lens.analysis.scan.scan import SCAN_RECORD, scan
        from lcc_lens.analysis.selectors.registry import check_selectors
        from lcc_lens.models.pair import load_pair
        from lcc_lens.restoration.training_data import load_role

        if (self.run / SCAN_RECORD).exists() and not self.overwrite:
            raise RequestError(f"{self.run} holds a scan already; name another run or pass --overwrite")
        check_selectors(self.selectors or ())
        data = load_role(self.data, self.examples, "probe", self.seed)
        result = scan(
            load_pair(self.dense, self.pruned, one_at_a_time=self.one_at_a_time), data, positions=self.positions,
            sites=self.sites, spectra=self.spectra, selectors=self.selectors, max_length=self.max_length,
            limit=self.examples, probe_rank=self.probe_rank, probe_solver=self.probe_solver,
            probe_folds=self.probe_folds, selector_examples=self.selector_examples, seed=self.seed, run=self.run,
        )  # fmt: skip
        if is_first_process():
            show_scan(result, self.run)
