"""Comparisons: methods, baselines and controls on one pruned model, by the same rule, over several seeds."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

from lcc_lens.baselines.adapters import AdapterKind, adapters
from lcc_lens.config import package_version
from lcc_lens.data import Data, TokenSequence, check_disjoint, encode, load_data
from lcc_lens.errors import InterruptedRun, LensError, RequestError
from lcc_lens.files import read_json, write_json
from lcc_lens.hooks import HookedModel
from lcc_lens.injections import (
    Ingredients,
    Injection,
    build_injection,
    parse_method,
    uses_heads,
)
from lcc_lens.memory import release_memory
from lcc_lens.metrics import share_recovered
from lcc_lens.models import device_of, identify, resolve
from lcc_lens.objectives import Objective
from lcc_lens.pair import Pair, load_pair
from lcc_lens.pruning.refit import REFIT_RECORD
from lcc_lens.recipe import check_scan, refit
from lcc_lens.scan import Scan, scan
from lcc_lens.selectors import SelectorName
from lcc_lens.training import TrainConfig, learning_rates, train, validation_loss, validation_terms

logger = logging.getLogger(__name__)
COMPARISON = "comparison.json"
CONTROLS = ("dense", "shuffled", "random-heads")
MEASURES = ("perplexity", "log_perplexity", "kl", "response_loss")
_REFIT = "refit"


@dataclass(frozen=True)
class Entry:
    """A line of a comparison: ``[refit+]method[@control][:objective][=learning rate]``.

    ``refit`` starts from the refitted model. ``method`` are parts of :data:`~lcc_lens.injections.METHODS` joined by
    ``+``, or ``lora`` or ``dora``. ``@dense`` trains the same on the dense model: what that lowers is not restoration;
    ``@shuffled`` trains on other prompts' responses; ``@random-heads`` chooses heads at random. Without a
    learning rate each part takes its own.

    Example:
        >>> Entry.parse("refit+low-rank+lcc:distillation").method
        'low-rank+lcc'
    """

    text: str
    method: str | None
    on_refit: bool
    control: str | None
    objective: Objective
    lr: float | None = None

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Read a line.

        Raises:
            RequestError: an unknown method, control or objective.
        """
        whole, _, rate = text.partition("=")
        whole, _, objective = whole.partition(":")
        whole, _, control = whole.partition("@")
        on_refit = whole == _REFIT or whole.startswith(f"{_REFIT}+")
        method = whole.removeprefix(_REFIT).removeprefix("+") if on_refit else whole
        if control and control not in CONTROLS:
            raise RequestError(f"wanted a control ({', '.join(CONTROLS)}), got {control!r} in {text!r}")
        if method and method not in get_args(AdapterKind):
            parse_method(method)
        if control == "random-heads" and not (method and method not in get_args(AdapterKind) and uses_heads(method)):
            raise RequestError(f"wanted a method that acts on heads for random heads, got {text!r}")
        if (control == "dense" and on_refit) or (control and not method):
            raise RequestError(f"wanted a control of something that trains on the pruned model, got {text!r}")
        try:
            lr = float(rate) if rate else None
        except ValueError:
            raise RequestError(f"wanted a learning rate behind =, got {rate!r} in {text!r}") from None
        return cls(text, method or None, on_refit, control or None, Objective.parse(objective or "response"), lr)


@dataclass(frozen=True)
class CompareConfig:
    """What every cell shares.

    ``examples`` train; ``validation`` held-out responses choose the best numbers, ``responses`` others are measured;
    ``text`` is of another kind than the training data, in ``blocks`` of ``block_length`` tokens.
    """

    data: str = "alpaca"
    examples: int = 480
    validation: int = 24
    responses: int = 96
    text: str = "wikitext"
    blocks: int = 16
    block_length: int = 512
    max_length: int = 256
    scan_examples: int = 96
    heads: float = 1.0
    selector: SelectorName = "mse"
    batch_size: int = 8
    epochs: int = 1
    low_rank: int = 8
    lora_rank: int = 8
    refit_samples: int = 32


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

    A cell holds the perplexity of ``text``, the divergence from the dense model on held-out responses (nats per
    token), the loss of those responses, the numbers trained, and the training's seconds. The seed draws the examples,
    their order and initial values.

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

    Entries trained on the dense model have no share. The deviation of a single seed is None.
    """
    rows: list[dict[str, Any]] = []
    for text in dict.fromkeys(name.rpartition(" | ")[0] for name in found["cells"]):
        cells = [cell for name, cell in found["cells"].items() if name.rpartition(" | ")[0] == text]
        done = [cell for cell in cells if "perplexity" in cell]
        row: dict[str, Any] = {"entry": text, "seeds": len(done), "failed": len(cells) - len(done)}
        columns = {key: [cell[key] for cell in done if key in cell] for key in (*MEASURES, "training_seconds")}
        shares = [] if Entry.parse(text).control == "dense" else [_share(found["bare"], cell) for cell in done]
        columns["recovered"] = [share for share in shares if share is not None]
        for key, values in columns.items():
            row[key] = statistics.mean(values) if values else None
            row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        row["n_trained"] = max((cell.get("n_trained", 0) for cell in done), default=None)
        rows.append(row)
    return rows


def _share(bare: dict[str, dict[str, float]], cell: dict[str, float]) -> float | None:
    dense, pruned = (bare[name]["log_perplexity"] for name in ("dense", "pruned"))
    return share_recovered(dense, pruned, cell["log_perplexity"])


def _begun(out: Path, identity: dict[str, str], config: CompareConfig) -> dict[str, Any]:
    """What the file holds already, if it is of this comparison."""
    settings = asdict(config)
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
        self._sequences: tuple[list[TokenSequence], ...] | None = None

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
        record = self.run / _REFIT / REFIT_RECORD
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
        injection = self._injection(entry, pair, model, seed)
        steps, start = 0, time.perf_counter()
        if injection.n_trained:
            settings = TrainConfig(
                epochs=self.config.epochs, batch_size=self.config.batch_size, lr=entry.lr, seed=seed,
                objective=entry.objective,
            )  # fmt: skip
            data = self._training(entry, pair, seed)
            for step in train(model, injection, data, self._data(pair)[0], settings, teacher=pair.dense):
                steps = step.step
        numbers = {"training_seconds": round(time.perf_counter() - start, 1), "steps": steps}
        numbers["n_trained"] = injection.n_trained
        rates = learning_rates(injection, entry.lr)
        return {**self._measure(pair, model, injection), **numbers, "learning_rates": rates}

    def _injection(self, entry: Entry, pair: Pair, model: HookedModel, seed: int) -> Injection:
        assert entry.method is not None
        if entry.control == "dense" and pair.n_heads != int(pair.dense.cfg.n_heads):
            raise RequestError(f"wanted models with the same heads for {entry.text}, got a sliced one; leave it out")
        if entry.method in get_args(AdapterKind):
            kind = cast("AdapterKind", entry.method)
            return adapters(model, kind=kind, rank=self.config.lora_rank, seed=seed).to(device_of(model))
        scanned = self._scan(pair, on_refit=entry.on_refit) if uses_heads(entry.method) else None
        heads = []
        if scanned is not None:
            selector = "random" if entry.control == "random-heads" else self.config.selector
            heads = scanned.select(selector, share=self.config.heads, seed=seed)
        components = None if scanned is None else scanned.components
        given = Ingredients(
            model, components, heads, pair.output_projections, low_rank=self.config.low_rank, seed=seed
        )  # fmt: skip
        return build_injection(entry.method, given)

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
        path = self.run / _REFIT
        if not path.exists():
            start = time.perf_counter()
            refit(self.dense, self.pruned, path, n_samples=self.config.refit_samples)
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

    def _data(self, pair: Pair) -> tuple[list[TokenSequence], ...]:
        """Responses to validate on, responses to measure on, blocks of text."""
        if self._sequences is None:
            held_out = encode(self._held_out(), pair.tokenizer, max_length=self.config.max_length)
            text = load_data(self.config.text, role="held-out")
            blocks = encode(text, pair.tokenizer, max_length=self.config.block_length, limit=self.config.blocks)
            n = self.config.validation
            self._sequences = (held_out[:n], held_out[n:], blocks)
        return self._sequences

    def _measure(self, pair: Pair, model: HookedModel, injection: Injection | None) -> dict[str, float]:
        _, responses, blocks = self._data(pair)
        log_perplexity = validation_loss(model, injection, blocks)
        terms = validation_terms(model, injection, responses, 1024, Objective(1.0, 1.0, prompts=False), pair.dense)
        return {
            "perplexity": math.exp(log_perplexity),
            "log_perplexity": log_perplexity,
            "kl": terms["distillation"],
            "response_loss": terms["response"],
        }
