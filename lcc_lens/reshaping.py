"""Injections made anew for other heads or another rank that keep what was learned, and constants scaled."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch

from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.constants import LccInjection

AnyInjection = TypeVar("AnyInjection", bound=Injection)


@torch.no_grad()
def keep_learned(before: Injection, after: Injection) -> None:
    """Copy what an injection has learned into one of the same method with other heads or another rank, in place.

    A head that stays keeps its offset, and its magnitudes as far as both have the direction; parts that do not depend
    on heads keep everything.
    """
    for old, new in zip(before.parts, after.parts, strict=True):
        if isinstance(old, LccInjection) and isinstance(new, LccInjection):
            _keep_constants(old, new)
            continue
        kept = old.state_dict()
        if {name: value.shape for name, value in kept.items()} == {n: v.shape for n, v in new.state_dict().items()}:
            new.load_state_dict(kept)


def _keep_constants(old: LccInjection, new: LccInjection) -> None:
    rows = {head: row for row, head in enumerate(old.heads)}
    n_kept = min(old.magnitudes.shape[1], new.magnitudes.shape[1])
    for row, head in enumerate(new.heads):
        if head in rows:
            new.magnitudes[row, :n_kept] = old.magnitudes[rows[head], :n_kept]
            new.offset[row] = old.offset[rows[head]]


@torch.no_grad()
def with_scaled_constants(injection: AnyInjection, factor: float) -> AnyInjection:
    """A copy whose constants are multiplied by a number; other parts are as they were."""
    scaled = copy.deepcopy(injection)
    for part in scaled.parts:
        if isinstance(part, LccInjection):
            part.magnitudes.mul_(factor)
            part.offset.mul_(factor)
    return scaled
