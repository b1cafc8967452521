"""The state of a session in a run folder, to go on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_tensors, write_tensors
from lcc_lens.core.heads import Head
from lcc_lens.core.reading import convert, parse_json
from lcc_lens.frontends.session.refitting import is_refitted
from lcc_lens.frontends.session.state import SessionState
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.training.config import Step

SESSION = "session.safetensors"


@dataclass(frozen=True)
class _Saved:
    """A state without its tensors, and the weights that it belongs to."""

    dense_sha256: str
    pruned_sha256: str
    method: str
    heads: tuple[str, ...]
    rank: int | None
    scale: float
    steps: tuple[Step, ...]
    held_out: float | None
    refitted: bool = False


def save_state(state: SessionState, pair: Pair, run: Path) -> None:
    """Write a state into a run folder, atomically."""
    saved = _Saved(
        pair.dense_id.sha256, pair.pruned_id.sha256, state.method, tuple(map(str, state.heads)), state.rank,
        state.scale, state.steps, state.held_out, is_refitted(state.injection),
    )  # fmt: skip
    tensors = {name: value.cpu().contiguous() for name, value in state.trained().state_dict().items()}
    write_tensors(run / SESSION, tensors, {"session": json.dumps(asdict(saved))})


def load_state(run: Path, pair: Pair, build: Callable[..., Injection]) -> SessionState:
    """Read a state, bit for bit as it was saved.

    Args:
        run: the run folder.
        pair: the session's models.
        build: makes the injection of a method, heads, rank and ``refitted``.

    Raises:
        RequestError: no saved session, a damaged one, one of other weights, or one with other shapes.
    """
    path = run / SESSION
    if not path.exists():
        raise RequestError(f"expected a saved session in {run}, got none; save one, or name another folder")
    tensors, metadata = read_tensors(path)
    saved = convert(parse_json(metadata.get("session", ""), str(path)), _Saved, str(path))
    if (saved.dense_sha256, saved.pruned_sha256) != (pair.dense_id.sha256, pair.pruned_id.sha256):
        raise RequestError(f"expected a session of this pair in {run}, got one of other weights; name another folder")
    heads = tuple(map(Head.parse, saved.heads))
    injection = build(saved.method, heads, saved.rank, refitted=saved.refitted)
    try:
        injection.load_state_dict(tensors)
    except RuntimeError as error:
        raise RequestError(
            f"expected a session of the same settings in {run}, got tensors of other shapes; open one with its low_rank"
        ) from error
    return SessionState(saved.method, heads, saved.rank, saved.scale, injection, saved.steps, saved.held_out)
