"""Widget: restore by clicks in a notebook, on top of a session.

``contents`` says what the browser is shown, ``actions`` turns its messages into calls of the session, ``worker`` runs
what needs a model beside the notebook's own thread, and ``assets`` holds the page's script and style.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcc_lens.frontends.widget.restore_widget import RestoreWidget as RestoreWidget


def __getattr__(name: str) -> Any:
    if name != "RestoreWidget":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from lcc_lens.frontends.widget.restore_widget import RestoreWidget
    except ModuleNotFoundError as error:
        if error.name != "anywidget":
            raise
        from lcc_lens.frontends.widget.missing import RestoreWidget  # type: ignore[assignment]
    return RestoreWidget
