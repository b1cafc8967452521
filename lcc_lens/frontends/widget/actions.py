"""Messages of the browser that run no model, as calls of a session."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.frontends.session.session import RestoreSession

Message = Mapping[str, Any]


def choose(session: RestoreSession, message: Message) -> None:
    """Choose heads by name, or the first ``n`` in a selector's order."""
    if "selector" not in message:
        session.choose([Head.parse(str(label)) for label in message["heads"]])
        return
    if session.scan is None:
        raise RequestError("expected a scan to choose heads by, got none; name the heads")
    n_all = len(session.scan.ranking(message["selector"], seed=session.seed))
    # A selector rounds the number of heads up, so rounding the share down to four digits still gives n heads.
    session.choose(message["selector"], share=math.floor(int(message["n"]) / n_all * 10_000) / 10_000)


#: By the ``do`` of a message.
ACTIONS: dict[str, Callable[[RestoreSession, Message], object]] = {
    "choose": choose,
    "rank": lambda session, message: session.set_rank(None if message["rank"] is None else int(message["rank"])),
    "scale": lambda session, message: session.set_scale(float(message["scale"])),
    "method": lambda session, message: session.set_method(str(message["method"])),
    "load": lambda session, message: session.load(str(message["run"])),
    "undo": lambda session, message: session.undo(),
    "redo": lambda session, message: session.redo(),
}
