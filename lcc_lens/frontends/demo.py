"""The whole method on the embedded model: prune, scan, restore, export, evaluate, and write a page."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.config import package_version
from lcc_lens.core.files import write_json, write_text
from lcc_lens.core.metrics import share_recovered
from lcc_lens.core.ranges import Count, Length, Rate, Seed, Sparsity, check_numbers
from lcc_lens.core.showing import Shown
from lcc_lens.data.checks import is_available
from lcc_lens.data.datasets import Data, encode, load_data, load_records
from lcc_lens.data.prompts import Example
from lcc_lens.data.registry import domains
from lcc_lens.data.roles import Role
from lcc_lens.data.splits import assert_disjoint, split_examples
from lcc_lens.evaluation.evaluate import format_scores
from lcc_lens.evaluation.lm_eval_tasks import evaluate_task
from lcc_lens.evaluation.panel import panel_blocks, panel_losses, panel_recovery
from lcc_lens.exporters.huggingface import export
from lcc_lens.exporters.measured import panel_metrics
from lcc_lens.exporters.model_card import model_card
from lcc_lens.frontends.explorer.page import explore
from lcc_lens.frontends.explorer.texts import read_texts
from lcc_lens.frontends.explorer.token_tables import read_tokens
from lcc_lens.models.architecture.context import context_of, fitting_length
from lcc_lens.models.hooked.losses import sequence_loss
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.pruning.jobs import prune
from lcc_lens.restoration.best import restore_best
from lcc_lens.restoration.refitted import REFITTED
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.training.config import TrainConfig

#: What ``best`` reads in the demo.
_SOURCES = ("wikipedia", "howto", "questions", "python")


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults fit two cores and 4 GiB."""

    model: str = "smollm2"
    folder: Path = Path("runs/demo")
    sparsity: Sparsity = 0.5
    n_calibration: Count = 24
    calibration_length: Length = 256
    n_probe: Count = 64
    n_train: Count = 240
    n_validation: Count = 12
    n_held_out: Count = 40
    max_length: Length = 144
    n_text_blocks: Count = 8
    text_length: Length = 512
    n_panel_blocks: Count = 3
    n_items: Count = 50
    n_refit: Count = 24
    n_best: Count = 32
    batch_size: Count = 4
    lr: Rate = 3e-2
    seed: Seed = 0
    prompt: str = "The capital of France is"

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True, repr=False)
class DemoResult(Shown):
    """Folders and page of the demo, the content of ``results.json``, and seconds per step."""

    pruned: Path
    restored: Path
    best: Path
    page: Path
    results: dict[str, Any]
    seconds: dict[str, float]


def passages(role: Role, n: int, seed: int) -> Data:
    """BoolQ as instructions: given a question, write the Wikipedia passage that answers it."""
    boolq = load_data("boolq", n, role=role, seed=seed)
    return dataclasses.replace(
        boolq, name="boolq passages", kind="instruction", examples=tuple(_passage(e) for e in boolq.examples)
    )


def texts(role: Role, without: frozenset[str] = frozenset()) -> Data:
    """BoolQ's passages as plain text, leaving out some groups."""
    passages = load_data("wikipedia", role=role)
    kept = tuple(example for example in passages.examples if example.group not in without)
    return dataclasses.replace(passages, examples=kept)


def run_demo(
    config: DemoConfig,
    *,
    stage: Callable[[str], None] | None = None,
    on_scan: Callable[[Scan, Path], None] | None = None,
) -> DemoResult:
    """Prune, scan, restore, export and evaluate; every step runs again, only the converted model is cached.

    Args:
        stage: called with the title of each step.
        on_scan: called with the scan and its run directory, long before the rest is done.
    """
    timer = _Timer(stage)
    folder = config.folder
    pruned, restored, best, run = (folder / name for name in ("pruned", "restored", "best", "run"))
    data = _demo_data(config)

    with timer.step("prune", f"remove {config.sparsity:.0%} of the weights (Wanda)"):
        resolve(config.model)
        prune(
            config.model, pruned, sparsity=config.sparsity, calibration=data.calibration,
            n_samples=config.n_calibration, seq_len=config.calibration_length, seed=config.seed, overwrite=True,
        )  # fmt: skip
    with timer.step("scan", "see what each head lost"):
        pair = load_pair(config.model, pruned)
        scanned = scan(pair, data.probe, max_length=2 * config.max_length, seed=config.seed)
        scanned.save(run)
    if on_scan is not None:
        on_scan(scanned, run)
    with timer.step("restore", "train a constant per head"):
        restoration = _by_lcc(pair, scanned, data, config)
    del pair  # frees two models for the evaluation
    with timer.step("best", "refit, then train all remaining weights: the method that recovers most"):
        by_best = _best(pruned, folder / "run_best", config)
    with timer.step("export", "fold into plain Hugging Face directories and verify"):
        report = export(restoration, pruned, restored, overwrite=True)
        export(by_best, folder / "run_best" / REFITTED, best, overwrite=True)
    with timer.step("evaluate", "compare dense, pruned and restored"):
        paths = {"dense": resolve(config.model), "pruned": pruned, "restored": restored, "best": best}
        models: dict[str, Any] = {
            name: {"path": str(path), "tasks": _scores(path, data, config)} for name, path in paths.items()
        }
    with timer.step("panel", "measure each kind of text"):
        panels = _panels(paths, data, config)
    scores = {name: format_scores(entry["tasks"]) for name, entry in models.items()}
    card = model_card(restoration, {**scores, **panel_metrics(panels["restored"])}, report.logit_difference)
    write_text(restored / "README.md", card)
    results = {
        "models": models,
        "share_recovered": _shares(models),
        "panel": panels["restored"],
        "panel_best": panels["best"],
        "export": {k: v for k, v in dataclasses.asdict(report).items() if k not in ("path", "added", "changed")},
        "config": {**dataclasses.asdict(config), "folder": str(folder)},
        "seconds": {name: round(value, 1) for name, value in timer.seconds.items()},
        "version": package_version(),
    }
    write_json(folder / "results.json", results)
    page = explore(run, folder / "index.html", results=folder / "results.json", read_model=False)
    return DemoResult(pruned, restored, best, page, results, timer.seconds)


@dataclass(frozen=True)
class _DemoData:
    """Data of every use; no two uses share an example."""

    calibration: Data
    probe: Data
    training: Data
    validation: Data
    responses: Data
    text: Data


def _demo_data(config: DemoConfig) -> _DemoData:
    training = passages("train", config.n_train, config.seed)
    probe = load_data("boolq", config.n_probe, role="probe", seed=config.seed)
    validation, responses = split_examples(passages("held-out", config.n_held_out, config.seed), config.n_validation)
    text = texts("held-out", without=frozenset(example.group for example in validation.examples))
    calibration = texts("calibration")
    for measured in (responses, text):
        assert_disjoint(calibration, probe, training, validation, measured)
    return _DemoData(calibration, probe, training, validation, responses, text)


def _scores(path: Path, data: _DemoData, config: DemoConfig) -> dict[str, Any]:
    """Losses on held-out text and responses, and zero-shot accuracies, of one model."""
    model, tokenizer = load_plain(path), load_tokenizer(path)
    length = fitting_length(None, context_of(model.config), default=config.text_length)
    blocks = encode(data.text, tokenizer, max_length=length, limit=config.n_text_blocks)
    text = sequence_loss(model, blocks)
    responses = sequence_loss(model, encode(data.responses, tokenizer, max_length=config.max_length))
    boolq = load_records("boolq", config.n_items, role="held-out", seed=config.seed + 1)
    arc = load_records("arc_easy", config.n_items, role="held-out", seed=config.seed)
    return {
        "held-out text": {"perplexity": text["perplexity"], "loss": text["loss"], "tokens": text["tokens"]},
        "held-out responses": {
            "response_loss": responses["loss"],
            "loss": responses["loss"],
            "tokens": responses["tokens"],
        },
        "boolq": evaluate_task(model, tokenizer, "boolq", records=boolq),
        "arc_easy": evaluate_task(model, tokenizer, "arc_easy", records=arc),
    }


def _by_lcc(pair: Pair, scanned: Scan, data: _DemoData, config: DemoConfig) -> Restoration:
    """A constant on every head, trained, and what the page shows of it."""
    settings = TrainConfig(
        batch_size=config.batch_size, lr=config.lr, micro_tokens=640, validate_every=15, seed=config.seed
    )
    run = config.folder / "run"
    restoration = restore(
        pair, scanned, scanned.select(share=1.0), data.training, validation=data.validation, config=settings,
        max_length=config.max_length, run=run,
    )  # fmt: skip
    read_tokens(pair.pruned, pair.tokenizer, scanned, restoration).save(run)
    read_texts(pair, scanned, restoration, [config.prompt]).save(run)
    return restoration


def _best(pruned: Path, run: Path, config: DemoConfig) -> Restoration:
    """Restore by ``best`` at the demo's size, on texts that need no network."""
    sources = "+".join(name for name in _SOURCES if is_available(name))
    shutil.rmtree(run / REFITTED, ignore_errors=True)  # with another seed it is of another pruned model
    return restore_best(
        config.model, pruned, run, load_data(sources, role="train", seed=config.seed), calibration=sources,
        n_samples=config.n_refit, seq_len=config.calibration_length, max_length=config.calibration_length,
        limit=config.n_best,
    )  # fmt: skip


def _panels(paths: Mapping[str, Path], data: _DemoData, config: DemoConfig) -> dict[str, dict[str, Any]]:
    """Recovery on every domain that can be had, of both restored models."""
    blocks = panel_blocks(
        load_tokenizer(paths["dense"]), blocks=config.n_panel_blocks, length=config.text_length,
        without=data.validation.groups,
    )  # fmt: skip
    losses = {name: panel_losses(load_plain(path), blocks) for name, path in paths.items()}
    seen = {"restored": domains("boolq"), "best": frozenset().union(*map(domains, _SOURCES))}
    return {
        name: panel_recovery(losses["dense"], losses["pruned"], losses[name], kinds) for name, kinds in seen.items()
    }


def _shares(models: dict[str, Any]) -> dict[str, float | None]:
    """Recovered share of the lost log-likelihood, per kind of held-out data."""
    return {
        name: share_recovered(*(models[m]["tasks"][name]["loss"] for m in ("dense", "pruned", "restored")))
        for name in ("held-out text", "held-out responses")
    }


def _passage(example: Example) -> Example:
    passage, _, question = example.prompt.rpartition("\nQuestion: ")
    question = question.removesuffix("\nAnswer:")
    return Example(f"Question: {question}\nPassage:", f" {passage}", example.group)


class _Timer:
    """Announces the steps and measures their seconds."""

    def __init__(self, announce: Callable[[str], None] | None) -> None:
        self.announce, self.seconds = announce, dict[str, float]()

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        start = time.perf_counter()
        if self.announce is not None:
            self.announce(title)
        yield
        self.seconds[name] = time.perf_counter() - start
