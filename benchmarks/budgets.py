"""What restorations recover within a time budget, and how well the budget is kept.

    python benchmarks/budgets.py [--folder runs/budgets] [--budgets 5m 15m 1h] [--method best] [--pace]

SmolLM2-135M, Wanda 50 % calibrated on C4 (``LCC_LENS_DATA`` names it), two CPU cores. Each budget is one `lcc-lens
restore` from beginning to end: its wall time counts the start of Python, the measurement of the machine and that of the
result. Recovery is measured again on 8 held-out blocks of each kind of text. Let no other process use the cores.
Finished budgets are kept in ``benchmarks/budgets.json``. ``--pace`` measures LoRA's time for a token there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from domains import Study, shared_settings
from run import describe, rounded

from lcc_lens.core.files import write_json
from lcc_lens.core.progress import shown
from lcc_lens.core.reading import read_json
from lcc_lens.evaluation.comparison.compare import compare
from lcc_lens.evaluation.panel import measure_panel, panel_blocks
from lcc_lens.models.pair import load_pair
from lcc_lens.pruning.jobs import prune
from lcc_lens.restoration.budget import BUDGET_FILE, parse_budget
from lcc_lens.restoration.result import Restoration

OUT = Path(__file__).parent / "budgets.json"
LORA = "lora-all:3*distillation+lm=3e-3"


def restored(pruned: Path, run: Path, budget: str, method: str) -> dict[str, Any]:
    """The plan, the wall time and the recovery of one restoration."""
    command = ["restore", "smollm2", str(pruned), str(run), "--method", method, "--budget", budget]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lcc_lens", *command, "--overwrite"], check=True)
    took = time.perf_counter() - start
    kept = read_json(run / BUDGET_FILE)
    plan = kept["plan"]
    return {
        "method": method, "budget": parse_budget(budget), "took": took, "planned": plan["seconds"],
        "refit_samples": plan["refit_samples"], "blocks": kept["trained"] or plan["examples"],
        "writes": plan.get("writes", True),
        "panel": measured(pruned, run),
    }  # fmt: skip


def measured(pruned: Path, run: Path) -> dict[str, Any]:
    """The recovery on more blocks than the command measures, outside its time."""
    base = run / "refit" if (run / "refit").exists() else pruned
    pair = load_pair("smollm2", base)
    return measure_panel(Restoration.load(run), pair, panel_blocks(pair.tokenizer), before_refit=str(pruned))


def lora_pace(pruned: Path, folder: Path) -> dict[str, Any]:
    """Seconds that LoRA takes for a token of text, with the loss and the steps of ``best``.

    It is trained on few and on more blocks: what every training takes once cancels.
    """
    blocks, seconds = (24, 72), []
    for n in blocks:
        config = shared_settings(Study((), blocks=n, batch=2))
        compared = compare("smollm2", pruned, folder / f"lora_{n}", [LORA], seeds=1, config=config)
        seconds.append(compared["summary"][0]["training_seconds"])
    tokens = (blocks[1] - blocks[0]) * config.max_length
    return {"entry": LORA, "blocks": blocks, "seconds_per_token": (seconds[1] - seconds[0]) / tokens}


def keep(results: dict[str, Any]) -> None:
    """Write what is measured so far."""
    write_json(OUT, {**results, "command": "python benchmarks/budgets.py", "machine": describe()})


def main() -> None:
    """Run the budgets one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/budgets"))
    parser.add_argument("--budgets", nargs="+", default=["5m", "15m", "1h"])
    parser.add_argument("--method", default="best", choices=["best", "best-low-rank"])
    parser.add_argument("--pace", action="store_true")
    asked = parser.parse_args()
    results: dict[str, Any] = read_json(OUT) if OUT.exists() else {"runs": {}}
    pruned = asked.folder / "pruned"
    if not pruned.exists():
        with shown():
            prune("smollm2", pruned, calibration="c4")
    if asked.pace:
        results["lora"] = rounded(lora_pace(pruned, asked.folder))
        keep(results)
    for budget in asked.budgets:
        name = f"{asked.method} {budget}"
        if name not in results["runs"]:
            run = asked.folder / name.replace(" ", "_")
            results["runs"][name] = rounded(restored(pruned, run, budget, asked.method))
            keep(results)
            print(name, results["runs"][name], flush=True)


if __name__ == "__main__":
    main()
