"""The subcommands of prompts: merits, prompts and rewrite."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from lcc_lens.core.ranges import Count, Length, Seed
from lcc_lens.frontends.cli.options import ClusterJobs, DenseModel, Maybe, Memory, PrunedModel, RunPath, Switch, Tabled
from lcc_lens.frontends.cli.show import console, show_table

if TYPE_CHECKING:
    from lcc_lens.prompting.study import PromptStudy

_VARIANTS = (
    "How prompts are written, beside raw, which is always measured: clear, precise, concise-cot or merits (all three), "
    "verbose, filler (the length of a merit) or filler-long (of verbose), degraded, soft (trained embeddings before "
    "the raw prompt)."
)


@dataclass(frozen=True, kw_only=True)
class MeritsOf(Tabled):
    """Score prompts by the four merits of MePO, and say what lowers them."""

    example: ClassVar[str] = "prompts.txt"

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE|DATA")]
    """A data set, or a file: .txt (a prompt per paragraph), .jsonl, or .json (preferences, as MePO's)."""
    model: Maybe[str] = None
    """A model that adds likelihoods (nats per token) and tokens per word."""
    examples: Count = 32
    """Prompts at most."""
    seed: Seed = 0
    """Seed of the draw from a data set."""

    def execute(self) -> None:
        from lcc_lens.models.loading.hooked import load_hooked, load_tokenizer
        from lcc_lens.models.loading.references import resolve
        from lcc_lens.prompting.tables import merits_table, read_prompts, scored_prompts

        tokenizer = None if self.model is None else load_tokenizer(resolve(self.model))
        prompts = read_prompts(self.data, self.examples, self.seed, tokenizer)
        scored = scored_prompts(prompts)
        if self.model is not None:
            scored = scored_prompts(prompts, load_hooked(self.model))
        table = merits_table(scored)
        columns = [name for name in table if name != "lowered"]
        rows = [[_cell(row[name]) for name in columns] for row in table.to_dict("records")]
        mean = ["mean", *(_cell(table[name].mean()) for name in columns[1:])]
        show_table(f"merits of {len(rows)} prompts: {Path(self.data).name}", columns, [*rows, mean])
        for _, found in scored[:3]:
            if found.reasons:
                console().print(f"lowered by  {found.reasons}", soft_wrap=True)
        self.write(lambda: table)


@dataclass(frozen=True, kw_only=True)
class PromptData:
    """What is measured."""

    data: Maybe[str] = None
    """Instructions or questions (alpaca if not given, or arc_easy where it cannot be had)."""
    examples: Count = 96
    """Examples per seed."""
    seeds: Count = 3
    """How many draws of examples; finished ones are kept."""
    max_length: Maybe[Length] = None
    """Tokens of prompt and response at most (512, or the models' context where that is shorter)."""
    response_tokens: Count = 128
    """The first tokens of a response that count."""
    soft_examples: Count = 240
    """Training examples of the soft prompt."""


@dataclass(frozen=True, kw_only=True)
class HeadReactions:
    """Which heads react."""

    heads: Switch = False
    """Also patch every head of the pruned model from the run on each variant into the run on the raw prompt."""
    head_examples: Count = 16
    """Examples per seed that heads are patched on."""


@dataclass(frozen=True, kw_only=True)
class Prompts(Tabled):
    """See how a dense, a pruned and a restored model react to their prompts."""

    example: ClassVar[str] = "smollm2 out/wanda50 runs/mine --restored runs/mine --data alpaca"

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it."""
    run: RunPath
    """The run directory to write."""
    restored: Maybe[str] = None
    """A restoration of the pruned model: its run directory, or a model."""
    variants: Annotated[tuple[str, ...], tyro.conf.arg(help=_VARIANTS, metavar="VARIANT [VARIANT ...]")] = (
        "raw", "clear", "precise", "concise-cot", "merits", "verbose", "filler", "filler-long", "degraded",
    )  # fmt: skip
    data: PromptData = PromptData()
    reactions: HeadReactions = HeadReactions()
    jobs: ClusterJobs = field(default_factory=ClusterJobs)
    memory: Memory = field(default_factory=Memory)

    def execute(self) -> None:
        from lcc_lens.data.checks import or_mix
        from lcc_lens.prompting.draws import StudyRequest, study_draws
        from lcc_lens.prompting.variants import check_variants

        check_variants(self.variants)
        data, reactions = self.data, self.reactions
        request = StudyRequest(
            self.dense, self.pruned, data.data or or_mix("alpaca", instead="arc_easy")[0], self.variants, self.restored,
            examples=data.examples, max_length=data.max_length, response_tokens=data.response_tokens,
            soft_examples=data.soft_examples, heads=reactions.heads, head_examples=reactions.head_examples,
            one_at_a_time=self.memory.one_at_a_time,
        )  # fmt: skip
        study = study_draws(request, self.run, seeds=data.seeds, cluster=self.jobs.chosen())
        show_study(study)
        console().print(f"study {self.run}", soft_wrap=True)
        self.write(study.table)


def show_study(study: PromptStudy) -> None:
    """Print gains by variant and model, how they differ, and how sensitive each model is to its prompt."""
    restored = "restored" in study.models
    table, shown = study.table(), ["variant", "words"]
    columns = [*shown, *(f"loss {m}" for m in study.models), *(f"gain {m}" for m in study.models), "pruned - dense"]
    if restored:
        table = table.merge(study.interaction(), on="variant")
        columns.append("interaction")
    rows = []
    for row in table.to_dict("records"):
        cells = [row["variant"], f"{row['words']:.0f}", *(f"{row[f'loss_{m}']:.3f}" for m in study.models)]
        cells += [f"{row[f'gain_{m}']:+.3f}" for m in study.models]
        cells += [_with_interval(row, name) for name in ("pruned_minus_dense", *(["interaction"] if restored else []))]
        rows.append(cells)
    show_table(f"{len(study.record.groups)} responses of {study.record.data}, nats per token", columns, rows)
    if len(study.variants) > 1:
        sensitivity = study.sensitivity().to_dict("records")
        show_table(
            "sensitivity to the prompt (standard deviation over variants)", ["model", "nats per token", "over dense"],
            [[r["model"], _with_interval(r, "sensitivity", ""), _with_interval(r, "over_dense")] for r in sensitivity],
        )  # fmt: skip
    for variant in study.reactions:
        best = study.heads(variant).table().sort_values("value", key=abs, ascending=False).head(3)
        heads = "   ".join(f"L{r.layer}H{r.head} {r.value:+.2g} ± {r.stderr:.1g}" for r in best.itertuples())
        console().print(f"heads that react most to {variant}:  {heads}", soft_wrap=True)


def _with_interval(row: dict[str, Any], name: str, sign: str = "+") -> str:
    value, low, high = (f"{row[key]:{sign}.3f}" for key in (name, f"{name}_low", f"{name}_high"))
    return value if isnan(row[f"{name}_low"]) else f"{value} [{low}, {high}]"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.2f}"
    return shortened(str(value), 48)


def shortened(text: str, width: int) -> str:
    """A text on one line of at most so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
