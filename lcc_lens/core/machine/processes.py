"""Several processes that work together, as started by ``accelerate launch``; a single process has no overhead."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lcc_lens.core.errors import LensError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
_in_step: ContextVar[bool] = ContextVar("all processes compute the same", default=False)
#: How long processes wait for each other; the first one may scan or refit meanwhile.
_TIMEOUT = timedelta(hours=12)
_RESUME = "go on from the last checkpoint with --resume"
#: Variables that a launcher sets for each process; a cluster may set some of them for other reasons.
_LAUNCHER_VARIABLES = {"WORLD_SIZE", "RANK", "LOCAL_RANK"}


def n_processes() -> int:
    """How many processes were launched together."""
    return int(os.environ["WORLD_SIZE"]) if os.environ.keys() >= _LAUNCHER_VARIABLES else 1


def process_index() -> int:
    """This process's number, from 0; process 0 writes files and shows progress."""
    return int(os.environ["RANK"]) if n_processes() > 1 else 0


def is_first_process() -> bool:
    """Whether this process writes files and shows progress."""
    return process_index() == 0


@contextmanager
def in_step() -> Iterator[None]:
    """Within the block all processes compute the same, on all items: a model whose layers they share needs it."""
    token = _in_step.set(True)
    try:
        yield
    finally:
        _in_step.reset(token)


def own_part(items: Sequence[T]) -> Sequence[T]:
    """The items that this process works on."""
    return items[process_index() :: n_processes()] if _divides_work() else items


def _divides_work() -> bool:
    return n_processes() > 1 and not _in_step.get()


def process_device() -> torch.device:
    """The device that accelerate gives this process."""
    device: torch.device = _state().device
    return device


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over all processes, identical in each; with one process, or :func:`in_step`, the tensors themselves.

    Raises:
        LensError: another process has ended.
    """
    if not _divides_work():
        return list(tensors)
    import torch
    from accelerate.utils import reduce

    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    with _others_alive():
        total = reduce(flat.to(_state().device), "sum").to(flat.device)
    parts = total.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process run the block before the others, which then find its files."""
    if not is_first_process():
        wait_for_all()
    yield
    if is_first_process():
        wait_for_all()


def wait_for_all(advice: str = _RESUME) -> None:
    """Wait until every process has called this.

    Args:
        advice: what the error tells the user to do if another process has ended.

    Raises:
        LensError: another process has ended.
    """
    if n_processes() > 1:
        with _others_alive(advice):
            _state().wait_for_everyone()


@contextmanager
def _others_alive(advice: str = _RESUME) -> Iterator[None]:
    """Report in one line that another process has ended; for collective operations only."""
    try:
        yield
    except RuntimeError as error:
        first = (str(error).splitlines() or [""])[0][:120]
        raise LensError(f"another process of this run has ended ({first}); {advice}") from error


def _state() -> Any:
    """Accelerate's state, made once; for CPU computations, with a CPU backend even if there are GPUs."""
    import torch
    from accelerate import PartialState

    named = os.environ.get("LCC_LENS_DEVICE", "")
    return PartialState(cpu=named.startswith("cpu") or not torch.cuda.is_available(), timeout=_TIMEOUT)
