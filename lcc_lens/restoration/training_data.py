"""Training and validation data that share nothing with each other or with earlier uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import TokenSequence
from lcc_lens.data.datasets import Data, encode, joined, load_data
from lcc_lens.data.panel import other_domains
from lcc_lens.data.registry import data_kind
from lcc_lens.data.roles import Role, check_disjoint
from lcc_lens.data.sources import TextWriter
from lcc_lens.models.architecture.context import DEFAULT_LENGTH, fitting_length
from lcc_lens.models.pair import Pair
from lcc_lens.models.self_written import DenseWriter
from lcc_lens.pruning.calibration.texts import calibrated_groups


def load_role(name: str, n: int, role: Role, seed: int, writer: TextWriter | None = None) -> Data:
    """Load examples of a role; all documents of a corpus, since they are cut into ``n`` blocks later."""
    return load_data(name, None if is_corpus(name) else n, role=role, seed=seed, writer=writer)


def is_corpus(name: str) -> bool:
    """Whether a name of data means running text, which is cut into blocks."""
    return data_kind(name) == "text"


def run_writer(dense: str | Path, run: Path, n: int, length: int | None = None) -> DenseWriter:
    """Writes the text of ``self`` and ``mix`` for a run: ``n`` blocks of ``length`` tokens, kept in its directory."""
    return DenseWriter(dense, run / "self_written", n, length or DEFAULT_LENGTH)


def pool_validation(data: Data, seed: int) -> Data:
    """Text of the domains that a pool of training data does not hold, to stop early by."""
    return load_data("+".join(other_domains(data.name)), role="probe", seed=seed, as_text=True)


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
    data = _apart(data, validation.groups, "training data", "validation data")
    if shuffle is not None:
        data = data.with_shuffled_responses(shuffle)
    calibration = calibrated_groups(pair.pruned_id.path)
    scanned = frozenset[str]() if scan is None else frozenset(scan.record.groups)
    parts = []
    for part, name in ((data, "training data"), (validation, "validation data")):
        if part.role is not None:  # data without a role are the caller's responsibility
            part = _apart(part, scanned, name, "the scan's data")
            part = _apart(part, calibration, name, "the pruning's calibration data")
        parts.append(part)
    data, validation = parts
    return (
        encode(data, pair.tokenizer, max_length=max_length, limit=limit),
        encode(validation, pair.tokenizer, max_length=max_length, limit=limit and n_validation(limit)),
    )


def _apart(data: Data, groups: frozenset[str], name: str, other: str) -> Data:
    """Data without what others hold: a pool leaves it out, one data set with such a sequence is refused."""
    if data.parts:
        return data.without(groups)
    check_disjoint(data.groups, groups, name, other)
    return data


def n_validation(n_training: int) -> int:
    """Held-out sequences that choose the best parameters: a tenth of the training's, at least 8 and at most 64."""
    return max(8, min(64, n_training // 10))


def _split_off(data: Data) -> tuple[Data, Data]:
    """Keep every tenth group of the data for validation."""
    if data.parts:
        kept_parts, held_out_parts = zip(*map(_split_off, data.parts), strict=True)
        return replace(joined(kept_parts), name=data.name), replace(joined(held_out_parts), name=data.name)
    groups = sorted({example.group for example in data.examples})
    chosen = set(groups[::10])
    kept = tuple(example for example in data.examples if example.group not in chosen)
    held_out = tuple(example for example in data.examples if example.group in chosen)
    if not kept or not held_out:
        raise RequestError(
            f"expected at least 2 different examples to train and validate on, got {len(groups)}; add data"
        )
    return replace(data, examples=kept), replace(data, examples=held_out)
