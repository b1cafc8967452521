"""Call the command line in this process, and assert on its refusals."""

from __future__ import annotations

import pytest

from lcc_lens.frontends.cli.main import run


def call(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], code: int, message: str, *arguments: object) -> None:
    assert call(*arguments) == code
    error = capsys.readouterr().err.strip()
    assert message in error, error
    assert len(error.splitlines()) == 1
