"""Recovery on every kind of text, given equal tokens: what trains surviving weights, and LoRA, on one pool of text.

    python benchmarks/domains.py [STUDY] [--folder runs/domains] [--seeds 1] [--entries ENTRY ...] [--part 1/2]
                                [--tasks TASK ...] [--limit 1000]

SmolLM2-135M, calibrated on C4 (``LCC_LENS_DATA`` names the sets). In each study the refit is calibrated on a pool of
several sources, and every row trains on the same blocks of 512 tokens of that pool, with the same loss (KL divergence
from the dense model plus a third of the cross-entropy). Finished runs are kept in ``benchmarks/domains_STUDY.json``;
delete it to begin anew. ``--part`` divides the runs among processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run import describe

from lcc_lens.core.progress import shown
from lcc_lens.core.reading import read_record, write_record
from lcc_lens.data.checks import MIX
from lcc_lens.evaluation.comparison.compare import compare, read_part
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.pruning.jobs import prune

LOSS = "3*distillation+lm"
SOURCES = ("alpaca", "c4", "wikitext", "python", "self")


@dataclass(frozen=True)
class Study:
    """One pool of text, and what trains on it."""

    entries: tuple[str, ...]
    pool: tuple[str, ...] = (MIX,)
    blocks: int = 400
    pattern: str | None = None
    """``n:m``; half of every row's weights if None."""
    batch: int = 8
    """Blocks of one optimiser step."""
    low_rank: int = 16
    """Of the rows that train one."""
    lora_rank: int = 8
    """Of the rows that train adapters."""
    refit_samples: int = 160
    """Sequences that the refit reads."""

    @property
    def pruned(self) -> str:
        """The folder of the pruned model."""
        return f"pruned{(self.pattern or '').replace(':', '')}"


def _at_rates(method: str, *rates: str) -> tuple[str, ...]:
    return tuple(f"{method}:{LOSS}={rate}" for rate in rates)


TRAINED = (*_at_rates("refit+low-rank", "5e-3"), *_at_rates("lora", "1e-2"), *_at_rates("lora-all", "3e-3"))
STUDIES = {
    "wanda50": Study(
        ("refit", *_at_rates("refit+all-weights", "1e-4"), *_at_rates("lora", "1e-3"),
         *_at_rates("refit+low-rank", "5e-3"), *_at_rates("all-weights", "2e-4")),
        pool=SOURCES,
    ),
    "mix_51k": Study(
        ("refit", *_at_rates("refit+low-rank", "5e-3", "1e-2", "2e-3"), *_at_rates("lora", "1e-3", "3e-3", "1e-2"),
         *_at_rates("lora-all", "1e-3", "3e-3", "1e-2"), *_at_rates("refit+all-weights", "3e-4", "1e-4"),
         f"lcc:{LOSS}"),
        blocks=100,
    ),
    "mix_51k_batch2": Study(
        ("refit", *_at_rates("refit+low-rank", "5e-3", "2e-3"), *_at_rates("lora", "1e-2", "3e-3"),
         *_at_rates("lora-all", "3e-3"), *_at_rates("refit+all-weights", "1e-4", "3e-4", "6e-4"),
         *_at_rates("dora", "1e-2"), *_at_rates("perp", "3e-3"), *_at_rates("perp-lora", "1e-2")),
        blocks=100, batch=2,
    ),
    "mix_51k_lora32": Study(
        (*_at_rates("lora", "5e-3"), *_at_rates("lora-all", "2e-3", "3e-3")), blocks=100, batch=2, lora_rank=32
    ),
    "mix_102k": Study(TRAINED, blocks=200),
    "mix_205k": Study(TRAINED),
    "mix_51k_rank64": Study(_at_rates("refit+low-rank", "3e-3"), blocks=100, batch=2, low_rank=64),
    "mix_205k_batch2": Study((*_at_rates("refit+all-weights", "3e-4"), *TRAINED), batch=2),
    "mix_51k_wanda24": Study(("refit", *TRAINED), blocks=100, pattern="2:4"),
    "mix_51k_wanda24_batch2": Study(
        ("refit", *_at_rates("refit+all-weights", "3e-4"), *TRAINED), blocks=100, pattern="2:4", batch=2
    ),
    "mix_571k": Study((*_at_rates("refit+all-weights", "3e-4"), *TRAINED), blocks=1115, batch=2, refit_samples=288),
    "mix_571k_wanda24": Study(
        ("refit", *_at_rates("refit+all-weights", "3e-4"), *TRAINED), blocks=1115, pattern="2:4", batch=2,
        refit_samples=288,
    ),
}  # fmt: skip


def shared_settings(study: Study, tasks: Sequence[str] = (), limit: int | None = None) -> CompareConfig:
    """What all rows of a study share; items of each zero-shot task at most: ``limit``."""
    return CompareConfig(
        data="+".join(study.pool), examples=study.blocks, max_length=512, refit_data=study.pool,
        refit_samples=study.refit_samples, blocks=8, responses=32, validation=16, selector="mse", speed_rounds=0,
        batch_size=study.batch, low_rank=study.low_rank, lora_rank=study.lora_rank, tasks=tuple(tasks),
        limit=limit if tasks else CompareConfig.limit,
    )  # fmt: skip


def main() -> None:
    """Prune once, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=STUDIES, default="wanda50")
    parser.add_argument("--folder", type=Path, default=Path("runs/domains"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--entries", nargs="+", help="of the study; all if not given")
    parser.add_argument("--tasks", nargs="+", default=[], help="zero-shot, of finished runs too")
    parser.add_argument("--limit", type=int, default=1000, help="items of each task at most")
    parser.add_argument("--part", type=read_part, default=(0, 1))
    asked = parser.parse_args()
    study, out = STUDIES[asked.study], Path(__file__).parent / f"domains_{asked.study}.json"
    pruned = asked.folder / study.pruned
    run = asked.folder if asked.study == "wanda50" else asked.folder / asked.study
    config = shared_settings(study, asked.tasks, asked.limit)
    with shown():
        if not pruned.exists():
            prune("smollm2", pruned, calibration="c4", pattern=study.pattern)
        entries = asked.entries or study.entries
        compare("smollm2", pruned, run, entries, seeds=asked.seeds, config=config, out=out, part=asked.part)
    command = f"python benchmarks/domains.py {asked.study} --seeds {asked.seeds}"
    write_record(out, {**read_record(out, dict[str, Any]), "command": command, "machine": describe()})


if __name__ == "__main__":
    main()
