"""Run a cluster's jobs in this process, by submitit's own executor for debugging: a job runs when it is waited for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def run_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let submitit run jobs here; returns the names of the jobs, as they come."""
    submitit = pytest.importorskip("submitit")
    kind, submitted = submitit.AutoExecutor, []

    def executor(folder: Path, cluster: str) -> Any:
        made = kind(folder, cluster="debug")
        submit = made.submit

        def noted(function: Any, *arguments: Any) -> Any:
            submitted.append(arguments[1])
            return submit(function, *arguments)

        made.submit = noted
        return made

    monkeypatch.setattr(submitit, "AutoExecutor", executor)
    return submitted
