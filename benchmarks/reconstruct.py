"""What does ``reconstruct`` add to a refit? Decoder layers learn the dense model's hidden states under the mask.

    python benchmarks/reconstruct.py [--folder runs/domains] [--parts refit-5-3e-4 ...]

SmolLM2-135M, Wanda 50 %; the refit, training blocks and held-out text of ``domains.py mix_51k_batch2``, whose runs are
in the folder, and for equal time a refit on 288 sequences instead of 160. A part is what is trained from, how many
decoder layers are in a window, and the learning rate. Finished parts are kept in ``benchmarks/reconstruct.json``.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from domains import STUDIES, shared_settings
from run import describe, rounded

from lcc_lens.core.config import compute_dtype, default_device
from lcc_lens.core.files import write_json
from lcc_lens.core.progress import shown
from lcc_lens.core.reading import read_json
from lcc_lens.data.checks import MIX
from lcc_lens.evaluation.comparison.data import ComparisonData
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.evaluation.panel import panel_losses, panel_recovery
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve
from lcc_lens.pruning.jobs import refit
from lcc_lens.pruning.reconstruct.reconstruct import ReconstructConfig, reconstruct_checkpoint

OUT = Path(__file__).parent / "reconstruct.json"
STUDY = "mix_51k_batch2"
LONGER = "refit-288"
PARTS = ("refit-5-3e-4", "pruned-5-3e-4", "refit-5-6e-4", "refit-1-3e-4", "refit-10-6e-4")


def main() -> None:
    """Train the parts one after the other; measure each on the panel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/domains"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    asked = parser.parse_args()
    study = STUDIES[STUDY]
    run_folder = asked.folder / STUDY
    data = ComparisonData(shared_settings(study), "smollm2", run_folder)
    tokenizer = load_tokenizer(resolve("smollm2"))
    sequences = data.training(Entry.parse("all-weights"), tokenizer, seed=0)
    tokens = torch.stack([some.tokens for some in sequences])
    texts = data.measures(tokenizer).texts
    folders = {"dense": resolve("smollm2"), "pruned": asked.folder / study.pruned, "refit": run_folder / "refit"}
    measured = {name: panel_losses(load_plain(folder), texts) for name, folder in folders.items()}
    results: dict[str, Any] = read_json(OUT) if OUT.exists() else {"parts": {}}

    def note(part: str, losses: dict[str, float], **more: Any) -> None:
        found = rounded(panel_recovery(measured["dense"], measured["pruned"], losses))
        results["parts"][part] = {**more, **{name: found[name] for name in ("mean", "worst", "domains")}}
        write_json(OUT, {"command": "python benchmarks/reconstruct.py", "machine": describe(), **results})
        print(part, results["parts"][part], flush=True)

    note("refit", measured["refit"])
    longer = asked.folder / LONGER
    if not longer.exists():
        refit("smollm2", folders["pruned"], longer, calibration=MIX)
    if LONGER not in results["parts"]:
        note(LONGER, panel_losses(load_plain(longer), texts))
    for part in asked.parts:
        if part not in results["parts"]:
            start, window, lr = part.split("-", 2)
            out, begun = asked.folder / f"reconstructed-{part}", time.perf_counter()
            with shown():
                report = reconstruct_checkpoint(
                    folders["dense"], folders[start], out, tokens=tokens,
                    config=ReconstructConfig(window=int(window), lr=float(lr)), device=default_device(),
                    dtype=compute_dtype(default_device()), overwrite=True, provenance={"data": STUDY},
                )  # fmt: skip
            seconds = time.perf_counter() - begun
            note(part, panel_losses(load_plain(out), texts), seconds=round(seconds, 1), windows=report["windows"])
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
