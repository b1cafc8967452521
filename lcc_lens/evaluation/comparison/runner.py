"""The bench of a comparison: models, data and settings that all cells share, and a cell's training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import locked, read_json
from lcc_lens.core.heads import Head
from lcc_lens.core.memory import peak_memory, release_memory
from lcc_lens.data.batches import TokenSequence
from lcc_lens.data.datasets import load_data
from lcc_lens.evaluation.baselines.adapters import adapters
from lcc_lens.evaluation.baselines.eora import eora
from lcc_lens.evaluation.baselines.flap import flap
from lcc_lens.evaluation.baselines.lofit import LOFIT_LR, lofit_heads
from lcc_lens.evaluation.comparison.config import MEASURING, CompareConfig
from lcc_lens.evaluation.comparison.costs import inference_costs, merging_costs, served_as
from lcc_lens.evaluation.comparison.data import ComparisonData
from lcc_lens.evaluation.comparison.entry import ADAPTERS, PERP, REFIT, Entry
from lcc_lens.evaluation.comparison.trained_weights import ChosenHeads, TrainedNumbers
from lcc_lens.evaluation.efficiency.timing import SpeedConfig
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.sites import CONSTANT_SITES, projection_names
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.pruning.jobs import refit
from lcc_lens.pruning.refit.refit import REFIT_RECORD
from lcc_lens.restoration.checks import check_scan
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.methods import (
    build_injection,
    scanned_sites,
    uses_components,
    uses_heads,
    uses_sequences,
)
from lcc_lens.restoration.training.loop import Step, TrainConfig, learning_rates, train
from lcc_lens.restoration.training.lr_range import tuned
from lcc_lens.restoration.training.reuse import CachedTeacher


class _Trained(NamedTuple):
    """What an entry acts on, what it trained and what that took."""

    pair: Pair
    model: HookedModel
    injection: Injection | None
    costs: dict[str, Any]
    is_new: bool
    """Whether it was trained now."""


class Bench:
    """The models, data and measurements that cells share; one pair in memory at a time."""

    def __init__(self, dense: str | Path, pruned: str | Path, run: Path, config: CompareConfig) -> None:
        self.dense, self.pruned, self.run, self.config = dense, pruned, run, config
        self.identity = {
            f"{name}_sha256": Checkpoint(resolve(model)).sha256
            for name, model in (("dense", dense), ("pruned", pruned))
        }
        self._held: tuple[bool, Pair] | None = None
        self._data = ComparisonData(config)
        self._teacher: CachedTeacher | None = None
        self._apart: CachedTeacher | None = None
        training = {name: value for name, value in asdict(config).items() if name not in MEASURING}
        held_out = {"measures_training_task": config.data in config.tasks}  # then others choose the best numbers
        self._kept = TrainedNumbers(run / "trained", {**training, **held_out})

    def pair(self, *, on_refit: bool, found: dict[str, Any] | None = None) -> Pair:
        """The pair with the pruned or the refitted model."""
        if self._held is None or self._held[0] != on_refit:
            self._held = self._teacher = self._apart = None
            release_memory()
            path = self._refitted(found if found is not None else {}) if on_refit else self.pruned
            self._held = (on_refit, load_pair(self.dense, path))
            self._teacher = CachedTeacher(self._held[1].dense)
        return self._held[1]

    def check_refit(self) -> None:
        """Refuse a refitted model of another pair in the folder."""
        record = self.run / REFIT / REFIT_RECORD
        if record.exists() and {name: read_json(record).get(name) for name in self.identity} != self.identity:
            raise RequestError(f"expected a refit of this pair in {record.parent}, got another's; name another run")

    def cell(
        self, entry: Entry, seed: int, found: dict[str, Any], before: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Train and measure one entry with one seed.

        Args:
            entry: the entry.
            seed: the seed.
            found: the comparison, which is told how long a refit takes.
            before: the cell as it was measured before, lacking some tasks: those alone are measured, unless what it
                trained is gone.
        """
        trained = self._trained(entry, seed, found)
        pair, model, injection = trained.pair, trained.model, trained.injection
        if before is not None and not trained.is_new:
            scores = self._data.measures(pair.tokenizer).accuracies(pair, model, injection, self._unmeasured(before))
            return {**before, "tasks": {**before["tasks"], **scores}}
        measured = self._data.measures(pair.tokenizer).of(pair, model, injection, self._teaching(entry))
        return measured if injection is None else {**measured, **merging_costs(injection, pair, model), **trained.costs}

    def lacks_bare(self, found: dict[str, Any]) -> bool:
        """Whether something asked is not measured of both models without an injection."""
        bare = [found["bare"].get(name) for name in ("dense", "pruned")]
        return any(model is None or self._unmeasured(model) for model in bare)

    def measure_bare(self, found: dict[str, Any]) -> None:
        """What cells are held against: both models without an injection, on all that is asked."""
        for name in ("dense", "pruned"):
            bare = found["bare"].get(name)
            if bare is not None and not self._unmeasured(bare):
                continue
            pair = self.pair(on_refit=False)
            model, measures = getattr(pair, name), self._data.measures(pair.tokenizer)
            if bare is None:
                found["bare"][name] = measures.of(pair, model, None, self._teacher)
            else:
                bare["tasks"] |= measures.accuracies(pair, model, None, self._unmeasured(bare))

    def _unmeasured(self, measured: Mapping[str, Any]) -> list[str]:
        """The tasks that are asked and that something measured before lacks."""
        return [task for task in self.config.tasks if task not in measured["tasks"]]

    def _trained(self, entry: Entry, seed: int, found: dict[str, Any]) -> _Trained:
        """Train an entry; kept numbers are not trained again."""
        pair = self.pair(on_refit=entry.on_refit, found=found)
        model = pair.dense if entry.control == "dense" else pair.pruned
        if entry.method is None:
            return _Trained(pair, model, None, {}, is_new=False)
        settings = self._settings(entry, seed)
        data, validation = self._data.training(entry, pair.tokenizer, seed), self._data.validation(pair.tokenizer)
        teacher, steps, first = self._teaching(entry).model, 0, ChosenHeads([], 0.0)
        with peak_memory(device_of(model)) as peak:
            if entry.method == "lofit":
                first = self._lofit_heads(entry, pair, model, seed, (data, validation, settings))
            start = time.perf_counter() - first.seconds
            injection = self._injection(entry, pair, model, seed, lambda: (data, validation, settings))
            rates, trains = learning_rates(injection, settings.lr), bool(injection.n_trained)
            request = [entry.text, seed, pair.dense_id.sha256, pair.pruned_id.sha256, rates, *map(str, first.heads)]
            costs = self._kept.load(injection, entry.text, seed, request) if trains else None
            if costs is not None:
                return _Trained(pair, model, injection, costs, is_new=False)
            tuning: dict[str, Any] = {}
            if trains and entry.tunes_lr:
                settings, tuning = tuned(settings, model, injection, data, validation, teacher=teacher)
            if trains:
                for step in train(model, injection, data, validation, settings, teacher=teacher):
                    steps = step.step
        costs = {
            "n_trained": injection.n_trained,
            "learning_rates": learning_rates(injection, settings.lr),
            "steps": steps,
            "training_seconds": round(time.perf_counter() - start - tuning.get("tuning_seconds", 0.0), 1),
            "memory_mib": None if peak.mib is None else round(peak.mib),
            **tuning,
        }
        if entry.method == "mean-shift":
            scanned = self._scan(pair, entry.method, on_refit=entry.on_refit)
            costs["mendable_share"] = scanned.mendable_share(heads=self._chosen(entry, scanned, seed))
        if trains:
            self._kept.keep(injection, entry.text, seed, request, costs)
        return _Trained(pair, model, injection, costs, is_new=trains)

    def steps(self, entry: Entry, seed: int) -> Iterator[Step]:
        """The steps of an entry's training as they come, nothing of which is kept: for timing."""
        pair, settings = self.pair(on_refit=entry.on_refit), self._settings(entry, seed)
        data, validation = self._data.training(entry, pair.tokenizer, seed), self._data.validation(pair.tokenizer)
        injection = self._injection(entry, pair, pair.pruned, seed, lambda: (data, validation, settings))
        yield from train(pair.pruned, injection, data, validation, settings, teacher=pair.dense)

    def _teaching(self, entry: Entry) -> CachedTeacher:
        """The dense model that an entry is held to: where it acts on the dense model itself, a copy that stays whole.

        Weights are changed in place, so that the pair's own would follow what is trained.
        """
        assert self._teacher is not None
        if entry.control != "dense":
            return self._teacher
        if self._apart is None:
            self._apart = CachedTeacher(load_hooked(self.dense).model)
        return self._apart

    def _settings(self, entry: Entry, seed: int) -> TrainConfig:
        config, lr = self.config, LOFIT_LR if entry.lr is None and entry.method == "lofit" else entry.lr
        return TrainConfig(
            epochs=config.epochs, batch_size=config.batch_size, lr=lr, seed=seed, objective=entry.objective
        )

    def time(self, entries: Sequence[Entry], found: dict[str, Any]) -> None:
        """Time what is served, unless that was done."""
        kinds = {served_as(entry) for entry in entries if entry.control is None}
        if kinds <= set(found.get("inference", {})):
            return
        pair = self.pair(on_refit=False)
        path, maps = pair.pruned_id.path, {}
        for site in CONSTANT_SITES:
            with suppress(RequestError):  # what an architecture has no maps for is not timed
                maps[site] = projection_names(pair.pruned, site)
        del pair
        self._held = self._teacher = self._apart = None
        release_memory()
        speed = SpeedConfig(repeats=self.config.speed_rounds)
        found["inference"] = inference_costs(path, maps, kinds, rank=self.config.lora_rank, config=speed)

    def _injection(
        self,
        entry: Entry,
        pair: Pair,
        model: HookedModel,
        seed: int,
        training: Callable[[], tuple[list[TokenSequence], list[TokenSequence], TrainConfig]],
    ) -> Injection:
        assert entry.method is not None
        if entry.control == "dense" and pair.n_heads != int(pair.dense.cfg.n_heads):
            raise RequestError(f"expected models with the same heads for {entry.text}, got a sliced one; leave it out")
        if entry.method in ADAPTERS:
            kind, targets = ADAPTERS[entry.method]
            built = adapters(model, kind=kind, rank=self.config.lora_rank, targets=targets, seed=seed)
            return built.to(device_of(model))
        if entry.method == "eora":
            return eora(model, pair.dense, training()[0], rank=self.config.lora_rank)
        if entry.method == "flap":
            return flap(pair, training()[0], model=model)
        method = entry.parts
        assert method is not None
        scanned, heads = None, []
        if uses_heads(method) or uses_components(method):
            scanned = self._scan(pair, method, on_refit=entry.on_refit)
            heads = self._chosen(entry, scanned, seed)
        if entry.method == "lofit":
            heads = self._lofit_heads(entry, pair, model, seed, training()).heads
        given = Ingredients(
            model, None if scanned is None else scanned.components, heads, pair.output_projections,
            low_rank=self.config.lora_rank if entry.method in PERP else self.config.low_rank, seed=seed,
            mlp=None if scanned is None else scanned.others.get("mlp"), pair=pair,
            sequences=training()[0] if uses_sequences(method) else (),
        )  # fmt: skip
        return build_injection(method, given)

    def _lofit_heads(
        self,
        entry: Entry,
        pair: Pair,
        model: HookedModel,
        seed: int,
        training: tuple[list[TokenSequence], list[TokenSequence], TrainConfig],
    ) -> ChosenHeads:
        """What LoFiT's first stage chooses, at the gains' own rate; kept, so that other rates behind it share it."""
        (data, validation, settings), text = training, entry.text.partition("=")[0]

        def choose() -> list[Head]:
            every = self._scan(pair, "offset", on_refit=entry.on_refit).select("random", share=1.0, seed=seed)
            return lofit_heads(
                model, pair.output_projections, every, data, validation, replace(settings, lr=None),
                share=self.config.lofit_share, teacher=self._teaching(entry).model,
            )  # fmt: skip

        request = [text, seed, pair.dense_id.sha256, pair.pruned_id.sha256]
        return self._kept.heads(text, seed, request, choose)

    def _chosen(self, entry: Entry, scanned: Scan, seed: int) -> list[Head]:
        selector = "random" if entry.control == "random-heads" else self.config.selector
        return scanned.select(selector, share=1.0 if entry.method in PERP else self.config.heads, seed=seed)

    def _scan(self, pair: Pair, method: str, *, on_refit: bool) -> Scan:
        """The scan of the pair, made anew where the one in the folder compares less than the method needs."""
        run = self.run / ("scan_refit" if on_refit else "scan")
        with locked(self.run, run.name):
            return self._scan_in(run, pair, method)

    def _scan_in(self, run: Path, pair: Pair, method: str) -> Scan:
        sites, spectra = scanned_sites(method)
        if (run / "scan.json").exists():
            found = Scan.load(run)
            check_scan(found, pair)
            if "mlp" not in sites or "mlp" not in pair.sites or found.has_mlp(directions="mlp" in spectra):
                return found
        data = load_data(self.config.data, self.config.scan_examples, role="probe")
        named = () if self.config.selector in ("mse", "random") else (self.config.selector,)
        return scan(
            pair, data, sites=sites, spectra=spectra, display=0, max_length=self.config.max_length, selectors=named,
            run=run,
        )  # fmt: skip

    def _refitted(self, found: dict[str, Any]) -> Path:
        path = self.run / REFIT
        with locked(self.run, "refit"):
            if not path.exists():
                data, n, start = self.config.refit_data, self.config.refit_samples, time.perf_counter()
                refit(self.dense, self.pruned, path, calibration=data, n_samples=n)
                found["refit_seconds"] = round(time.perf_counter() - start, 1)
        return path
