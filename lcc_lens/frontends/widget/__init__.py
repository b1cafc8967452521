"""Widget: a session operated by clicks in a notebook.

``contents`` is the data for the browser, ``actions`` turns its messages into calls of the session, ``worker`` runs
models in a thread beside the notebook's, and ``assets`` holds the script and style.
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
        return _refuse
    return RestoreWidget


def _refuse(*args: object, **settings: object) -> None:
    """Stands for the widget where anywidget is not installed: its name can be imported, but it cannot be made."""
    from lcc_lens.core.errors import RequestError

    raise RequestError("expected anywidget for the widget, got none; run pip install 'lcc-lens[notebook]'")
