"""The subcommand compare: methods, baselines and controls under the same conditions."""

from __future__ import annotations

from dataclasses import dataclass

from lcc_lens.frontends.cli.options import Common, DenseModel, PrunedModel, RunPath
from lcc_lens.frontends.cli.show import show_comparison


@dataclass(frozen=True, kw_only=True)
class Compare(Common):
    """Train and measure methods, baselines and controls under the same conditions; finished runs are kept."""

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it."""
    run: RunPath
    """A folder for the comparison; the same command resumes there."""
    methods: tuple[str, ...] = ("lcc", "lcc@dense", "random-basis", "offset", "mean-shift", "lora")
    """Restore's methods, lora, dora (-vo: on v and o alone), lofit, eora, flap, perp or perp-lora; refit+ before one
    starts from the refitted model; @dense, @shuffled or @random-heads after it is a control; :distillation trains
    towards the dense model; =3e-3 sets a learning rate, =tuned chooses one by a range test."""
    baselines: bool = False
    """Also every baseline."""
    controls: bool = False
    """Also lcc's controls: on the dense model, with shuffled responses, over a random basis, offset alone, mean
    difference, and at random heads where not all are restored."""
    seeds: int = 3
    """How many seeds (the draw of examples, their order, initial values)."""
    data: str = "alpaca"
    """Training data."""
    examples: int = 480
    """Training examples."""
    texts: tuple[str, ...] = ("wikitext", "c4")
    """Texts of another kind, for perplexity; the first is the main figure."""
    blocks: int = 16
    """Blocks of 512 tokens of each."""
    tasks: tuple[str, ...] = ()
    """Zero-shot tasks of lm-eval."""
    limit: int = 200
    """Items of each task at most."""
    responses: int = 96
    """Held-out responses for the KL divergence from the dense model and the response loss."""
    heads: float = 1.0
    """Fraction of heads to restore."""
    selector: str = "mse"
    """How heads are chosen: probe, interaction, attribution, patching, mse, kl, gradient, random, or a
    selector that an installed package registers."""
    epochs: int = 1
    """Passes over the training data."""
    max_length: int = 256
    """Tokens per example at most."""
    speed_rounds: int = 15
    """Rounds in which inference is timed at the end (0: not at all)."""
    part: str = "1/1"
    """i/n: compute every n-th run, starting at the i-th; start the same command with 1/n to n/n in n processes."""

    def execute(self) -> None:
        from lcc_lens.evaluation.comparison.compare import COMPARISON, compare, read_part
        from lcc_lens.evaluation.comparison.config import CompareConfig
        from lcc_lens.evaluation.comparison.entry import all_entries

        config = CompareConfig(
            data=self.data, examples=self.examples, texts=self.texts, blocks=self.blocks, responses=self.responses,
            tasks=self.tasks, limit=self.limit, heads=self.heads, selector=self.selector, max_length=self.max_length,
            epochs=self.epochs, speed_rounds=self.speed_rounds,
        )  # fmt: skip
        entries = all_entries(self.methods, baselines=self.baselines, controls=self.controls, heads=self.heads)
        results = compare(
            self.dense, self.pruned, self.run, entries, seeds=self.seeds, config=config, part=read_part(self.part)
        )  # fmt: skip
        show_comparison(results["bare"], results["summary"], self.run / COMPARISON)
