"""Text to calibrate on: what names of data give, as token blocks of equal length, and what records say of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.core.reading import read_json
from lcc_lens.data.batches import require_tokens
from lcc_lens.data.checks import or_mix
from lcc_lens.data.datasets import Data, joined, load_data, text_sequences
from lcc_lens.data.registry import part_names
from lcc_lens.models.architecture.context import context_of, fitting_length
from lcc_lens.models.architecture.layers import read_config
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.provenance import RECORDS
from lcc_lens.models.self_written import DenseWriter

#: Data, names of data (several joined by ``+``), or a sequence of them, from which equally many sequences are cut.
Calibration = str | Path | Data | Sequence[str | Path | Data]
PRUNE_DATA = ("c4",)
#: What a refit is calibrated on: instructions, web text and an encyclopedia.
REFIT_DATA = ("alpaca", "c4", "wikitext")
REFIT_SAMPLES = 288


def named_calibration(calibration: Calibration | None, default: tuple[str, ...] = REFIT_DATA) -> list[str | Data]:
    """The data that a calibration names, or those that replace its default where that cannot be had."""
    chosen = or_mix(*default) if calibration is None else calibration
    parts = [chosen] if isinstance(chosen, str | Path | Data) else chosen
    return [part if isinstance(part, Data) else str(part) for part in parts]


def calibration_data(
    named: Sequence[str | Data], dense: str | Path, out: Path, n_samples: int, seq_len: int, seed: int
) -> Data:
    """Load data to calibrate on, enough for all parts; what the dense model writes itself is kept beside the output."""
    writer = DenseWriter(dense, out.with_name(f"{out.name}_self_written"), n_samples, seq_len).divided(len(named))
    return joined([
        load_data(part, role="calibration", seed=seed, as_text=True, writer=writer) if isinstance(part, str) else part
        for part in named
    ])  # fmt: skip


def check_calibration(calibration: Calibration | None, n_samples: int, *, option: str = "--n-samples") -> None:
    """Refuse, before any data are read, a calibration without data, or with too few sequences for each set.

    Args:
        option: what the message names to get more.
    """
    named = named_calibration(calibration)
    if not named:
        raise RequestError("expected data to calibrate on, got none; name some")
    first = part_names(named[0]) if isinstance(named[0], str) else named[0].parts
    n_sets = max(len(named), len(first) if len(named) == 1 else 0)
    if n_samples < n_sets:
        raise RequestError(
            f"expected at least one calibration sequence of each data set, got {n_samples} for {n_sets}; raise {option}"
        )


def files_of(references: Iterable[Any]) -> list[Path]:
    """The references that are files: models of one file, and data."""
    return [Path(name) for name in references if isinstance(name, str | Path) and Path(name).is_file()]


def calibration_length(model: Path, seq_len: int | None) -> int:
    """Tokens of a calibration sequence: as many as were asked for, or 512, or the model's context if shorter."""
    return fitting_length(seq_len, context_of(read_config(model)), option="--seq-len")


def calibration_tokens(data: Data, model: Path, n_samples: int, seq_len: int, seed: int) -> Int[Tensor, "sequence pos"]:
    """Equally long token blocks ``[sequence, pos]`` from shuffled documents."""
    tokenizer = load_tokenizer(model)
    blocks = text_sequences(data, tokenizer, seq_len, n_samples, seed=seed)
    if len(blocks) < n_samples:
        require_tokens(tokenizer, data.examples[0].prompt + data.examples[0].response, data.source)
        raise RequestError(
            f"expected {n_samples} calibration sequences of {seq_len} tokens from {data.source}, got text for "
            f"{len(blocks)}; name more data, or fewer or shorter sequences"
        )
    return torch.stack([block.tokens for block in blocks])


@dataclass(frozen=True)
class _Calibration:
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Record:
    calibration: _Calibration | None = None


def calibrated_groups(folder: Path) -> frozenset[str]:
    """The groups of all data that the model in a folder was calibrated on, by the records beside its weights."""
    files = [file for name in RECORDS if (file := folder / name).exists()]
    records = [read_json(file, _Record, "prune or refit again") for file in files]
    return frozenset(group for record in records if record.calibration for group in record.calibration.groups)
