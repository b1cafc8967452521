"""Errors for the user, one line each: what was expected, what came, and what to do."""

from __future__ import annotations


class LensError(Exception):
    """A failure with a one-line explanation; the command line ends with exit code 1."""

    exit_code = 1

    def __str__(self) -> str:
        """The message on one line, also where it shows a value whose representation has several."""
        return " ".join(line.strip() for line in super().__str__().splitlines())


class RequestError(LensError):
    """A request that cannot be served: nothing was written; the command line ends with exit code 2."""

    exit_code = 2


class InterruptedRun(LensError):
    """A run stopped by the user after its state was saved; the command line ends with exit code 130."""

    exit_code = 130


class DiskFullError(LensError):
    """The disk filled up while something was written.

    Args:
        place: what was written; ``again``: how to go on once there is space.
    """

    def __init__(self, place: object, again: str = "run again") -> None:
        super().__init__(f"no space left on the disk of {place}; free some and {again}")
        self.place = place


def first_line(error: BaseException) -> str:
    """An error's message as one line: our own as it is, another library's with at most 200 characters."""
    if isinstance(error, LensError):
        return str(error)
    if "trust_remote_code" in str(error):
        return "it brings its own code, which is not run here; name a model of an architecture that transformers has"
    lines = str(error).strip().splitlines()
    n_lines = 2 if lines and lines[0].endswith(":") else 1
    return " ".join(line.strip() for line in lines[:n_lines])[:200] or type(error).__name__
