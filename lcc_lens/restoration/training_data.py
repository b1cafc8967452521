"""Training and validation data that share nothing with each other or with earlier uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import TokenSequence
from lcc_lens.data.datasets import Data, check_disjoint, encode, load_data
from lcc_lens.data.registry import named_kind
from lcc_lens.data.sources import Role
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.models.pair import Pair
from lcc_lens.pruning.jobs import recorded_groups
from lcc_lens.pruning.refit.refit import REFIT_RECORD


def load_role(name: str, n: int, role: Role, seed: int) -> Data:
    """Load examples of a role; all documents of a corpus, since they are cut into ``n`` blocks later."""
    is_corpus = Path(name).suffix == ".txt" or named_kind(name) == "text"
    return load_data(name, None if is_corpus else n, role=role, seed=seed)


def training_sequences(
    pair: Pair,
    scan: Scan | None,
    data: Data,
    validation: Data | None,
    max_length: int | None,
    limit: int | None,
    shuffle: int | None,
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """Training and validation sequences that share nothing with each other, the probe or the calibration data."""
    max_length = fitting_length(max_length, pair.context)
    if validation is None:
        data, validation = _split_off(data)
    check_disjoint(data.groups, validation.groups, "training data", "validation data")
    if shuffle is not None:
        data = data.with_shuffled_responses(shuffle)
    records = (pair.pruned_id.path / name for name in ("pruning.json", REFIT_RECORD))
    calibration = frozenset[str]().union(*map(recorded_groups, records))
    for part, name in ((data, "training data"), (validation, "validation data")):
        if part.role is not None:  # data without a role are the caller's responsibility
            if scan is not None:
                check_disjoint(part.groups, frozenset(scan.record.groups), name, "the scan's data")
            check_disjoint(part.groups, calibration, name, "the pruning's calibration data")
    return (
        encode(data, pair.tokenizer, max_length=max_length, limit=limit),
        encode(validation, pair.tokenizer, max_length=max_length, limit=limit and max(8, limit // 10)),
    )


def _split_off(data: Data) -> tuple[Data, Data]:
    """Keep every tenth group of the data for validation."""
    groups = sorted({example.group for example in data.examples})
    chosen = set(groups[::10])
    kept = tuple(example for example in data.examples if example.group not in chosen)
    held_out = tuple(example for example in data.examples if example.group in chosen)
    if not kept or not held_out:
        raise RequestError(
            f"expected at least 2 different examples to train and validate on, got {len(groups)}; add data"
        )
    return replace(data, examples=kept), replace(data, examples=held_out)
