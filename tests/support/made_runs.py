"""Run directories for tests of whatever reads them: a real scan beside a restoration and a log made up for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.files import write_json
from lcc_lens.core.heads import Head, head_indices
from lcc_lens.frontends.explorer.token_tables import TokenTables
from lcc_lens.restoration.record import RestorationRecord
from lcc_lens.restoration.result import Restoration

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--"
HEADS = (Head(0, 4), Head(2, 1))
LOSSES = {"dense": 2.0, "pruned": 3.0, "restored": 2.4}


def write_run(scan: Scan, path: Path, *, is_hostile: bool = False, is_restored: bool = True) -> Path:
    """A run with a scan, token tables, and a restoration of two heads with a log of six steps."""
    if is_hostile:
        texts = tuple(dataclasses.replace(t, pieces=(HOSTILE, *t.pieces[1:])) for t in scan.tokens)
        record = dataclasses.replace(scan.record, dense=HOSTILE, pruned=HOSTILE, data=HOSTILE, source=HOSTILE)
        scan = dataclasses.replace(scan, tokens=texts, record=record)
    scan.save(path)
    if is_restored:
        _write_restoration(scan, path)
    made_up_tables(scan, HOSTILE if is_hostile else " paris").save(path)
    return path


def made_up_tables(scan: Scan, first: str) -> TokenTables:
    """Tables whose first component promotes the token 7 at every head and 9 at L2H1, and suppresses 8."""
    tokens = torch.full((*scan.relative_loss.shape, 2, 2, 2), 7, dtype=torch.int32)
    tokens[:, :, :, 1] = 8
    tokens[2, 1, 0, 0, 0] = 9
    logits = torch.tensor([[2.0, 1.0], [-2.0, -1.0]]).expand(tokens.shape).clone()
    return TokenTables(("1", "mean"), tokens, logits, {7: first, 8: " rome", 9: "berlin"})


def _write_restoration(scan: Scan, path: Path) -> None:
    record = scan.record
    made = RestorationRecord(
        record.dense, record.pruned, record.dense_sha256, record.pruned_sha256, "lcc", record.data, 24, 0,
        losses=LOSSES, n_trained=24,
    )  # fmt: skip
    chosen = head_indices(HEADS)
    magnitudes = 0.5 * scan.components.coefficients[chosen]
    Restoration(made, HEADS, 0.5 * scan.mean_difference[chosen], magnitudes, torch.zeros(2, 6)).save(path)
    hashes = {"dense_sha256": record.dense_sha256, "pruned_sha256": record.pruned_sha256}
    write_json(path / "metrics.json", {**hashes, "validation": {"losses": LOSSES, "sequences": 12}})
    steps = [
        {"step": i, "loss": 3 - 0.1 * i, "validation_loss": 3 - 0.1 * i if i % 3 == 0 else None} for i in range(1, 7)
    ]
    (path / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
