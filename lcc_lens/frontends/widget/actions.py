"""Messages of the browser as calls of a session: those that run no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.frontends.session.session import RestoreSession

Message = Mapping[str, Any]


def choose(session: RestoreSession, message: Message) -> None:
    """Choose heads by name, or so many of a selector's order."""
    if "selector" not in message:
        session.choose([Head.parse(str(label)) for label in message["heads"]])
        return
    session.choose(message["selector"], share=share_of(session, message["selector"], int(message["n"])))


def share_of(session: RestoreSession, selector: Any, n: int) -> float:
    """A short share that a selector turns into ``n`` heads: it rounds up, so the fourth digit is rounded down.

    Raises:
        RequestError: no scan to choose by.
    """
    if session.scan is None:
        raise RequestError("expected a scan to choose heads by, got none; name the heads")
    n_all = len(session.scan.ranking(selector, seed=session.seed))
    return math.floor(n / n_all * 10_000) / 10_000


#: By the word in a message's ``do``.
ACTIONS: dict[str, Callable[[RestoreSession, Message], object]] = {
    "choose": choose,
    "rank": lambda session, message: session.set_rank(None if message["rank"] is None else int(message["rank"])),
    "scale": lambda session, message: session.set_scale(float(message["scale"])),
    "undo": lambda session, message: session.undo(),
    "redo": lambda session, message: session.redo(),
}
