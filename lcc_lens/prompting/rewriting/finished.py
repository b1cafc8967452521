"""Results of examples, kept one by one in a run, so that a stopped measurement goes on after the last of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lcc_lens.core.errors import InterruptedRun
from lcc_lens.core.files import disk_errors, write_text
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.machine.interruption import Interruption
from lcc_lens.core.outputs.places import RESUMED, writing_run
from lcc_lens.core.progress import track
from lcc_lens.core.reading import Kind, convert

logger = logging.getLogger(__name__)
T = TypeVar("T")
_Item = TypeVar("_Item")


def computed(
    items: Sequence[_Item],
    compute: Callable[[int, _Item], T],
    step: str,
    kind: Kind[T],
    *,
    file: Path | None,
    request: str,
) -> list[T]:
    """A result for every item, in order; those in the file are read, the others are computed and added to it.

    Every line of the file is sealed with the request, so a changed one, or one of another request, is not read.

    Args:
        compute: gives the result of an item from its number and the item.
        step: what is done, for the progress bar.
        kind: the type of a result (see :func:`~lcc_lens.core.reading.convert`).
        file: where results are kept, in a run directory; nothing is kept without one.
        request: the fingerprint of all that decides the results.

    Raises:
        InterruptedRun: Ctrl-C; the results so far are kept.
    """
    saved = "nothing saved: no run directory" if file is None else f"state saved in {file.parent}; go on with --resume"
    with writing_run(None if file is None else file.parent, again=RESUMED), Interruption().watched() as interruption:
        results = [] if file is None else [convert(value, kind, str(file)) for value in _kept(file, request)]
        if file is not None:
            write_text(file, "".join(_line(request, number, value) for number, value in enumerate(results)))
        rest = list(enumerate(items))[len(results) :]
        for number, item in track(rest, len(rest), step):
            results.append(compute(number, item))
            if file is not None:
                with disk_errors(file), file.open("a", encoding="utf-8") as log:
                    log.write(_line(request, number, results[-1]))
            if interruption.requested:
                raise InterruptedRun(f"stopped after {len(results)} of {len(items)} examples ({step}); {saved}")
    return results


def _line(request: str, number: int, result: object) -> str:
    value = json.loads(json.dumps(result, default=vars))
    return json.dumps({"sealed_sha256": fingerprint(request, number, value), "value": value}) + "\n"


def _kept(file: Path, request: str) -> list[Any]:
    """The values of a file's lines up to the first that is torn, changed or of another request."""
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    values: list[Any] = []
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            if entry["sealed_sha256"] != fingerprint(request, number, entry["value"]):
                break
        except (ValueError, LookupError, TypeError, RecursionError):
            break
        values.append(entry["value"])
    if any(lines[len(values) :]):
        logger.warning(
            "going on after the first %d results of %s: the next is changed, or another's", len(values), file
        )
    return values
