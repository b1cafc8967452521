"""The models of a comparison: one pair in memory at a time, with its refit, its scans and its teacher."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.files import locked
from lcc_lens.core.machine.memory import release_memory
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.comparison.data import ComparisonData
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.pair import Pair, check_models, load_pair
from lcc_lens.pruning.refit.checks import require_refittable
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.refitted import REFITTED, check_refitted, pair_hashes, refitted_model
from lcc_lens.restoration.scans import scan_for
from lcc_lens.restoration.settings import RefitRequest
from lcc_lens.restoration.training.reuse import CachedTeacher


class ComparedModels:
    """The dense model with the pruned or the refitted one.

    Args:
        dense: reference of the dense model.
        pruned: reference of the pruned model.
        folder: the comparison's folder, for the refitted model and the scans.
        config: what all runs share.
    """

    def __init__(self, dense: str | Path, pruned: str | Path, folder: Path, config: CompareConfig) -> None:
        self.dense, self.pruned, self.folder, self._config = dense, pruned, folder, config
        check_models(dense, pruned)
        self.hashes = pair_hashes(dense, pruned)
        self._loaded: tuple[bool, Pair] | None = None
        self._teacher: CachedTeacher | None = None
        self._separate_teacher: CachedTeacher | None = None

    def check_refit(self, is_needed: bool) -> None:
        """Refuse a refitted model of another pair in the folder, and a pair that cannot be refitted if it is needed."""
        check_refitted(self.folder / REFITTED, self.hashes)
        if is_needed:
            require_refittable(resolve(self.dense), resolve(self.pruned))

    def pair(self, *, on_refit: bool, results: dict[str, Any] | None = None) -> Pair:
        """The pair with the pruned or the refitted model; a refit's seconds are noted in the results."""
        if self._loaded is None or self._loaded[0] != on_refit:
            self.release()
            path = self._refitted({} if results is None else results) if on_refit else self.pruned
            self._loaded = (on_refit, load_pair(self.dense, path))
            self._teacher = CachedTeacher(self._loaded[1].dense)
        return self._loaded[1]

    def release(self) -> None:
        """Free the models' memory."""
        self._loaded = self._teacher = self._separate_teacher = None
        release_memory()

    def teacher(self, *, trains_dense: bool = False) -> CachedTeacher:
        """The dense model as teacher; a separate copy if the pair's dense model itself is trained."""
        assert self._teacher is not None
        if not trains_dense:
            return self._teacher
        if self._separate_teacher is None:
            self._separate_teacher = CachedTeacher(load_hooked(self.dense).model)
        return self._separate_teacher

    def scan(self, spec: MethodSpec, pair: Pair, *, on_refit: bool) -> Scan:
        """The scan of a pair for a method: the one in the folder, or a new one if it lacks something."""
        config, folder = self._config, self.folder / ("scan_refit" if on_refit else "scan")
        data = ComparisonData(config, self.dense, self.folder)
        with locked(self.folder, folder.name):
            return scan_for(
                spec, pair, folder, data.probe, selector=config.needed_selector, max_length=config.max_length,
                limit=config.scan_examples, only_needed=True,
            )  # fmt: skip

    def _refitted(self, results: dict[str, Any]) -> Path:
        folder = self.folder / REFITTED
        with locked(self.folder, REFITTED):
            is_new, start = not folder.exists(), time.perf_counter()
            request = RefitRequest(self._config.refit_data, self._config.refit_samples)
            refitted_model(self.dense, self.pruned, folder, request)
            if is_new:
                results["refit_seconds"] = round(time.perf_counter() - start, 1)
        return folder
