"""The subcommand compare: methods, baselines and controls under the same conditions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import tyro

from lcc_lens.analysis.selectors.names import DEFAULT_SELECTOR
from lcc_lens.core.ranges import Count, Length, Natural, Share
from lcc_lens.frontends.cli.options import (
    SELECTOR_HELP,
    ClusterJobs,
    DenseModel,
    Maybe,
    PrunedModel,
    RunPath,
    Switch,
    Tabled,
)
from lcc_lens.frontends.cli.show import show_comparison

_METHODS = (
    "Restore's methods, lora, dora (-vo: on v and o alone), lofit, eora, flap, perp or perp-lora; refit+ before one "
    "starts from the refitted model; @dense, @shuffled or @random-heads after it is a control; :distillation trains "
    "towards the dense model; =3e-3 sets a learning rate, =tuned chooses one by a range test."
)
_CONTROLS = (
    "Also lcc's controls: on the dense model, with shuffled responses, over a random basis, offset alone, mean "
    "difference, and at random heads where not all are restored."
)


@dataclass(frozen=True, kw_only=True)
class CompareData:
    """What methods are trained on, and how."""

    data: Maybe[str] = None
    """Training data, several joined by + (alpaca if not given, or the mix where it cannot be had)."""
    examples: Count = 480
    """Training examples."""
    max_length: Length = 256
    """Tokens per example at most."""
    epochs: Count = 1
    """Passes over the training data."""
    refit_samples: Count = 288
    """Calibration sequences of the refit that refit+, best and polish start from."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is measured."""

    texts: Annotated[Maybe[tuple[str, ...]], tyro.conf.arg(metavar="DATA [DATA ...]")] = None
    """Texts to measure recovery on, names or files (one of each kind if not given); the first is the main figure."""
    blocks: Count = 8
    """Blocks of 512 tokens of each."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK [TASK ...]")] = ()
    """Zero-shot tasks of lm-eval."""
    limit: Count = 200
    """Items of each task at most."""
    responses: Count = 96
    """Held-out responses for the KL divergence from the dense model and the response loss."""
    speed_rounds: Natural = 15
    """Rounds in which inference is timed at the end (0: not at all)."""


@dataclass(frozen=True, kw_only=True)
class Compare(Tabled):
    """Train and measure methods, baselines and controls under the same conditions; finished runs are kept."""

    example: ClassVar[str] = "smollm2 out/wanda50 runs/compared --methods lcc lcc@dense lora refit+low-rank --seeds 3"

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it."""
    run: RunPath
    """A folder for the comparison; the same command resumes there."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(help=_METHODS, metavar="METHOD [METHOD ...]")] = (
        "lcc", "lcc@dense", "random-basis", "offset", "mean-shift", "lora",
    )  # fmt: skip
    baselines: Switch = False
    """Also every baseline."""
    controls: Annotated[Switch, tyro.conf.arg(help=_CONTROLS)] = False
    seeds: Count = 3
    """How many seeds (the draw of examples, their order, initial values)."""
    heads: Share = 1.0
    """Fraction of heads to restore."""
    selector: Annotated[str, tyro.conf.arg(help=SELECTOR_HELP)] = DEFAULT_SELECTOR
    part: str = "1/1"
    """i/n: compute every n-th run, starting at the i-th; start the same command with 1/n to n/n in n processes."""
    jobs: ClusterJobs = field(default_factory=ClusterJobs)
    data: CompareData = CompareData()
    measures: Measures = Measures()

    def execute(self) -> None:
        from lcc_lens.data.panel import available_panel
        from lcc_lens.evaluation.comparison.cluster import compare_on_cluster
        from lcc_lens.evaluation.comparison.compare import COMPARISON, compare, read_part, require_a_measured_run
        from lcc_lens.evaluation.comparison.config import CompareConfig, default_data
        from lcc_lens.evaluation.comparison.entry import all_entries

        data, measures = self.data, self.measures
        config = CompareConfig(
            examples=data.examples, max_length=data.max_length, epochs=data.epochs, heads=self.heads,
            selector=self.selector, blocks=measures.blocks, responses=measures.responses, tasks=measures.tasks,
            limit=measures.limit, speed_rounds=measures.speed_rounds, refit_samples=data.refit_samples,
            data=data.data or default_data(), texts=measures.texts or available_panel(),
        )  # fmt: skip
        entries = all_entries(self.methods, baselines=self.baselines, controls=self.controls, heads=self.heads)
        cluster, part = self.jobs.chosen(), read_part(self.part)
        if cluster is None:
            results = compare(self.dense, self.pruned, self.run, entries, seeds=self.seeds, config=config, part=part)
        else:
            results = compare_on_cluster(
                self.dense, self.pruned, self.run, entries, cluster=cluster, seeds=self.seeds, config=config
            )
        show_comparison(results["bare"], results["summary"], self.run / COMPARISON)
        self.write(results.table)
        require_a_measured_run(results["summary"])
