"""What stands for the widget where anywidget is not installed: looking at the name is fine, using it is refused."""

from __future__ import annotations

from lcc_lens.core.errors import RequestError
from lcc_lens.frontends.session.session import RestoreSession


class RestoreWidget:
    """Refuses, since anywidget is missing.

    Raises:
        RequestError: always.
    """

    def __init__(self, session: RestoreSession, *, prompt: str = "", reads_at_once: bool = True) -> None:
        raise RequestError("expected anywidget for the widget, got none; run pip install 'lcc-lens[notebook]'")
