"""The command line: one dataclass a subcommand; the only place that prints."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lcc_lens.config import bound_kernel_cache
from lcc_lens.errors import LensError, RequestError
from lcc_lens.progress import shown
from lcc_lens.selectors import SelectorName
from lcc_lens.show import (
    console,
    pruning_rows,
    refit_rows,
    show_comparison,
    show_losses,
    show_report,
    show_results,
    show_scan,
    show_table,
)

if TYPE_CHECKING:
    from lcc_lens.heads import Head
    from lcc_lens.pair import Pair
    from lcc_lens.scan import Scan

Out = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
RunPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
DenseModel = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DENSE")]
PrunedModel = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRUNED")]


@dataclass(frozen=True, kw_only=True)
class Common:
    quiet: bool = False
    """No progress bars and no notes; errors and results still show."""


@dataclass(frozen=True, kw_only=True)
class Prune(Common):
    """Remove weights and write a plain Hugging Face directory."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """smollm2, a directory, a .gguf file, or a hub id."""
    out: Out
    """The directory to write."""
    method: Literal["magnitude", "wanda", "sparsegpt", "slimgpt"] = "wanda"
    """Single weights go by size (magnitude), by size times input (wanda) or with compensation (sparsegpt); slimgpt
    removes whole heads and neurons."""
    sparsity: float | None = None
    """Share of the weights to remove (0.5 if no pattern is given; 0.2 for slimgpt)."""
    pattern: str | None = None
    """N:M such as 2:4 instead of a share: N weights stay of every M."""
    calibration: str = "c4"
    """Data whose activations the method reads: a name, or a .jsonl or .txt file."""
    n_samples: int = 128
    """Calibration sequences."""
    seq_len: int = 512
    """Tokens per calibration sequence."""
    seed: int = 0
    """Of the draw of calibration data."""
    sliced: bool = False
    """slimgpt: write a smaller model of standard configuration instead of zeros."""
    schedule: Literal["log", "linear", "uniform", "falling"] | None = None
    """slimgpt: how the sparsity is spread over the layers (log; uniform if sliced)."""
    split: Literal["spared", "proportional", "error"] | None = None
    """slimgpt: how many heads go in each layer: rounded down (spared), nearest, or by error; neurons make up the
    difference."""
    overwrite: bool = False
    """Replace an existing directory."""

    def execute(self) -> None:
        from lcc_lens.recipe import prune

        report = prune(
            self.model, self.out, method=self.method, sparsity=self.sparsity, pattern=self.pattern,
            calibration=self.calibration, n_samples=self.n_samples, seq_len=self.seq_len, seed=self.seed,
            sliced=self.sliced, schedule=self.schedule, split=self.split, overwrite=self.overwrite,
        )  # fmt: skip
        show_table(f"{self.method}: {self.out}", ["", ""], pruning_rows(report))


@dataclass(frozen=True, kw_only=True)
class Refit(Common):
    """Fit the surviving weights of a pruned model by least squares: no training, all zeros stay."""

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it."""
    out: Out
    """The directory to write."""
    calibration: tuple[str, ...] = ("alpaca", "c4", "wikitext")
    """Data whose activations are fitted, in equal parts: names, or .jsonl or .txt files."""
    n_samples: int = 48
    """Calibration sequences in all."""
    seq_len: int = 512
    """Tokens per calibration sequence."""
    target: Literal["weights", "outputs"] = "weights"
    """Fit to what the dense weights give on the inputs seen now, or to the dense model's own outputs."""
    ridge: float = 0.01
    """Pull towards the dense weights, as a share of the inputs' mean square."""
    seed: int = 0
    """Of the draw of calibration data."""
    overwrite: bool = False
    """Replace an existing directory. A refit that was interrupted goes on by itself."""

    def execute(self) -> None:
        from lcc_lens.recipe import refit

        report = refit(
            self.dense, self.pruned, self.out, calibration=self.calibration, n_samples=self.n_samples,
            seq_len=self.seq_len, target=self.target, ridge=self.ridge, seed=self.seed, overwrite=self.overwrite,
        )  # fmt: skip
        show_table(f"refitted: {self.out}", ["", ""], refit_rows(report))


@dataclass(frozen=True, kw_only=True)
class ScanPair(Common):
    """See what pruning took from every attention head."""

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it."""
    run: RunPath
    """The run directory to write."""
    data: str = "boolq"
    """Data to compare on; data with right and wrong answers also give the probe's scores."""
    examples: int = 256
    """Examples (blocks of text for a corpus)."""
    positions: Literal["all", "last", "end", "response"] | tuple[int, ...] = "all"
    """Compare at all tokens, at the question's last one as in the paper, at the end, at those that predict the
    response, or at chosen positions (-1 is the last)."""
    selectors: tuple[SelectorName, ...] | None = None
    """Scores to compute. If not given: those that cost next to nothing (probe, interaction). attribution and gradient
    take one backward pass, kl reads every head's vote, patching runs every head; mse and random always come."""
    selector_examples: int = 32
    """Examples for attribution, gradient, patching and kl."""
    probe_rank: int = 1
    """Directions in the probes' activation editing."""
    probe_solver: Literal["newton", "published"] = "newton"
    """Fit the linear probe to convergence, or by the published 200 steps."""
    probe_folds: int | None = None
    """Cross-validate the linear probe in so many parts (one split of 70/30 if not given)."""
    sites: tuple[Literal["z", "mlp", "resid"], ...] = ("z", "mlp", "resid")
    """Compare head outputs, the MLP's post-activation, the residual stream."""
    spectra: tuple[Literal["z", "mlp", "resid"], ...] = ("z",)
    """Sites whose singular values are wanted; each takes the square of the site's width in memory."""
    max_length: int | None = None
    """Tokens per example at most (512, or the models' context where that is shorter)."""
    one_at_a_time: bool = False
    """Hold one model in memory at a time."""
    seed: int = 0
    """Of the draw of examples and of the probes."""
    overwrite: bool = False
    """Replace a scan that is there. One that was interrupted goes on by itself."""

    def execute(self) -> None:
        from lcc_lens.pair import load_pair
        from lcc_lens.scan import SCAN_RECORD, scan

        if (self.run / SCAN_RECORD).exists() and not self.overwrite:
            raise RequestError(f"{self.run} holds a scan already; name another run or pass --overwrite")
        data = _load(self.data, self.examples, "probe", self.seed)
        found = scan(
            load_pair(self.dense, self.pruned, one_at_a_time=self.one_at_a_time), data, positions=self.positions,
            sites=self.sites, spectra=self.spectra, selectors=self.selectors, max_length=self.max_length,
            limit=self.examples, probe_rank=self.probe_rank, probe_solver=self.probe_solver,
            probe_folds=self.probe_folds, selector_examples=self.selector_examples, seed=self.seed, run=self.run,
        )  # fmt: skip
        show_scan(found, self.run)


@dataclass(frozen=True, kw_only=True)
class Restore(Common):
    """Find a constant per head that makes up for what pruning took (scans first where RUN holds no scan)."""

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it."""
    run: RunPath
    """The run directory: holds the scan, receives the restoration."""
    method: str = "lcc"
    """lcc: magnitudes over lost directions plus an offset, a constant per head. Its controls: offset without
    directions; mean-shift (the scan's mean difference, nothing trained); random-basis (the same training over random
    directions). Changed weights, whose zeros stay: gain (of head outputs), norms, low-rank (on every linear map),
    masked (all surviving weights). Joined by + they train together: lcc+low-rank. best: what brings back most, a refit
    by least squares and then a low-rank that follows the dense model."""
    data: str = "alpaca"
    """Training data: instructions, questions or text."""
    examples: int = 480
    """Training examples at most."""
    heads: float = 0.25
    """Share of all heads to restore."""
    selector: SelectorName = "probe"
    """How heads are chosen."""
    scan_data: str = "boolq"
    """Data for the scan where RUN holds none."""
    scan_examples: int = 256
    """Examples for that scan."""
    rank: int | None = None
    """Directions per head (all if not given)."""
    low_rank: int | None = None
    """Rank of low-rank (8 if not given; best: 16)."""
    start: Literal["zero", "mean"] = "zero"
    """Where the magnitudes start: at the pruned model, or at the mean difference."""
    epochs: int = 1
    """Passes over the training data."""
    batch_size: int = 8
    """Examples per optimiser step."""
    lr: float | None = None
    """AdamW's learning rate of the method's first part (its own if not given; a constant's is in units of each head's
    difference); decays linearly to zero."""
    tune_lr: bool = False
    """Choose the learning rate by a few steps at each of five first."""
    objective: str | None = None
    """Minimise the loss of the response (response) or of all tokens (text), the distance to the dense model's
    distribution (distillation) or to its head outputs (heads), or several joined by +, as in text+3*distillation
    (response if not given; best: text+distillation)."""
    temperature: float = 1.0
    """Of distillation."""
    patience: int | None = None
    """Stop after so many validations without a new best."""
    max_length: int = 512
    """Tokens per example at most."""
    shuffle_responses: bool = False
    """A control: train on every prompt with another one's response."""
    hooks_only: bool = False
    """Restore even where the checkpoint cannot hold the result (it then works under hooks alone)."""
    checkpoint_every: int = 20
    """Optimiser steps between checkpoints."""
    seed: int = 0
    """Of the draw and order of the training data."""
    resume: bool = False
    """Go on from the run's checkpoint."""
    overwrite: bool = False
    """Replace a restoration that is there."""

    def execute(self) -> None:
        from lcc_lens.best import BEST_LOW_RANK, BEST_OBJECTIVE, restore_best
        from lcc_lens.injections import parse_method, uses_components, uses_heads
        from lcc_lens.objectives import Objective
        from lcc_lens.pair import load_pair
        from lcc_lens.recipe import restore
        from lcc_lens.restoration import RESTORATION_TENSORS
        from lcc_lens.training import TrainConfig

        if (self.run / RESTORATION_TENSORS).exists() and not (self.overwrite or self.resume):
            raise RequestError(f"{self.run} holds a restoration already; name another run or pass --overwrite")
        is_best = self.method == "best"
        if not is_best:
            parse_method(self.method)
        objective = self.objective or (BEST_OBJECTIVE if is_best else "response")
        config = TrainConfig(
            epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, checkpoint_every=self.checkpoint_every,
            seed=self.seed, patience=self.patience,
            objective=Objective.parse(objective, temperature=self.temperature),
        )  # fmt: skip
        data = _load(self.data, self.examples, "train", self.seed)
        validation = _load(self.data, max(8, self.examples // 10), "held-out", self.seed)
        if is_best:
            restoration = restore_best(
                self.dense, self.pruned, self.run, data, config=config, validation=validation,
                low_rank=self.low_rank or BEST_LOW_RANK, max_length=self.max_length, limit=self.examples,
                resume=self.resume,
            )  # fmt: skip
            show_losses(restoration.record.losses, 0, self.run)
            return
        pair = load_pair(self.dense, self.pruned)
        found = self._scan(pair) if uses_components(self.method) or uses_heads(self.method) else None
        heads = self._heads(found) if found is not None else []
        restoration = restore(
            pair, found, heads, data, method=self.method, config=config, validation=validation, rank=self.rank,
            low_rank=self.low_rank or 8, start=self.start, max_length=self.max_length, limit=self.examples,
            exportable=not self.hooks_only, shuffle_responses=self.shuffle_responses, tune_lr=self.tune_lr,
            run=self.run, resume=self.resume,
        )  # fmt: skip
        show_losses(restoration.record.losses, len(heads), self.run)

    def _scan(self, pair: Pair) -> Scan:
        from lcc_lens.scan import SCAN_RECORD, Scan, scan

        if (self.run / SCAN_RECORD).exists():
            return Scan.load(self.run)
        data = _load(self.scan_data, self.scan_examples, "probe", self.seed)
        named = None if self.selector in ("mse", "random") else (self.selector,)
        return scan(
            pair, data, selectors=named, max_length=min(self.max_length, pair.context), limit=self.scan_examples,
            seed=self.seed, run=self.run,
        )  # fmt: skip

    def _heads(self, found: Scan) -> list[Head]:
        return found.select(self.selector, share=self.heads, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Compare(Common):
    """Train and measure several methods, baselines and controls by the same rule; finished cells are kept."""

    dense: DenseModel
    """The dense model."""
    pruned: PrunedModel
    """The model pruned from it."""
    run: RunPath
    """A folder for the comparison; the same command goes on there."""
    methods: tuple[str, ...] = ("lcc", "lcc@dense", "random-basis", "offset", "mean-shift", "lora")
    """Restore's methods, lora, dora (-vo: on v and o alone), lofit or eora; refit+ before one starts from the refitted
    model; @dense, @shuffled or @random-heads after it is a control; :distillation trains towards the dense model; =3e-3
    sets a learning rate."""
    seeds: int = 3
    """How many seeds (the draw of examples, their order, initial values)."""
    data: str = "alpaca"
    """Training data."""
    examples: int = 480
    """Training examples."""
    texts: tuple[str, ...] = ("wikitext", "c4")
    """Texts of another kind, for perplexity; the first is the main figure."""
    blocks: int = 16
    """Blocks of 512 tokens of each."""
    tasks: tuple[str, ...] = ()
    """Zero-shot tasks of lm-eval."""
    limit: int = 200
    """Items of each task at most."""
    responses: int = 96
    """Held-out responses for the divergence from the dense model and the response loss."""
    heads: float = 1.0
    """Share of heads to restore."""
    selector: SelectorName = "mse"
    """How heads are chosen."""
    max_length: int = 256
    """Tokens per example at most."""

    def execute(self) -> None:
        from lcc_lens.bench import CompareConfig
        from lcc_lens.compare import compare, summary

        config = CompareConfig(
            data=self.data, examples=self.examples, texts=self.texts, blocks=self.blocks, responses=self.responses,
            tasks=self.tasks, limit=self.limit, heads=self.heads, selector=self.selector, max_length=self.max_length,
        )  # fmt: skip
        found = compare(self.dense, self.pruned, self.run, self.methods, seeds=self.seeds, config=config)
        show_comparison(found["bare"], summary(found), self.run)


@dataclass(frozen=True, kw_only=True)
class Export(Common):
    """Fold a restoration into a plain Hugging Face directory and verify it."""

    run: RunPath
    """The run directory with the restoration."""
    out: Out
    """The directory to write."""
    pruned: str | None = None
    """Where the pruned model lies now (where the run found it, if not given)."""
    overwrite: bool = False
    """Replace an existing directory."""

    def execute(self) -> None:
        from lcc_lens.export import export
        from lcc_lens.restoration import Restoration

        restoration = Restoration.load(self.run)
        report = export(restoration, self.pruned or restoration.record.pruned, self.out, overwrite=self.overwrite)
        rows = [
            ["biases added", str(len(report.added))],
            ["tensors changed", str(len(report.changed))],
            ["tensors bit-identical", str(report.identical_tensors)],
            ["zeros in matrices", f"{report.zeros:,}"],
            ["largest logit difference to the hooked model", f"{report.logit_difference:.2g}"],
            ["largest effect on the logits", f"{report.logit_effect:.2g}"],
        ]
        show_table(f"exported and verified: {self.out}", ["", ""], rows)


@dataclass(frozen=True, kw_only=True)
class Eval(Common):
    """Measure models side by side."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL ...]")]
    """Model references."""
    tasks: tuple[str, ...] = ("wikitext", "boolq", "arc_easy")
    """Text (perplexity), instructions (response loss), or lm-eval's tasks (accuracy)."""
    limit: int | None = None
    """Blocks, responses or items per task at most."""
    length: int = 512
    """Tokens per block of text."""
    out: Path | None = None
    """A results.json to write."""

    def execute(self) -> None:
        from lcc_lens.evaluation import evaluate
        from lcc_lens.files import write_json

        if not self.models:
            raise RequestError("wanted at least one model, got none; name some")
        results = evaluate(self.models, self.tasks, limit=self.limit, length=self.length)
        if self.out is not None:
            write_json(self.out, results)
        show_results(results["models"], str(self.out) if self.out else "results")


@dataclass(frozen=True, kw_only=True)
class Report(Common):
    """See whether models are really as sparse as they say, whether they are faster, and whether they load."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL ...]")]
    """Model references; the first, best the dense one, is what the others are held to."""
    latency: bool = True
    """Time the models, all of them in memory at once."""
    repeats: int = 15
    """Timed rounds."""
    prompt_tokens: int = 256
    """Tokens of the timed forward pass."""
    new_tokens: int = 24
    """Tokens generated one by one."""
    out: Path | None = None
    """A report.json to write."""

    def execute(self) -> None:
        from lcc_lens.files import write_json
        from lcc_lens.report import report

        if self.out is not None and self.out.is_dir():
            raise RequestError(f"wanted a file to write the report to, got the folder {self.out}; name a .json file")
        found = report(
            self.models, latency=self.latency, repeats=self.repeats, prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
        )  # fmt: skip
        if self.out is not None:
            write_json(self.out, found)
        show_report(found, str(self.out) if self.out else "report")


@dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """Prune the embedded model, see what its heads lost, restore it, export it, and open a page."""

    folder: Path = Path("runs/demo")
    """Where everything is written."""
    seed: int = 0
    """Of the draw of data."""

    def execute(self) -> None:
        from lcc_lens.demo import DemoConfig, run_demo

        stages = iter(range(1, 10))

        def stage(title: str) -> None:
            if not self.quiet:
                console().print(f"[bold]{next(stages)}/5[/bold] {title}")

        result = run_demo(DemoConfig(folder=self.folder, seed=self.seed), stage=stage)
        show_results(result.results["models"], "dense, pruned, restored on held-out data")
        shares = {name: value for name, value in result.results["share_recovered"].items() if value is not None}
        show_table(
            "share of the lost log-likelihood recovered", ["data", "share"],
            [[name, f"{value:.1%}"] for name, value in shares.items()],
        )  # fmt: skip
        console().print(f"model  {result.restored}")
        console().print(f"page   {result.page}", soft_wrap=True)


Command = (
    Annotated[Prune, tyro.conf.subcommand("prune")]
    | Annotated[Refit, tyro.conf.subcommand("refit")]
    | Annotated[ScanPair, tyro.conf.subcommand("scan")]
    | Annotated[Restore, tyro.conf.subcommand("restore")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def run(arguments: list[str] | None = None) -> int:
    """Parse and run one command; gives the exit code: 0 done, 1 failed, 2 cannot be served, 130 interrupted."""
    try:
        command: Any = tyro.cli(
            Command, args=arguments, prog="lcc-lens", description="See what pruning took, and put it back.",
            config=(tyro.conf.FlagCreatePairsOff,),
        )  # fmt: skip
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    _set_up_logging(command.quiet)
    bound_kernel_cache()
    try:
        with nullcontext() if command.quiet else shown():
            command.execute()
    except LensError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; finished steps are kept", 130)
    except Exception as error:
        if os.environ.get("LCC_LENS_DEBUG"):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        return _fail(f"{type(error).__name__}: {first} (LCC_LENS_DEBUG=1 shows where)", 1)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"lcc-lens: {' '.join(message.split())}", file=sys.stderr)
    return code


def _set_up_logging(quiet: bool) -> None:
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(level=logging.ERROR if quiet else logging.WARNING, format="lcc-lens: %(message)s")
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("lcc_lens").setLevel(logging.ERROR if quiet else logging.INFO)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore")  # third-party deprecations are for the tests, not for users


def _load(name: str, n: int, role: Any, seed: int) -> Any:
    """Examples of a role; all documents of a corpus, since they are cut into n blocks later."""
    from lcc_lens.data import load_data
    from lcc_lens.tasks import SOURCES

    is_corpus = Path(name).suffix == ".txt" or (name in SOURCES and SOURCES[name].kind == "text")
    return load_data(name, None if is_corpus else n, role=role, seed=seed)
