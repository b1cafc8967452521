"""Recovery on every kind of text, given equal tokens: polish, low rank and LoRA on one pool of five sources.

    python benchmarks/domains.py [--folder runs/domains] [--seeds 1]

SmolLM2-135M, Wanda 50 % calibrated on C4 (``LCC_LENS_DATA`` names the sets). The refit is calibrated on the five
sources, and every row trains on the same 400 blocks of 512 tokens of them, with the same loss (KL divergence from the
dense model plus a third of the cross-entropy). Finished runs are kept in ``benchmarks/domains_wanda50.json``; delete it
to begin anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from run import describe

from lcc_lens.core.progress import shown
from lcc_lens.core.reading import read_record, write_record
from lcc_lens.evaluation.comparison.compare import compare
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.pruning.jobs import prune

OUT = Path(__file__).parent / "domains_wanda50.json"
POOL = ("alpaca", "c4", "wikitext", "python", "self")
LOSS = "3*distillation+lm"
ENTRIES = (
    "refit",
    f"refit+all-weights:{LOSS}=1e-4",
    f"lora:{LOSS}=1e-3",
    f"refit+low-rank:{LOSS}=5e-3",
    f"all-weights:{LOSS}=2e-4",
)  # fmt: skip


def main() -> None:
    """Prune once, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/domains"))
    parser.add_argument("--seeds", type=int, default=1)
    asked = parser.parse_args()
    pruned = asked.folder / "pruned"
    config = CompareConfig(
        data="+".join(POOL), examples=400, max_length=512, refit_data=POOL, refit_samples=160, blocks=8, responses=32,
        validation=16, selector="mse", speed_rounds=0,
    )  # fmt: skip
    with shown():
        if not pruned.exists():
            prune("smollm2", pruned, calibration="c4")
        compare("smollm2", pruned, asked.folder, ENTRIES, seeds=asked.seeds, config=config, out=OUT)
    command = f"python benchmarks/domains.py --seeds {asked.seeds}"
    write_record(OUT, {**read_record(OUT, dict[str, Any]), "command": command, "machine": describe()})


if __name__ == "__main__":
    main()
