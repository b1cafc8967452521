"""Comparisons: methods, baselines and controls on one pruned model, by the same rule, over several seeds."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lcc_lens.baselines import adapters, lofit_heads
from lcc_lens.config import package_version
from lcc_lens.data import Data, TokenSequence, check_disjoint, encode, load_data
from lcc_lens.entries import ADAPTERS, REFIT, Entry
from lcc_lens.errors import InterruptedRun, LensError, RequestError
from lcc_lens.files import read_json, write_json
from lcc_lens.hooks import HookedModel
from lcc_lens.injections import Ingredients, Injection, build_injection, uses_heads
from lcc_lens.measures import Measures
from lcc_lens.memory import peak_memory, release_memory
from lcc_lens.merging import merging_costs
from lcc_lens.metrics import bootstrap_interval, share_recovered
from lcc_lens.models import device_of, identify, resolve
from lcc_lens.pair import Pair, load_pair
from lcc_lens.pruning.refit import REFIT_RECORD
from lcc_lens.recipe import REFIT_DATA, REFIT_SAMPLES, check_scan, refit
from lcc_lens.scan import Scan, scan
from lcc_lens.selectors import SelectorName
from lcc_lens.training import TrainConfig, learning_rates, train

logger = logging.getLogger(__name__)
COMPARISON = "comparison.json"
MEASURES = ("perplexity", "log_perplexity", "kl", "response_loss")
COSTS = ("n_trained", "n_added", "zeros_kept", "training_seconds", "memory_mib")


@dataclass(frozen=True)
class CompareConfig:
    """What every cell shares.

    ``examples`` train; ``validation`` held-out responses choose the best numbers, ``responses`` others are measured;
    ``texts`` are of another kind than the training data, in ``blocks`` of ``block_length`` tokens each, the first being
    the main figure; ``tasks`` are measured zero-shot on their first ``limit`` items. ``refit_data`` calibrates refits.
    """

    data: str = "alpaca"
    examples: int = 480
    validation: int = 24
    responses: int = 96
    texts: tuple[str, ...] = ("wikitext", "c4")
    blocks: int = 16
    block_length: int = 512
    tasks: tuple[str, ...] = ()
    limit: int | None = 200
    max_length: int = 256
    scan_examples: int = 96
    heads: float = 1.0
    selector: SelectorName = "mse"
    batch_size: int = 8
    epochs: int = 1
    low_rank: int = 8
    lora_rank: int = 8
    lofit_share: float = 0.2
    refit_data: tuple[str, ...] = REFIT_DATA
    refit_samples: int = REFIT_SAMPLES

    def __post_init__(self) -> None:
        if not self.texts:
            raise RequestError("wanted at least one text to measure perplexity on, got none; name one")


def compare(
    dense: str | Path,
    pruned: str | Path,
    run: str | Path,
    entries: Sequence[str],
    *,
    seeds: int = 3,
    config: CompareConfig | None = None,
    out: str | Path | None = None,
    deadline: float = math.inf,
    on_cell: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train and measure every entry with every seed; finished cells are kept, failed ones are reported and tried anew.

    A cell holds what :class:`~lcc_lens.measures.Measures` measures, the numbers trained, the numbers that the
    checkpoint of the result gains, the share of the pruned weights' zeros that are left once it is merged, and the
    training's seconds and memory. The seed draws the examples, their order and initial values.

    Args:
        dense: reference of the dense model.
        pruned: reference of the pruned model.
        run: a folder for the scan, the refitted model and ``comparison.json``.
        entries: what to compare; see :class:`Entry`.
        seeds: how many.
        config: what all cells share.
        out: the file to keep cells in, ``comparison.json`` in ``run`` if not given.
        deadline: begin no cell after this moment of ``time.monotonic()``.
        on_cell: called with every new cell.

    Raises:
        RequestError: an unknown entry, or a file, scan or refitted model of another comparison.
        InterruptedRun: Ctrl-C; finished cells are kept.
    """
    parsed, config, run = [Entry.parse(text) for text in entries], config or CompareConfig(), Path(run)
    if config.heads >= 1 and any(entry.control == "random-heads" for entry in parsed):
        raise RequestError("wanted a share of heads below 1 for random heads, got all of them; lower it")
    out = Path(out) if out is not None else run / COMPARISON
    bench = _Bench(dense, pruned, run, config)
    found = _begun(out, bench.identity, config)
    bench.check_refit()
    for seed in range(seeds):
        for entry in parsed:
            name = f"{entry.text} | {seed}"
            if "perplexity" in found["cells"].get(name, {}):
                continue
            if time.monotonic() > deadline:
                return found
            try:
                found["cells"][name] = bench.cell(entry, seed, found)
            except InterruptedRun as error:
                raise InterruptedRun(
                    f"stopped in {name}; finished cells are in {out}: the same call goes on"
                ) from error
            except (LensError, ArithmeticError, RuntimeError, MemoryError) as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                found["cells"][name] = {"error": first}
                logger.warning("%s failed: %s; the rest goes on", name, first)
            write_json(out, found)
            if on_cell is not None:
                on_cell(name, found["cells"][name])
    return found


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per entry: mean and standard deviation over its seeds, and the share of lost log-perplexity that came back.

    ``recovered_interval`` is a 95 % interval from drawing the first text's blocks anew, those of all models alike, with
    the losses' mean over seeds; ``tasks`` has by name the accuracy's mean and spread over seeds, the standard error of
    one seed's, and ``gain_interval`` of the difference from the pruned model on the same items. Entries trained on the
    dense model have no share. The deviation of a single seed is None.
    """
    rows: list[dict[str, Any]] = []
    for text in dict.fromkeys(name.rpartition(" | ")[0] for name in found["cells"]):
        cells = [cell for name, cell in found["cells"].items() if name.rpartition(" | ")[0] == text]
        done = [cell for cell in cells if "perplexity" in cell]
        row: dict[str, Any] = {"entry": text, "seeds": len(done), "failed": len(cells) - len(done)}
        columns = {key: [cell[key] for cell in done if cell.get(key) is not None] for key in (*MEASURES, *COSTS)}
        is_restoration = Entry.parse(text).control != "dense"
        shares = [_share(found["bare"], cell) for cell in done] if is_restoration else []
        columns["recovered"] = [share for share in shares if share is not None]
        for name in done[0].get("texts", {}) if done else ():
            columns[f"perplexity_{name}"] = [cell["texts"][name]["perplexity"] for cell in done]
        for key, values in columns.items():
            row[key] = statistics.mean(values) if values else None
            row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        has_blocks = bool(columns["recovered"]) and "texts" in found["bare"]["dense"]
        row["recovered_interval"] = _recovered_interval(found["bare"], done) if has_blocks else None
        row["tasks"] = _task_rows(found["bare"]["pruned"], done) if done else {}
        rows.append(row)
    return rows


def _share(bare: dict[str, Any], cell: dict[str, Any]) -> float | None:
    dense, pruned = (bare[name]["log_perplexity"] for name in ("dense", "pruned"))
    return share_recovered(dense, pruned, cell["log_perplexity"])


def _recovered_interval(bare: dict[str, Any], cells: Sequence[dict[str, Any]]) -> list[float]:
    name = next(iter(bare["dense"]["texts"]))
    dense, pruned = (bare[model]["texts"][name]["losses"] for model in ("dense", "pruned"))
    losses = zip(*(cell["texts"][name]["losses"] for cell in cells), strict=True)
    gained = [p - statistics.mean(r) for p, r in zip(pruned, losses, strict=True)]
    return list(bootstrap_interval(gained, [p - d for p, d in zip(pruned, dense, strict=True)]))


def _task_rows(pruned: dict[str, Any], cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    rows = {}
    for task, before in pruned.get("tasks", {}).items():
        scores = [cell["tasks"][task] for cell in cells]
        accuracies = [score["acc"] for score in scores]
        right = [statistics.mean(map(float, item)) for item in zip(*(score["items"] for score in scores), strict=True)]
        rows[task] = {
            "acc": statistics.mean(accuracies),
            "acc_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "stderr": scores[0]["stderr"],
            "n": scores[0]["n"],
            "gain_interval": list(
                bootstrap_interval([now - float(was) for now, was in zip(right, before["items"], strict=True)])
            ),
        }
    return rows


def _begun(out: Path, identity: dict[str, str], config: CompareConfig) -> dict[str, Any]:
    """What the file holds already, if it is of this comparison."""
    settings = json.loads(json.dumps(asdict(config)))  # as the file holds them
    found: dict[str, Any] = read_json(out) if out.exists() else {"cells": {}}
    for name, value in (("identity", identity), ("settings", settings)):
        if found.setdefault(name, value) != value:
            raise RequestError(
                f"wanted a comparison of the same models and settings in {out}, got another; name another run"
            )
    found.setdefault("bare", {})
    found["version"] = package_version()
    return found


class _Bench:
    """The models, data and measurements that cells share; one pair in memory at a time."""

    def __init__(self, dense: str | Path, pruned: str | Path, run: Path, config: CompareConfig) -> None:
        self.dense, self.pruned, self.run, self.config = dense, pruned, run, config
        self.identity = {
            f"{name}_sha256": identify(model, resolve(model)).sha256
            for name, model in (("dense", dense), ("pruned", pruned))
        }
        self._held: tuple[bool, Pair] | None = None
        self._validation: list[TokenSequence] | None = None
        self._measures: Measures | None = None

    def pair(self, *, on_refit: bool, found: dict[str, Any] | None = None) -> Pair:
        """The pair with the pruned or the refitted model."""
        if self._held is None or self._held[0] != on_refit:
            self._held = None
            release_memory()
            path = self._refitted(found if found is not None else {}) if on_refit else self.pruned
            self._held = (on_refit, load_pair(self.dense, path))
        return self._held[1]

    def check_refit(self) -> None:
        """Refuse a refitted model of another pair in the folder."""
        record = self.run / REFIT / REFIT_RECORD
        if record.exists() and {name: read_json(record).get(name) for name in self.identity} != self.identity:
            raise RequestError(f"wanted a refit of this pair in {record.parent}, got another's; name another run")

    def cell(self, entry: Entry, seed: int, found: dict[str, Any]) -> dict[str, Any]:
        """Train and measure one entry with one seed."""
        if not found["bare"]:
            plain = self.pair(on_refit=False)
            for name, model in (("dense", plain.dense), ("pruned", plain.pruned)):
                found["bare"][name] = self._measure(plain, model, None)
        pair = self.pair(on_refit=entry.on_refit, found=found)
        model = pair.dense if entry.control == "dense" else pair.pruned
        if entry.method is None:
            return self._measure(pair, model, None)
        settings = TrainConfig(
            epochs=self.config.epochs, batch_size=self.config.batch_size, lr=entry.lr, seed=seed,
            objective=entry.objective,
        )  # fmt: skip
        data, validation = self._training(entry, pair, seed), self._validating(pair)
        steps, start = 0, time.perf_counter()
        with peak_memory(device_of(model)) as peak:
            injection = self._injection(entry, pair, model, seed, lambda: (data, validation, settings))
            if injection.n_trained:
                for step in train(model, injection, data, validation, settings, teacher=pair.dense):
                    steps = step.step
        seconds = time.perf_counter() - start
        return {
            **self._measure(pair, model, injection),
            **merging_costs(injection, pair, model),
            "n_trained": injection.n_trained,
            "learning_rates": learning_rates(injection, entry.lr),
            "steps": steps,
            "training_seconds": round(seconds, 1),
            "memory_mib": None if peak.mib is None else round(peak.mib),
        }

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
            raise RequestError(f"wanted models with the same heads for {entry.text}, got a sliced one; leave it out")
        if entry.method in ADAPTERS:
            kind, targets = ADAPTERS[entry.method]
            built = adapters(model, kind=kind, rank=self.config.lora_rank, targets=targets, seed=seed)
            return built.to(device_of(model))
        method, components, heads = entry.method, None, []
        if method == "lofit" or uses_heads(method):
            scanned = self._scan(pair, on_refit=entry.on_refit)
            selector = "random" if entry.control == "random-heads" else self.config.selector
            heads, components = scanned.select(selector, share=self.config.heads, seed=seed), scanned.components
        if method == "lofit":
            data, validation, settings = training()
            every = scanned.select("random", share=1.0, seed=seed)
            heads = lofit_heads(
                model, pair.output_projections, every, data, validation, replace(settings, lr=None),
                share=self.config.lofit_share, teacher=pair.dense,
            )  # fmt: skip
            method = "offset"
        given = Ingredients(
            model, components, heads, pair.output_projections, low_rank=self.config.low_rank, seed=seed
        )  # fmt: skip
        return build_injection(method, given)

    def _scan(self, pair: Pair, *, on_refit: bool) -> Scan:
        run = self.run / ("scan_refit" if on_refit else "scan")
        if (run / "scan.json").exists():
            found = Scan.load(run)
            check_scan(found, pair)
            return found
        data = load_data(self.config.data, self.config.scan_examples, role="probe")
        named = () if self.config.selector in ("mse", "random") else (self.config.selector,)
        return scan(pair, data, sites=("z",), display=0, max_length=self.config.max_length, selectors=named, run=run)

    def _refitted(self, found: dict[str, Any]) -> Path:
        path = self.run / REFIT
        if not path.exists():
            start = time.perf_counter()
            refit(
                self.dense, self.pruned, path, calibration=self.config.refit_data, n_samples=self.config.refit_samples
            )  # fmt: skip
            found["refit_seconds"] = round(time.perf_counter() - start, 1)
        return path

    def _training(self, entry: Entry, pair: Pair, seed: int) -> list[TokenSequence]:
        data = load_data(self.config.data, self.config.examples, role="train", seed=seed)
        check_disjoint(data.groups, self._held_out().groups, "training data", "held-out data")
        if entry.control == "shuffled":
            data = data.with_shuffled_responses(seed)
        return encode(data, pair.tokenizer, max_length=self.config.max_length)

    def _held_out(self) -> Data:
        return load_data(self.config.data, self.config.validation + self.config.responses, role="held-out")

    def _validating(self, pair: Pair) -> list[TokenSequence]:
        """Responses that choose the best numbers."""
        self._prepare(pair)
        assert self._validation is not None
        return self._validation

    def _measure(self, pair: Pair, model: HookedModel, injection: Injection | None) -> dict[str, Any]:
        self._prepare(pair)
        assert self._measures is not None
        return self._measures.of(pair, model, injection)

    def _prepare(self, pair: Pair) -> None:
        """Read the held-out data once."""
        if self._measures is not None:
            return
        config = self.config
        held_out = encode(self._held_out(), pair.tokenizer, max_length=config.max_length)
        texts = {
            Path(text).stem: encode(
                load_data(text, role="held-out"), pair.tokenizer, max_length=config.block_length, limit=config.blocks
            )
            for text in config.texts
        }
        self._validation = held_out[: config.validation]
        self._measures = Measures(texts, held_out[config.validation :], config.tasks, config.limit)
