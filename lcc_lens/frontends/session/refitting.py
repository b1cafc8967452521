"""The refit of a session's pruned model, made once, for methods that start from it."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from pathlib import Path

from lcc_lens.data.roles import check_disjoint
from lcc_lens.frontends.session.stopping import stoppable
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair
from lcc_lens.pruning.calibration.texts import calibrated_groups
from lcc_lens.restoration.injections.base import Composite, Injection
from lcc_lens.restoration.injections.weights import FixedWeights
from lcc_lens.restoration.refitted import REFITTED, refit_as_change, refitted_model
from lcc_lens.restoration.settings import RefitRequest
from lcc_lens.restoration.speed import time_refit


class SessionRefit:
    """Refits a pair into a temporary folder and keeps the result in memory, as a change of the pruned model's weights.

    Layers that are finished when it is stopped stay in the folder, so that the next call goes on there.

    Args:
        pair: the hooked models.
        request: what to calibrate on.
        groups: groups of the session's data, which the calibration must not share.
    """

    def __init__(self, pair: Pair, request: RefitRequest, groups: frozenset[str]) -> None:
        self._pair, self.request, self._groups = pair, request, groups
        self._folder: Path | None = None
        self._change: FixedWeights | None = None
        self._seconds: float | None = None

    def before(self, injection: Injection, stop: threading.Event) -> Injection:
        """The injection on top of the refit, which is made if it was not yet; Stopped once the event is set."""
        if self._change is None:
            folder, pruned = self._place() / REFITTED, self._pair.pruned_id.path
            with stoppable(stop):
                refitted_model(self._pair.dense_id.path, pruned, folder, self.request)
            check_disjoint(self._groups, calibrated_groups(folder), "the session's data", "the refit's")
            self._change = refit_as_change(self._pair.pruned, pruned, folder).to(device_of(self._pair.pruned))
            shutil.rmtree(self._place())
        return Composite([self._change, injection])

    def _place(self) -> Path:
        """The temporary folder, which goes with this object at the latest."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="lcc-lens-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    @property
    def seconds(self) -> float | None:
        """What it takes until the refit is there, if that was measured."""
        return self._seconds if self._change is None else 0.0

    def measure(self) -> float:
        """Estimate what the refit takes here, in seconds; 0 once it is there."""
        if self.seconds is None:
            self._seconds = time_refit(self._pair, self.request)
        return self.seconds or 0.0


def is_refitted(injection: Injection | None) -> bool:
    """Whether an injection starts from a refit."""
    return injection is not None and any(isinstance(part, FixedWeights) for part in injection.parts)


def on_blank_refit(pair: Pair, injection: Injection) -> Injection:
    """An injection on top of a refit whose weights are still those of the pruned model, to be loaded."""
    pruned = pair.pruned_id.path
    return Composite([refit_as_change(pair.pruned, pruned, pruned).to(device_of(pair.pruned)), injection])
