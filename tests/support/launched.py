"""What tests start as processes of their own: a restoration of saved models that says every step; a scan that dies."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.machine.processes import is_first_process, n_processes, process_index
from lcc_lens.core.progress import tracked_by
from lcc_lens.data.datasets import load_data
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import is_sharded, shard_layers
from lcc_lens.models.pair import load_pair
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.objectives import Objective

EVERY = 3  # steps between checkpoints


def run(folder: Path, name: str, *, resume: bool = False, die_at: int = 0, ask: bool = False) -> Restoration:
    """Restore the models in a folder.

    Args:
        folder: holds both models, their scan and the data.
        name: of the run directory in it.
        resume: whether to go on.
        die_at: the step after which the last process kills itself; none if 0.
        ask: whether to wait for a line on standard input after every step.
    """
    pair, found = load_pair(folder / "dense", folder / "pruned"), Scan.load(folder / "scan")
    config = TrainConfig(
        lr=0.1, batch_size=5, validate_every=2, checkpoint_every=EVERY, seed=1, objective=Objective(1.0, 1.0)
    )

    def report(step) -> None:
        print(f"step {step.step}", flush=True)
        if step.step == die_at and process_index() == n_processes() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if ask:
            sys.stdin.readline()

    return restore(
        pair, found, found.select("mse", share=0.6), load_data(str(folder / "questions.jsonl")), method="lcc+low-rank",
        config=config, run=folder / name, resume=resume, on_step=report,
    )  # fmt: skip


def scan_until(folder: Path, name: str, die_at: int) -> None:
    """Scan the models in a folder all over; the last process kills itself after so many batches, not at all if 0."""

    def tracker(batches, total, description):
        for number, batch in enumerate(batches, 1):
            yield batch
            if number == die_at and process_index() == n_processes() - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    with tracked_by(tracker):
        pair, data = load_pair(folder / "dense", folder / "pruned"), load_data(str(folder / "questions.jsonl"))
        scan(pair, data, batch_tokens=300, display=2, run=folder / name)


def scan_sharded(folder: Path, name: str) -> None:
    """Scan models whose layers are divided among the processes; all run the same passes, and the first one saves."""
    pair = load_pair(folder / "dense", folder / "pruned")
    models = (pair.dense, pair.pruned)
    n_weights = [_n_held(model) for model in models]
    for model in models:
        shard_layers(model)
    found = scan(pair, load_data(str(folder / "questions.jsonl"), n=20), display=2)
    for model, n in zip(models, n_weights, strict=True):  # after the passes, too
        assert is_sharded(model)
        assert _n_held(model) < 0.6 * n
    if is_first_process():
        found.save(folder / name)


def _n_held(model: HookedModel) -> int:
    """The number of weights of the decoder layers in this process."""
    return sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.blocks.parameters())


def restore_sharded(folder: Path, name: str) -> Restoration:
    """Restore by a constant per head towards the dense model; several processes share the layers."""
    pair, found = load_pair(folder / "dense", folder / "pruned"), Scan.load(folder / "scan")
    if n_processes() > 1:
        for model in (pair.dense, pair.pruned):
            shard_layers(model)
    scan(pair, load_data(str(folder / "questions.jsonl"), n=4))  # what ran before leaves the layers divided
    config = TrainConfig(lr=0.1, batch_size=5, validate_every=2, seed=1, objective=Objective(1.0, 1.0))
    return restore(
        pair, found, found.select("mse", share=0.6), load_data(str(folder / "questions.jsonl")), config=config,
        run=folder / name,
    )  # fmt: skip


if __name__ == "__main__" and sys.argv[4] == "restore-sharded":
    restore_sharded(Path(sys.argv[1]), sys.argv[2])
elif __name__ == "__main__" and sys.argv[4] == "sharded":
    scan_sharded(Path(sys.argv[1]), sys.argv[2])
elif __name__ == "__main__" and sys.argv[4] == "scan":
    scan_until(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
elif __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], die_at=int(sys.argv[3]), ask=sys.argv[4] == "ask")
