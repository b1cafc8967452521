"""The subcommand scan: what pruning took from each head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import tyro

from lcc_lens.core.errors import RequestError
from lcc_lens.core.machine.processes import is_first_process
from lcc_lens.core.ranges import Count, Length, Range, Seed
from lcc_lens.frontends.cli.options import DenseModel, Maybe, Memory, PrunedModel, RunPath, Switch, Tabled
from lcc_lens.frontends.cli.show import show_scan

Sites = tuple[Literal["z", "mlp", "resid"], ...]
_POSITIONS = (
    "Compare at all tokens, at the question's last one as in the paper, at the end, at those that predict the "
    "response, or at chosen positions (-1 is the last)."
)
_SELECTORS = (
    "Scores to compute; by default attribution, and probe and interaction on data with right and wrong answers. "
    "attribution and gradient take one backward pass, kl reads "
    "every head's contribution, patching runs the model once per head, own divides differences by cause; "
    "mse and random are always computed. Selectors that an installed package registers work by their names."
)


@dataclass(frozen=True, kw_only=True)
class ScanData:
    """What the models are compared on."""

    data: str = "boolq"
    """Data to compare on, several joined by +; those with right and wrong answers also give the probe's scores."""
    examples: Count = 256
    """Examples (blocks of text for a corpus)."""
    max_length: Maybe[Length] = None
    """Tokens per example at most (512, or the models' context where that is shorter)."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How heads are scored."""

    selectors: Annotated[Maybe[tuple[str, ...]], tyro.conf.arg(help=_SELECTORS, metavar="NAME [NAME ...]")] = None
    selector_examples: Count = 32
    """Examples for attribution, gradient, patching and kl."""
    probe_rank: Count = 1
    """Directions in the probes' activation editing."""
    probe_solver: Literal["newton", "published"] = "newton"
    """Fit the linear probe to convergence, or by the published 200 steps."""
    probe_folds: Maybe[Annotated[int, Range(2)]] = None
    """Cross-validate the linear probe in this many parts (one split of 70/30 if not given)."""


@dataclass(frozen=True, kw_only=True)
class ScanMemory(Memory):
    """What takes memory."""

    spectra: Annotated[Sites, tyro.conf.arg(metavar="SITE [SITE ...]")] = ("z",)
    """Sites to compute singular values at; memory grows with the square of the site's width."""


@dataclass(frozen=True, kw_only=True)
class ScanPair(Tabled):
    """See what pruning took from every attention head."""

    example: ClassVar[str] = "smollm2 out/wanda50 runs/mine --data boolq"

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it."""
    run: RunPath
    """The run directory to write."""
    positions: Annotated[
        Literal["all", "last", "end", "response"] | tuple[int, ...],
        tyro.conf.arg(help=_POSITIONS, metavar="{all,last,end,response}|INT [INT ...]"),
    ] = "all"
    sites: Annotated[Sites, tyro.conf.arg(metavar="SITE [SITE ...]")] = ("z", "mlp", "resid")
    """Compare head outputs (z), the MLP's post-activation (mlp), the residual stream (resid)."""
    seed: Seed = 0
    """Seed of the draw of examples and of the probes."""
    causes: Switch = False
    """Divide every head's difference by cause: a changed input, its own attention pattern, its own values."""
    overwrite: Switch = False
    """Replace an existing scan. An interrupted scan resumes by itself."""
    data: ScanData = ScanData()
    scores: Scores = Scores()
    memory: ScanMemory = ScanMemory()

    def execute(self) -> None:
        from lcc_lens.analysis.scan.request import check_in_memory
        from lcc_lens.analysis.scan.scan import has_scan, scan
        from lcc_lens.analysis.selectors.registry import check_selectors
        from lcc_lens.core.outputs.places import writing_run
        from lcc_lens.data.checks import check_data
        from lcc_lens.models.loading.references import resolve
        from lcc_lens.models.pair import check_models, load_pair
        from lcc_lens.restoration.training_data import load_role, run_writer

        if has_scan(self.run) and not self.overwrite:
            raise RequestError(f"{self.run} holds a scan already; name another run or pass --overwrite")
        check_selectors(self.scores.selectors or ())
        if self.memory.one_at_a_time:
            check_in_memory(self.scores.selectors or ())
        check_data([self.data.data])
        check_models(self.dense, self.pruned, self.data.max_length)
        writer = run_writer(self.dense, self.run, self.data.examples, self.data.max_length or 512)
        with writing_run(self.run, inputs=[resolve(self.dense), resolve(self.pruned)]):
            data = load_role(self.data.data, self.data.examples, "probe", self.seed, writer)
            scores, memory = self.scores, self.memory
            result = scan(
                load_pair(self.dense, self.pruned, one_at_a_time=memory.one_at_a_time), data, positions=self.positions,
                sites=self.sites, spectra=memory.spectra, selectors=scores.selectors, max_length=self.data.max_length,
                limit=self.data.examples, probe_rank=scores.probe_rank, probe_solver=scores.probe_solver,
                probe_folds=scores.probe_folds, selector_examples=scores.selector_examples, causes=self.causes,
                seed=self.seed, run=self.run,
            )  # fmt: skip
        if is_first_process():
            show_scan(result, self.run)
            self.write(result.table)
