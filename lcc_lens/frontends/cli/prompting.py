"""The subcommands of prompts: merits, prompts and rewrite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from lcc_lens.core.ranges import Count, Seed
from lcc_lens.frontends.cli.options import Maybe, Tabled
from lcc_lens.frontends.cli.show import console, show_table


@dataclass(frozen=True, kw_only=True)
class MeritsOf(Tabled):
    """Score prompts by the four merits of MePO, and say what lowers them."""

    example: ClassVar[str] = "prompts.txt"

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE|DATA")]
    """A .txt file (a prompt per paragraph), a .jsonl file, a .json file of preferences (each chosen prompt beside its
    original), or a data set."""
    model: Maybe[str] = None
    """A model that adds likelihoods (nats per token) and tokens per word."""
    examples: Count = 32
    """Prompts at most."""
    seed: Seed = 0
    """Seed of the draw from a data set."""

    def execute(self) -> None:
        from lcc_lens.models.loading.hooked import load_hooked
        from lcc_lens.prompting.merits import merits
        from lcc_lens.prompting.tables import merits_table, read_prompts

        prompts = read_prompts(self.data, self.examples, self.seed)
        model = None if self.model is None else load_hooked(self.model)
        scored = [(text, merits(text, original, model)) for text, original in prompts]
        table = merits_table(scored)
        columns = [name for name in table if name != "lowered"]
        rows = [[_cell(row[name]) for name in columns] for row in table.to_dict("records")]
        mean = ["mean", *(_cell(table[name].mean()) for name in columns[1:])]
        show_table(f"merits of {len(rows)} prompts: {Path(self.data).name}", columns, [*rows, mean])
        for _, found in scored[:3]:
            if found.reasons:
                console().print(f"lowered by  {found.reasons}", soft_wrap=True)
        self.write(lambda: table)


def _cell(value: object, width: int = 48) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.2f}"
    text = " ".join(str(value).split())
    return text if len(text) <= width else text[: width - 1] + "…"
