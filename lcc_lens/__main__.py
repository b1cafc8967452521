"""``python -m lcc_lens`` and the ``lcc-lens`` command."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    from lcc_lens.frontends.cli.main import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
