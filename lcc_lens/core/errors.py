"""The errors that reach a user: one line that says what was wanted, what came, and what to do."""

from __future__ import annotations


class LensError(Exception):
    """A failure with a one-line explanation; the command line ends with exit code 1."""

    exit_code = 1


class RequestError(LensError):
    """A request that cannot be served: nothing was written; the command line ends with exit code 2."""

    exit_code = 2


class InterruptedRun(LensError):
    """A run stopped by the user after its state was saved; the command line ends with exit code 130."""

    exit_code = 130


class DiskFullError(LensError):
    """The disk filled up while something was written."""


def first_line(error: BaseException) -> str:
    """What another library's message says in one line, not too long."""
    if "trust_remote_code" in str(error):
        return "it brings its own code, which is not run here; name a model of an architecture that transformers has"
    lines = str(error).strip().splitlines()
    n_lines = 2 if lines and lines[0].endswith(":") else 1
    return " ".join(line.strip() for line in lines[:n_lines])[:200] or type(error).__name__
