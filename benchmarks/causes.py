"""Why the heads of pruned models lost: causes, head types and circuit tasks, over pruners and calibration seeds.

    python benchmarks/causes.py [--folder runs/causes] [--models ...] [--seeds 3]

SmolLM2-135M, float32, one thread. A part is one pruned model; its seed draws the calibration data (64 sequences of C4).
Every part is measured on the same 16 x 256 tokens of C4. The selector ``own`` is judged as the others are in
``selector_study.json``: by the per-head effects of exact patching and by what training its choice recovers, on the
examples of its cells, beside that study's rows of random heads and of attribution patching. Costs are CPU seconds of a
scan without and with causes, and with attribution patching, its default selector, once each. The first part of the
first model is restored by the commands in ``RESTORED``, and the same scan says what is left of its heads' differences.

Every part is kept in the folder; the script can be stopped at any time and goes on. The committed file is written anew
after every part.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from run import command_given, describe, rounded
from selector_study import MEASURES, recovered
from transformers.utils import logging as transformers_logging

import lcc_lens as lcc
from lcc_lens.core.files import write_json
from lcc_lens.core.reading import read_json
from lcc_lens.pruning.jobs import prune

HERE = Path(__file__).parent
OUT = HERE / "causes.json"
MODELS: dict[str, dict[str, Any]] = {
    "Wanda 50 %": {"method": "wanda", "sparsity": 0.5},
    "Wanda 2:4": {"method": "wanda", "pattern": "2:4"},
    "SparseGPT 50 %": {"method": "sparsegpt", "sparsity": 0.5},
    "SlimGPT 20 %": {"method": "slimgpt", "sparsity": 0.2},
}
#: The models of the selector study by their names here, and its selectors that ``own`` is compared with.
JUDGED = {"Wanda 50 %": "wanda 50%", "Wanda 2:4": "wanda 2:4"}
BESIDE = ("random", "attribution")
#: Options of ``lcc-lens restore`` for each restoration of the first part.
RESTORED = {
    "lcc": "--method lcc --heads 1 --data alpaca --examples 480",
    "best-low-rank": "--method best-low-rank --refit-samples 160 --examples 100",
}


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds; made and written if there is none."""
    if not file.exists():
        start = time.perf_counter()
        write_json(file, rounded(make()))
        print(f"{file.parent.name} {file.stem}: {time.perf_counter() - start:.0f} s", flush=True)
    return dict(read_json(file))


class Part:
    """One pruned model."""

    def __init__(self, name: str, seed: int, folder: Path) -> None:
        self.name, self.seed = name, seed
        self.folder = folder / f"{name}_{seed}".replace(" ", "_").replace(":", "-").replace("%", "")

    def pair(self) -> lcc.Pair:
        pruned = self.folder / "pruned"
        if not pruned.exists():
            prune("smollm2", pruned, calibration="c4", n_samples=64, seed=self.seed, **MODELS[self.name])
        return lcc.load_pair("smollm2", pruned, dtype=torch.float32)

    def found(self) -> dict[str, Any]:
        return kept(self.folder / "found.json", self._find)

    def cost(self) -> dict[str, Any]:
        return kept(self.folder / "cost.json", self._cost)

    def judged(self, cells: list[dict[str, Any]]) -> dict[str, Any]:
        """By task and seed of the selector study, how ``own`` agrees with exact patching, and what it recovers."""
        mine = [cell for cell in cells if cell["model"] == JUDGED.get(self.name)]
        return {
            f"{cell['task']} {cell['seed']}": kept(
                self.folder / f"judged_{cell['task']}_{cell['seed']}.json", lambda cell=cell: self._judge(cell)
            )
            for cell in mine
        }

    def recovered(self, method: str) -> dict[str, Any]:
        return kept(self.folder / f"recovered_{method}.json", lambda: self._recover(method))

    def _find(self) -> dict[str, Any]:
        pair = self.pair()
        scan = _scan(pair, causes=True)
        assert scan.causes is not None
        heads, by_cause = scan.causes.heads, scan.causes.heads.by_cause()
        inherited = by_cause["inherited"].nan_to_num(torch.inf)
        inherited[:2] = torch.inf  # the first layers read nearly the same stream
        own = lcc.Head(*divmod(int(inherited.argmin()), inherited.shape[1]))
        return {
            "samples": scan.record.n_samples,
            "mean_over_heads": {cause: float(value.double().nanmean()) for cause, value in by_cause.items()},
            "by_layer": {
                cause: [float(row.double().nanmean()) for row in value] for cause, value in by_cause.items()
            },
            "mlp_mean": {c: float(value.double().nanmean()) for c, value in scan.causes.mlp.by_cause().items()},
            "largest_gap_of_the_sum": float((heads.mean.sum(2) - scan.mean_difference).abs().max()),
            "most_own_head": {
                "head": str(own),
                **{cause: float(value[own]) for cause, value in by_cause.items()},
                "value_constant": float(heads.constant_fraction[own][2]),
                "relative_loss": float(scan.relative_loss[own]),
            },
            **_circuits(pair),
        }  # fmt: skip

    def _recover(self, method: str) -> dict[str, Any]:
        """What is left of the squared difference by cause, and of the circuits, in the restored model.

        A method that refits restores the refitted model, which is the middle one of the three then.
        """
        run = self.folder / method
        before = _scan(self.pair(), causes=True)
        command = ["restore", "smollm2", str(self.folder / "pruned"), str(run), *RESTORED[method].split()]
        if not (run / "restoration.safetensors").exists():
            subprocess.run(
                [sys.executable, "-m", "lcc_lens", *command, "--panel-blocks", "0", "--overwrite"], check=True
            )
        base = run / "refit" if (run / "refit").exists() else self.folder / "pruned"
        pair, restoration = lcc.load_pair("smollm2", base, dtype=torch.float32), lcc.Restoration.load(run)
        with restoration.applied_to(pair.pruned):
            recovered = before.against(_scan(pair, causes=True))
        assert recovered.after is not None
        return {
            "options": RESTORED[method],
            "remaining": float(recovered.remaining.double().nanmean()),
            "median": float(recovered.remaining.double().nanmedian()),
            "by_layer": [float(row.double().nanmean()) for row in recovered.remaining],
            "by_cause": {cause: float(value.double().nanmean()) for cause, value in recovered.after.items()},
            **_circuits(pair, restoration),
        }

    def _cost(self) -> dict[str, Any]:
        pair = self.pair()
        _scan(pair, n=1, max_length=32, limit=2, selectors=("attribution",), causes=True)  # its checks run once
        seconds = {}
        for name, options in {
            "plain": {}, "causes": {"causes": True}, "attribution": {"selectors": ("attribution",)}
        }.items():  # fmt: skip
            start = time.process_time()
            _scan(pair, **options)
            seconds[name] = time.process_time() - start
        return seconds

    def _judge(self, cell: dict[str, Any]) -> dict[str, Any]:
        pair, sizes, task, seed = self.pair(), cell["sizes"], cell["task"], cell["seed"]
        data = lcc.load_data(task, sizes["scan"], role="probe", seed=seed)
        scan = lcc.scan(pair, data, sites=("z",), display=0, max_length=sizes["length"], selectors=("own", "mse"))
        gold = torch.tensor(cell["gold"]).reshape(scan.relative_loss.shape)
        exact = lcc.HeadScores("patching", gold, torch.zeros_like(gold), sizes["patch"])
        note = self.folder / f"trained_{task}_{seed}.json"
        own = recovered(pair, scan, task, seed, note, ("own",))
        beside = [row for row in cell["recovery"] if row["selector"] in BESIDE]
        return {
            **{name: scan.scores(name).rank_correlation(exact) for name in ("own", "mse")},
            "trained": [{name: row[name] for name in ("selector", "share", *MEASURES)} for row in (*own, *beside)],
        }


def _scan(pair: lcc.Pair, n: int = 16, **options: Any) -> lcc.Scan:
    data = lcc.load_data("c4", n=n, role="probe")
    return lcc.scan(pair, data, **{"max_length": 256, "limit": 16, "display": 0, "selectors": (), **options})


def _circuits(pair: lcc.Pair, restoration: lcc.Restoration | None = None) -> dict[str, Any]:
    """The strongest heads of a type, what they do, and both tasks, in all models."""
    texts = lcc.load_data("c4", n=16, role="probe")
    types = lcc.head_types(pair, restoration, data=texts, n_sequences=6, length=50)
    return {
        "induction": types.strongest("induction").to_dict("records"),
        "previous": types.strongest("previous").to_dict("records"),
        "behaviour": types.behaviour().to_dict("records"),
        "tasks": _tasks(pair, restoration),
    }


def _tasks(pair: lcc.Pair, restoration: lcc.Restoration | None) -> dict[str, Any]:
    """Logit differences of both tasks, or why there are none."""
    rows: dict[str, Any] = {}
    for name in ("indirect-object", "greater-than"):
        try:
            rows[name] = lcc.circuit_task(pair, name, restoration, effects=False).table().to_dict("records")
        except lcc.RequestError as error:
            rows[name] = str(error)
    return rows


def main() -> None:
    """Measure the parts one after the other: every model with the first seed, then the further seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/causes"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    cells = [cell for cell in read_json(HERE / "selector_study.json")["cells"] if cell["seed"] < given.seeds]
    study: dict[str, Any] = {
        "command": command_given("--folder"),
        "machine": describe(), "parts": {name: [] for name in given.models}, "judged": {}, "cpu_seconds": {},
        "recovered": {},
    }  # fmt: skip
    for seed in range(given.seeds):
        for name in given.models:
            study["parts"][name].append(Part(name, seed, given.folder).found())
            write_json(OUT, rounded(study))
    first = [Part(name, 0, given.folder) for name in given.models]
    study["cpu_seconds"] = first[0].cost()
    for part in first:
        study["judged"][part.name] = part.judged(cells)
        write_json(OUT, rounded(study))
    for method in RESTORED:
        study["recovered"][method] = first[0].recovered(method)
        write_json(OUT, rounded(study))


if __name__ == "__main__":
    main()
