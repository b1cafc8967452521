"""Save and load lens results in a run directory, for figures and pages that run no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lcc_lens.analysis.lens.gain import LogitGain
from lcc_lens.analysis.lens.tokens import PromotedTokens
from lcc_lens.analysis.scan.result import SCAN_RECORD
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_tensors, require_made, write_tensors
from lcc_lens.core.heads import Head
from lcc_lens.core.outputs.places import refuse_model
from lcc_lens.core.ranges import ranged
from lcc_lens.core.reading import convert, parse_json, read_record, reading

LENS_FILE = "lens.safetensors"
_AGAIN = "save it again"


@dataclass(frozen=True)
class _Gain:
    """A logit gain without its tensors."""

    head: Head
    is_cumulative: bool


@dataclass(frozen=True)
class _Weights:
    """The two models of a scan."""

    dense_sha256: str
    pruned_sha256: str


@dataclass(frozen=True)
class _Lens:
    """What the file's metadata hold."""

    gains: list[_Gain]
    promoted: list[PromotedTokens]
    weights: _Weights | None = None
    """Of the scan that lay beside them."""


@ranged
def save_lens(run: str | Path, *, gains: Sequence[LogitGain] = (), promoted: Sequence[PromotedTokens] = ()) -> None:
    """Write ``lens.safetensors`` into a run directory, atomically; an existing file is replaced.

    It names the weights of the run's scan.

    Args:
        run: the run directory.
        gains: of :func:`logit_gain`.
        promoted: of :func:`promoted_tokens`.

    Raises:
        RequestError: the folder is a model's.

    Example:
        >>> save_lens("runs/mine", gains=[logit_gain(pair, data, head, scan.components)])  # doctest: +SKIP
    """
    refuse_model(Path(run))
    tensors = {f"{i}.{name}": getattr(gain, name) for i, gain in enumerate(gains) for name in ("gains", "pruned")}
    described = {
        "gains": [{"head": list(gain.head), "is_cumulative": gain.is_cumulative} for gain in gains],
        "promoted": [asdict(tokens) for tokens in promoted],
        "weights": asdict(weights) if (weights := _scanned(Path(run))) else None,
    }
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_tensors(Path(run) / LENS_FILE, contiguous, {"lens": json.dumps(described)})


@ranged
def load_lens(run: str | Path) -> tuple[list[LogitGain], list[PromotedTokens]]:
    """Read what :func:`save_lens` wrote: the gains and the promoted tokens.

    Raises:
        RequestError: there is no such file, it is damaged, of another layout, or of other weights than the run's scan.
    """
    path = require_made(Path(run) / LENS_FILE, "save_lens")
    tensors, metadata = read_tensors(path)
    with reading(path, _AGAIN):
        lens = convert(parse_json(metadata["lens"], str(path), _AGAIN), _Lens, str(path), _AGAIN)
        gains = [
            LogitGain(gain.head, tensors[f"{i}.gains"], tensors[f"{i}.pruned"], gain.is_cumulative)
            for i, gain in enumerate(lens.gains)
        ]
    scanned = _scanned(path.parent)
    if lens.weights and scanned and lens.weights != scanned:
        raise RequestError(f"expected {path} of the models of the scan beside it, got other weights; {_AGAIN}")
    return gains, lens.promoted


def _scanned(run: Path) -> _Weights | None:
    """The weights that the run's scan names, if it has one."""
    return read_record(run / SCAN_RECORD, _Weights) if (run / SCAN_RECORD).exists() else None
