"""Run directories and single files that a command writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from lcc_lens.core.errors import DiskFullError, RequestError
from lcc_lens.core.files import disk_errors, file_to_write, remove_leftovers
from lcc_lens.core.machine.processes import is_first_process
from lcc_lens.core.outputs.folders import folder_to_write
from lcc_lens.core.outputs.locks import LOCK, locked_alone, try_writing

#: Files of a run that others may have too, and what those of this program hold near their beginning.
_SIGNS = {
    "scan.json": b'"dense_sha256"', "config.json": b'"dense_sha256"', "beginning.json": b'"dense_sha256"',
    "metrics.json": b'"dense_sha256"', "budget.json": b'"dense_sha256"', "log.jsonl": b'{"step": ',
    "checkpoint.safetensors": b'"sealed_sha256"', "loss_map.html": b"PlotlyConfig",
}  # fmt: skip
_BEGINNING = 1 << 16
#: How a run goes on whose command otherwise begins anew.
RESUMED = "go on with --resume"


@contextmanager
def writing_run(run: Path | None, *, inputs: Iterable[Path] = (), again: str = "run again") -> Iterator[None]:
    """Hold a run directory, in which files are added and replaced one by one.

    Of several processes that work together the first one holds it.

    Args:
        run: the directory; nothing is held without one.
        inputs: what the job reads.
        again: how to go on after a full disk.

    Raises:
        RequestError: the directory holds a model or another program's files of the same names, cannot be written, or
            another command writes it.
        DiskFullError: says how to go on.
    """
    if run is None or not is_first_process():
        yield
        return
    target = folder_to_write(run)
    refuse_model(target, is_model=target in {path.resolve() for path in inputs})
    with disk_errors(run):
        _refuse_foreign(target)
    try:
        with locked_alone(target / f".{LOCK}", target):
            remove_leftovers(target)
            yield
    except DiskFullError as error:
        raise DiskFullError(error.place, again) from error


def refuse_model(run: Path, *, is_model: bool = False) -> None:
    """Refuse a model's folder in the place of a run directory.

    Args:
        is_model: whether it is known to be one; else its weights tell.
    """
    if is_model or any(run.glob("model*.safetensors")):
        raise RequestError(f"expected a run directory, got the model in {run}; name another folder")


def _refuse_foreign(run: Path) -> None:
    """Refuse a folder whose files would be replaced although none of them is this program's."""
    here = [name for name in _SIGNS if (run / name).is_file()]
    if here and not any(_SIGNS[name] in _beginning(run / name) for name in here):
        raise RequestError(
            f"expected a run directory or a new folder, got {run} with a {here[0]} that lcc-lens did not write; name "
            "another folder"
        )


def _beginning(file: Path) -> bytes:
    with file.open("rb") as handle:
        return handle.read(_BEGINNING)


def tidy_run(run: Path) -> None:
    """Remove what a killed command left half written in a run directory, unless another command holds it now."""
    lock = run.resolve() / f".{LOCK}"
    with suppress(RequestError, OSError), locked_alone(lock, run) if lock.exists() else nullcontext():
        remove_leftovers(run)


def require_file(path: Path | None, *, begins: tuple[bytes, ...] = (b"",), inputs: Iterable[Path] = ()) -> None:
    """Refuse, before the work, a file that cannot be written; one that exists may be an earlier output alone.

    Args:
        path: the file; nothing is checked without one.
        begins: how files of this kind begin.
        inputs: what the job reads.

    Raises:
        RequestError: a folder, a device, an input, another kind of file, or a place where one may not write.
    """
    if path is None:
        return
    with disk_errors(path):
        target = file_to_write(path)
        if target.exists() and target.stat().st_size:
            with target.open("rb") as file:
                is_ours = file.read(max(map(len, begins))).startswith(begins)
            if not is_ours or target in {entry.resolve() for entry in inputs}:
                raise RequestError(
                    f"expected a new file or an earlier output of this command, got {path}; name another file"
                )
        try_writing(target.parent)
