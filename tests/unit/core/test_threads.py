"""Threads: fewer where other processes make all of them slower; once, on the CPU, unless the user says how many."""

from __future__ import annotations

import pytest
import torch

from lcc_lens.core.machine import threads
from lcc_lens.core.machine.threads import fastest, settle_threads, threads_chosen

CPU = torch.device("cpu")


@pytest.fixture
def set_to(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch is told, on four threads of which one is the fastest."""
    told: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(threads, "_product_seconds", lambda n: float(n))
    return told


def test_fewer_threads_are_taken_and_told(set_to: list[int], caplog: pytest.LogCaptureFixture) -> None:
    with threads_chosen():
        settle_threads(CPU)
        settle_threads(CPU)
    assert set_to == [1]
    assert "computing with 1 of 4 threads" in caplog.text


def test_a_slow_moment_decides_nothing() -> None:
    times = {2: iter([9.0, 1, 1, 1, 1]), 1: iter([2.0, 2, 2, 2, 2])}
    assert fastest([2, 1], lambda n: next(times[n])) == 2


@pytest.mark.parametrize("where", ["outside", "gpu", "named"])
def test_nothing_is_chosen(where: str, set_to: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "outside":
        settle_threads(CPU)
    elif where == "named":
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with threads_chosen():
        if where != "outside":
            settle_threads(torch.device("cuda") if where == "gpu" else CPU)
    assert set_to == []


def test_the_probe_computes_with_the_threads_it_times() -> None:
    before = torch.get_num_threads()
    try:
        assert threads._product_seconds(2) > 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
