"""Restoring by clicks in a notebook: a view of a :class:`~lcc_lens.session.RestoreSession` for JupyterLab and its kin.

``contents`` says what the browser is shown, ``actions`` turns its messages into calls of the session, ``worker`` runs
what needs a model beside the notebook's own thread, and ``assets`` holds the page's script and style.
"""

from __future__ import annotations

try:
    from lcc_lens.widget.restore_widget import RestoreWidget
except ModuleNotFoundError as error:
    if error.name != "anywidget":
        raise
    from lcc_lens.widget.missing import RestoreWidget  # type: ignore[assignment]

__all__ = ["RestoreWidget"]
