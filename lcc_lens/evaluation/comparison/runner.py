"""Runs of a comparison: train one entry with one seed and measure it, on models and data that all runs share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import locked
from lcc_lens.core.heads import Head
from lcc_lens.core.machine.memory import peak_memory
from lcc_lens.data.batches import TokenSequence, sequences_sha256
from lcc_lens.data.registry import is_self_written
from lcc_lens.evaluation.comparison.config import MEASURING, CompareConfig
from lcc_lens.evaluation.comparison.costs import inference_costs, merging_costs, served_as
from lcc_lens.evaluation.comparison.data import ComparisonData
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.evaluation.comparison.models import ComparedModels
from lcc_lens.evaluation.comparison.trained_weights import ChosenHeads, TrainedWeights
from lcc_lens.evaluation.efficiency.timing import SpeedConfig
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.sites import CONSTANT_SITES, projection_names
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.methods import HeadSearch
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.training.config import Step, TrainConfig
from lcc_lens.restoration.training.loop import train
from lcc_lens.restoration.training.lr_range import tuned
from lcc_lens.restoration.training.state import learning_rates


class _Job(NamedTuple):
    """What one run trains: a method in a model, on data."""

    entry: Entry
    spec: MethodSpec
    seed: int
    pair: Pair
    model: HookedModel
    data: list[TokenSequence]
    validation: list[TokenSequence]
    config: TrainConfig
    scan: Scan | None


class _Trained(NamedTuple):
    """The injection of a run, its models, the costs of its training, and whether it was trained in this call."""

    pair: Pair
    model: HookedModel
    injection: Injection | None
    costs: dict[str, Any]
    is_new: bool


class Runner:
    """Trains and measures the entries of a comparison.

    Args:
        dense: reference of the dense model.
        pruned: reference of the pruned model.
        folder: for the scans, the refitted model and the trained weights.
        config: what all runs share.
    """

    def __init__(self, dense: str | Path, pruned: str | Path, folder: Path, config: CompareConfig) -> None:
        self.folder, self.config = folder, config
        self.models = ComparedModels(dense, pruned, folder, config)
        self._data = ComparisonData(config, dense, folder)
        training = {name: value for name, value in asdict(config).items() if name not in MEASURING}
        # where the training task is measured, other examples choose the best parameters
        validation = {"measures_training_task": config.data in config.tasks}
        self._kept = TrainedWeights(folder / "trained", {**training, **validation})

    def require_data(self) -> None:
        """Read what all runs are measured on; refuses too little of it before one is trained."""
        is_written = is_self_written(self.config.data)
        with locked(self.folder, "held-out") if is_written else nullcontext():  # another process may be writing it
            self._data.measures(load_tokenizer(resolve(self.models.pruned)))

    def run(
        self, entry: Entry, seed: int, results: dict[str, Any], before: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Train and measure one entry with one seed.

        Args:
            results: the comparison, in which a refit's seconds are noted.
            before: an earlier result of the run that lacks some tasks: only those are measured, unless its trained
                weights are gone.
        """
        pair, model, injection, costs, is_new = self._trained(entry, seed, results)
        measures = self._data.measures(pair.tokenizer)
        if before is not None and not is_new:
            scores = measures.accuracies(pair, model, injection, self._unmeasured(before))
            return {**before, "tasks": {**before["tasks"], **scores}}
        measured = measures.of(pair, model, injection, self._teacher(entry))
        return measured if injection is None else {**measured, **merging_costs(injection, pair, model), **costs}

    def lacks_baselines(self, results: dict[str, Any]) -> bool:
        """Whether a requested measure of the unrestored models is missing."""
        baselines = [results["bare"].get(name) for name in ("dense", "pruned")]
        return any(baseline is None or self._unmeasured(baseline) for baseline in baselines)

    def measure_baselines(self, results: dict[str, Any]) -> None:
        """Measure both models without an injection, as far as measures are missing."""
        for name in ("dense", "pruned"):
            baseline = results["bare"].get(name)
            if baseline is not None and not self._unmeasured(baseline):
                continue
            pair = self.models.pair(on_refit=False)
            model, measures = getattr(pair, name), self._data.measures(pair.tokenizer)
            if baseline is None:
                results["bare"][name] = measures.of(pair, model, None, self.models.teacher())
            else:
                baseline["tasks"] |= measures.accuracies(pair, model, None, self._unmeasured(baseline))

    def time(self, entries: Sequence[Entry], results: dict[str, Any]) -> None:
        """Time inference of every kind of result, unless that was done."""
        kinds = {served_as(entry) for entry in entries if entry.control is None}
        if kinds <= set(results.get("inference", {})):
            return
        pair = self.models.pair(on_refit=False)
        path, layers = pair.pruned_id.path, {}
        for site in CONSTANT_SITES:
            with suppress(RequestError):  # an architecture without such layers is not timed with biases there
                layers[site] = projection_names(pair.pruned, site)
        del pair
        self.models.release()
        speed = SpeedConfig(repeats=self.config.speed_rounds)
        results["inference"] = inference_costs(path, layers, kinds, rank=self.config.lora_rank, config=speed)

    def steps(self, entry: Entry, seed: int) -> Iterator[Step]:
        """The steps of an entry's training, for timing; nothing is written."""
        job = self._job(entry, seed, {})
        injection = self._injection(job, self._heads(job).heads)
        yield from train(job.model, injection, job.data, job.validation, job.config, teacher=job.pair.dense)

    def _unmeasured(self, measured: Mapping[str, Any]) -> list[str]:
        """The requested tasks that an earlier result lacks."""
        return [task for task in self.config.tasks if task not in measured["tasks"]]

    def _teacher(self, entry: Entry) -> Any:
        return self.models.teacher(trains_dense=entry.control == "dense")

    def _trained(self, entry: Entry, seed: int, results: dict[str, Any]) -> _Trained:
        """Train an entry, or load what an earlier run of it trained."""
        pair = self.models.pair(on_refit=entry.on_refit, results=results)
        if entry.spec is None:
            return _Trained(pair, pair.pruned, None, {}, is_new=False)
        job = self._job(entry, seed, results)
        with peak_memory(device_of(job.model)) as peak:
            chosen = self._heads(job)
            start = time.perf_counter() - chosen.seconds
            injection = self._injection(job, chosen.heads)
            rates = learning_rates(injection, job.config.lr)
            models, data = [pair.dense_id.sha256, pair.pruned_id.sha256], sequences_sha256([*job.data, *job.validation])
            request = [entry.text, seed, *models, data, rates, *map(str, chosen.heads)]
            costs = self._kept.load(injection, entry.text, seed, request) if injection.n_trained else None
            if costs is not None:
                return _Trained(pair, job.model, injection, costs, is_new=False)
            config, n_steps, tuning = self._fit(job, injection)
        costs = {
            "n_trained": injection.n_trained,
            "learning_rates": learning_rates(injection, config.lr),
            "steps": n_steps,
            "training_seconds": round(time.perf_counter() - start - tuning.get("tuning_seconds", 0.0), 1),
            "memory_mib": None if peak.mib is None else round(peak.mib),
            **tuning,
        }
        if job.scan is not None and job.spec.n_trained is None and job.spec.on_heads:  # the scan's own constants
            costs["mendable_share"] = job.scan.mendable_share(heads=chosen.heads)
        if injection.n_trained:
            self._kept.keep(injection, entry.text, seed, request, costs)
        return _Trained(pair, job.model, injection, costs, is_new=bool(injection.n_trained))

    def _job(self, entry: Entry, seed: int, results: dict[str, Any]) -> _Job:
        """Collect the models, data and settings of an entry's training."""
        assert entry.spec is not None
        pair = self.models.pair(on_refit=entry.on_refit, results=results)
        if entry.control == "dense" and pair.n_heads != int(pair.dense.cfg.n_heads):
            raise RequestError(f"expected models with the same heads for {entry.text}, got a sliced one; leave it out")
        config = TrainConfig(
            epochs=self.config.epochs, batch_size=entry.spec.preset.batch_size or self.config.batch_size, lr=entry.lr,
            seed=seed, objective=entry.objective,
        )  # fmt: skip
        data, validation = self._data.training(entry, pair.tokenizer, seed), self._data.validation(pair.tokenizer)
        scan = self.models.scan(entry.spec, pair, on_refit=entry.on_refit) if entry.spec.needs_scan else None
        model = pair.dense if entry.control == "dense" else pair.pruned
        return _Job(entry, entry.spec, seed, pair, model, data, validation, config, scan)

    def _heads(self, job: _Job) -> ChosenHeads:
        """The heads of a run. If training chooses them, the choice is stored, and entries at other rates reuse it."""
        if job.scan is None:
            return ChosenHeads([], 0.0)
        selector = "random" if job.entry.control == "random-heads" else self.config.needed_selector
        fraction, search = self.config.heads if job.spec.selects_heads else 1.0, job.spec.preset.choose_heads
        heads = job.scan.select(selector, share=fraction, seed=job.seed) if job.spec.on_heads else []
        if search is None:
            return ChosenHeads(heads, 0.0)

        def choose() -> list[Head]:
            own_rate, teacher = replace(job.config, lr=None), self._teacher(job.entry).model
            return search(
                HeadSearch(
                    job.model, job.pair.output_projections, heads, job.data, job.validation, own_rate, teacher,
                    self.config.lofit_share,
                )
            )  # fmt: skip

        text = job.entry.text.partition("=")[0]
        request = [text, job.seed, job.pair.dense_id.sha256, job.pair.pruned_id.sha256]
        return self._kept.heads(text, job.seed, request, choose)

    def _injection(self, job: _Job, heads: Sequence[Head]) -> Injection:
        return job.spec.build(
            Ingredients.of(
                job.pair, job.scan, heads, model=job.model, sequences=job.data, low_rank=self.config.low_rank,
                adapter_rank=self.config.lora_rank, seed=job.seed,
            )
        )  # fmt: skip

    def _fit(self, job: _Job, injection: Injection) -> tuple[TrainConfig, int, dict[str, Any]]:
        """Train an injection; returns the settings, the number of steps, and the record of a learning-rate search."""
        config, n_steps, tuning, teacher = job.config, 0, dict[str, Any](), self._teacher(job.entry).model
        if injection.n_trained:
            if job.entry.tunes_lr:
                config, tuning = tuned(config, job.model, injection, job.data, job.validation, teacher=teacher)
            for step in train(job.model, injection, job.data, job.validation, config, teacher=teacher):
                n_steps = step.step
        return config, n_steps, tuning
