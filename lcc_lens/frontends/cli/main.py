"""Parse and run one command; ends with an exit code and at most one line of error."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import fields, is_dataclass
from importlib import import_module
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import tyro

from lcc_lens.core.config import bound_kernel_cache, package_version, placed
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.machine.garbage import uncollected
from lcc_lens.core.machine.processes import is_first_process, n_processes
from lcc_lens.core.machine.threads import threads_chosen
from lcc_lens.core.progress import shown
from lcc_lens.core.ranges import check_numbers
from lcc_lens.core.showing import require_table_file
from lcc_lens.core.text import visible
from lcc_lens.frontends.cli.comparing import Compare
from lcc_lens.frontends.cli.demonstrating import Demo
from lcc_lens.frontends.cli.diagnosing import Doctor
from lcc_lens.frontends.cli.exploring import Explore, Figures
from lcc_lens.frontends.cli.exporting import Export
from lcc_lens.frontends.cli.measuring import Eval, Report
from lcc_lens.frontends.cli.options import device_map_of, option
from lcc_lens.frontends.cli.prompting import MeritsOf, Prompts
from lcc_lens.frontends.cli.pruning import Prune, Reconstruct, Refit
from lcc_lens.frontends.cli.recipes import Recipe
from lcc_lens.frontends.cli.restoring import Restore
from lcc_lens.frontends.cli.rewriting import FitRewriter, Rewrite
from lcc_lens.frontends.cli.scanning import ScanPair

COMMANDS: dict[str, Any] = {
    "prune": Prune, "refit": Refit, "reconstruct": Reconstruct, "scan": ScanPair, "restore": Restore,
    "compare": Compare, "recipe": Recipe, "export": Export, "eval": Eval, "report": Report, "figures": Figures,
    "explore": Explore, "merits": MeritsOf, "prompts": Prompts, "rewrite": Rewrite, "rewrite-fit": FitRewriter,
    "doctor": Doctor, "demo": Demo,
}  # fmt: skip

#: Commands that several processes may run together.
_DIVIDED = (ScanPair, Restore)
#: Commands whose finished steps lie on the disk, where a later one goes on.
_RESUMED = (Prune, Refit, Reconstruct, ScanPair, Restore, Compare, Recipe, Prompts, FitRewriter)


def run(arguments: list[str] | None = None) -> int:
    """Parse and run one command; gives the exit code: 0 done, 1 failed, 2 cannot be served, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = _one_word(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a locale without our signs (LC_ALL=C) shows their numbers
            stream.reconfigure(errors="backslashreplace")
    if arguments == ["--version"]:
        print(f"lcc-lens {package_version()}")
        return 0
    said = StringIO()
    try:
        with redirect_stderr(said):
            command = parse(arguments)
    except SystemExit as stop:
        print(visible(said.getvalue()), end="", file=sys.stderr)  # repeats arguments, which may be names of files
        if stop.code == 0:
            _print_example(arguments)
        return stop.code if isinstance(stop.code, int) else 2
    quiet = command.quiet or not is_first_process()
    _set_up_logging(quiet)
    bound_kernel_cache()
    try:
        check_numbers(command, option)
        _refuse_several(command)
        if getattr(command, "table", None) is not None:
            require_table_file(command.table, _inputs(command))
        with placed(device_map_of(command)), threads_chosen(), nullcontext() if quiet else shown():
            _import_torch()
            command.execute()
    except LensError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        kept = "finished steps are kept" if isinstance(command, _RESUMED) else "the same command starts anew"
        return _fail(f"interrupted; {kept}", 130)
    except Exception as error:
        if os.environ.get("LCC_LENS_DEBUG"):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        return _fail(f"{type(error).__name__}: {first} (LCC_LENS_DEBUG=1 shows where)", 1)
    return 0


def _import_torch() -> None:
    """Every command computes with it."""
    with uncollected():
        import_module("torch")


def parse(arguments: Sequence[str]) -> Any:
    """The command that a command line asks for; prints help or what is wrong, and exits, where it asks for none."""
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS, args=_one_word(arguments), prog="lcc-lens",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
        description="See what pruning took, and put it back. --version prints the version.",
    )  # fmt: skip


def _inputs(command: Any) -> list[Path]:
    """The files that a command names beside its table."""
    named = [getattr(command, field.name) for field in fields(command) if field.name != "table"]
    parts = [part for value in named for part in (_inputs(value) if is_dataclass(value) else _texts(value))]
    return [path for path in map(Path, parts) if os.path.isfile(path)]


def _texts(value: Any) -> list[str | Path]:
    """The words of an option."""
    items = value if isinstance(value, list | tuple) else [value]
    return [item for item in items if isinstance(item, str | Path)]


def _one_word(arguments: Sequence[str]) -> list[str]:
    """The arguments with a subcommand of two words as one."""
    return ["rewrite-fit", *arguments[2:]] if list(arguments[:2]) == ["rewrite", "fit"] else list(arguments)


def _print_example(arguments: Sequence[str]) -> None:
    """End the help of a command with an example."""
    name = arguments[0] if arguments else ""
    if name in COMMANDS:
        print(f"Example: lcc-lens {name.replace('-', ' ')} {COMMANDS[name].example}")


def _refuse_several(command: Any) -> None:
    """Refuse commands in which several processes would overwrite each other's files.

    Raises:
        RequestError: says what may be launched.
    """
    if n_processes() > 1 and not isinstance(command, _DIVIDED):
        name = next(name for name, kind in COMMANDS.items() if kind is type(command)).replace("-", " ")
        advice = "start its parts with --part" if isinstance(command, Compare) else "run it without a launcher"
        raise RequestError(f"expected scan or restore in {n_processes()} processes, got {name}; {advice}")


def _fail(message: str, code: int) -> int:
    print(f"lcc-lens: {visible(' '.join(message.split()))}", file=sys.stderr)
    return code


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _set_up_logging(quiet: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("lcc-lens: %(message)s"))
    logging.basicConfig(level=logging.ERROR if quiet else logging.WARNING, handlers=[handler])
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("lcc_lens").setLevel(logging.ERROR if quiet else logging.INFO)
    _silence_transformers()
    warnings.filterwarnings("ignore")  # third-party deprecations are for the tests, not for users


def _silence_transformers() -> None:
    """Errors alone, and no bars; by its variables where it is not imported yet, which many commands never do."""
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    else:
        os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
