"""Save and load lens results in a run directory, for figures and pages that run no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lcc_lens.analysis.lens.gain import LogitGain
from lcc_lens.analysis.lens.tokens import PromotedTokens, TokenScore
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_tensors, write_tensors
from lcc_lens.core.heads import Head

LENS_FILE = "lens.safetensors"


def save_lens(run: str | Path, *, gains: Sequence[LogitGain] = (), promoted: Sequence[PromotedTokens] = ()) -> None:
    """Write ``lens.safetensors`` into a run directory, atomically; an existing file is replaced.

    Args:
        run: the run directory.
        gains: of :func:`logit_gain`.
        promoted: of :func:`promoted_tokens`.

    Example:
        >>> save_lens("runs/mine", gains=[logit_gain(pair, data, head, scan.components)])  # doctest: +SKIP
    """
    tensors = {f"{i}.{name}": getattr(gain, name) for i, gain in enumerate(gains) for name in ("gains", "pruned")}
    described = {
        "gains": [{"head": list(gain.head), "is_cumulative": gain.is_cumulative} for gain in gains],
        "promoted": [asdict(one) for one in promoted],
    }
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_tensors(Path(run) / LENS_FILE, contiguous, {"lens": json.dumps(described)})


def load_lens(run: str | Path) -> tuple[list[LogitGain], list[PromotedTokens]]:
    """Read what :func:`save_lens` wrote: the gains and the promoted tokens.

    Raises:
        RequestError: there is no such file, it is damaged, or of another layout.
    """
    path = Path(run) / LENS_FILE
    if not path.exists():
        raise RequestError(f"expected {path}, got none; save what the lens says with save_lens")
    tensors, metadata = read_tensors(path)
    try:
        described = json.loads(metadata["lens"])
        gains = [
            LogitGain(Head(*entry["head"]), tensors[f"{i}.gains"], tensors[f"{i}.pruned"], entry["is_cumulative"])
            for i, entry in enumerate(described["gains"])
        ]
        promoted = [
            PromotedTokens(Head(*one["head"]), one["reading"], tuple(TokenScore(**token) for token in one["tokens"]))
            for one in described["promoted"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"expected {path} of this version, got another layout ({error}); save it again") from error
    return gains, promoted
