"""The subcommands rewrite fit and rewrite."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import tyro

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.ranges import Count, Length, Positive, Range, Rate, Seed
from lcc_lens.frontends.cli.options import Common, DenseModel, Maybe, PrunedModel, RunPath, Switch, Tabled, option
from lcc_lens.frontends.cli.prompting import shortened
from lcc_lens.frontends.cli.show import console, show_facts, show_table
from lcc_lens.prompting.rewriting.settings import RewriterSettings

if TYPE_CHECKING:
    import pandas as pd

    from lcc_lens.models.loading.hooked import LoadedModel
    from lcc_lens.models.pair import Pair
    from lcc_lens.prompting.rewriting.jobs import PreferenceSource
    from lcc_lens.prompting.rewriting.preferences import Target
    from lcc_lens.prompting.rewriting.rewriter import Rewriter
    from lcc_lens.prompting.rewriting.rewrites import Rewrites

#: Characters of a version that are shown; the table of --out has all of it.
_SHOWN = 120
#: Optimiser steps where neither they nor epochs are named.
_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """Preferences to train on."""

    data: Maybe[str] = None
    """Training instructions or questions (alpaca if not given, or arc_easy where it cannot be had)."""
    examples: Maybe[Count] = None
    """Training examples (240 if not given)."""
    candidates: Maybe[Count] = None
    """Versions of every prompt: half by rule, the others by the dense model (6 if not given)."""
    version_tokens: Maybe[Count] = None
    """Tokens of a version at most (64 if not given)."""


@dataclass(frozen=True, kw_only=True)
class RewriterTraining:
    """How the rewriter is trained."""

    rank: Maybe[Count] = None
    """Rank of the adapter on the query and value projections (8 if not given)."""
    alpha: Maybe[Count] = None
    """The adapter is scaled by alpha / rank (16 if not given)."""
    dropout: Maybe[Annotated[float, Range(0, 1, below=True)]] = None
    """Dropout of the adapter's inputs in training (0.05 if not given)."""
    beta: Maybe[Positive] = None
    """How far the rewriter may move from its model; smaller is farther (0.01 if not given)."""
    lr: Maybe[Rate] = None
    """Learning rate, with linear decay (1e-6 if not given)."""
    epochs: Maybe[Count] = None
    """Passes over the pairs."""
    steps: Maybe[Count] = None
    """Optimiser steps in place of epochs (200 if neither is given); pairs repeat until there are enough."""
    batch_size: Maybe[Count] = None
    """Pairs of a step (4 if not given)."""
    max_length: Maybe[Length] = None
    """Tokens of a request with its answer at most (2048, or the models' context); longer pairs are left out."""
    seed: Maybe[Seed] = None
    """Seed of the data, the adapter and the order of the pairs (0 if not given)."""


@dataclass(frozen=True, kw_only=True)
class FitRewriter(Common):
    """Train an adapter to rewrite prompts as a pruned model needs them, by direct preference optimisation."""

    example: ClassVar[str] = "smollm2 out/wanda50 runs/mine --target pruned --candidates 6 --steps 200 --lr 1e-4"

    dense: DenseModel
    """The dense model, which rewrites."""
    pruned: PrunedModel
    """The model pruned from it."""
    run: RunPath
    """The run directory; the rewriter goes into its folder rewriter."""
    target: Maybe[Literal["pruned", "dense"]] = None
    """The model whose likelihood of the response decides between versions (pruned if not given)."""
    preferences: Maybe[Path] = None
    """A .json or .jsonl file of preferences, such as MePO's, in place of measured ones."""
    resume: Switch = False
    """Go on with the candidates, the preferences and the checkpoint in the folder; repeat the options."""
    overwrite: Switch = False
    """Replace an existing rewriter, or an unfinished one."""
    recipe: Maybe[Path] = None
    """A recipe (recipes/prompts/*.json) in place of target, data and training; --preferences replaces its data."""
    dry_run: Switch = False
    """The recipe with a handful of examples, to try its steps; the result means nothing."""
    data: PreferenceOptions = PreferenceOptions()
    training: RewriterTraining = RewriterTraining()

    def execute(self) -> None:
        from lcc_lens.prompting.rewriting.jobs import RewriterJob

        source, settings, target = self._by_recipe() if self.recipe is not None else self._by_options()
        job = RewriterJob(
            self.dense, self.pruned, self.run, source, settings, target=target, resume=self.resume,
            overwrite=self.overwrite,
        )  # fmt: skip
        pair = job.load()
        preferences = job.preferences(pair)
        show_facts("preferences", preferences)
        show_facts("rewriter", job.fit(pair, preferences))
        console().print(f"rewriter {job.folder}", soft_wrap=True)

    def _by_options(self) -> tuple[PreferenceSource, RewriterSettings, Target]:
        """What the options ask for."""
        from lcc_lens.data.checks import or_mix
        from lcc_lens.prompting.rewriting.jobs import PreferenceSource

        if self.dry_run:
            raise RequestError("expected a recipe to try, got none; name one with --recipe")
        measured, training = _given(self.data), _given(self.training)
        if self.preferences is not None:
            _refuse_beside("--preferences", measured)
        if {"epochs", "steps"} <= training.keys():
            raise RequestError("expected --epochs or --steps, got both; leave one of them out")
        if not {"epochs", "steps"} & training.keys():
            training["steps"] = _STEPS
        if self.preferences is None and self.data.data is None:
            measured["data"] = or_mix("alpaca", instead="arc_easy")[0]
        source = PreferenceSource(**measured, file=self.preferences)
        return source, RewriterSettings(**training), self.target or "pruned"

    def _by_recipe(self) -> tuple[PreferenceSource, RewriterSettings, Target]:
        """What the recipe asks for."""
        from lcc_lens.prompting.rewriting.jobs import PreferenceSource
        from lcc_lens.prompting.rewriting.recipe import read_rewriter_recipe

        target = {} if self.target is None else {"target": self.target}
        _refuse_beside("--recipe", {**target, **_given(self.data), **_given(self.training)})
        recipe = read_rewriter_recipe(cast("Path", self.recipe))
        recipe = recipe.dry() if self.dry_run else recipe
        source = PreferenceSource(
            recipe.data, recipe.examples, recipe.candidates, recipe.version_tokens, file=self.preferences
        )
        return source, recipe.training, recipe.target


def _given(options: PreferenceOptions | RewriterTraining) -> dict[str, Any]:
    """The options of a group that were given."""
    return {name: value for name, value in asdict(options).items() if value is not None}


def _refuse_beside(name: str, given: Iterable[str]) -> None:
    """Refuse options that another one replaces."""
    if first := next(iter(given), None):
        raise RequestError(f"expected {name} alone, got {option(first)} too; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class Rewrite(Tabled):
    """Rewrite prompts, rank the versions, and say whether one is significantly better than the raw prompt."""

    example: ClassVar[str] = 'runs/mine "name some rivers"'

    run: RunPath
    """A run with a rewriter (rewrite fit), or with a scan: the dense model then rewrites without an adapter."""
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT|FILE")]
    """The prompt, or a file of prompts: .txt (a prompt per paragraph), .jsonl, or .json (preferences, as MePO's)."""
    n: Count = 6
    """Versions to ask the rewriter for."""
    rewriter: Maybe[str] = None
    """Another model that writes, such as MePO's published optimiser, in place of the run's."""
    max_new_tokens: Count = 48
    """Tokens of a version at most."""

    def execute(self) -> None:
        from lcc_lens.models.loading.hooked import load_hooked
        from lcc_lens.models.loading.references import resolve
        from lcc_lens.models.pair import load_pair
        from lcc_lens.prompting.rewriting.jobs import FOLDER
        from lcc_lens.prompting.rewriting.rewriter import REWRITER, Rewriter
        from lcc_lens.prompting.rewriting.rewrites import check_prompts

        folder, file = self.run / FOLDER, self._file()
        fitted = Rewriter.load(folder) if (folder / REWRITER).exists() else None
        dense, pruned = self._models(fitted)
        prompts = [self.prompt] if file is None else _prompts_of(file, dense)
        pair = load_pair(dense, pruned)
        is_loaded = self.rewriter is None or resolve(self.rewriter).resolve() == pair.dense_id.path.resolve()
        other = None if is_loaded else load_hooked(self.rewriter or "")
        check_prompts(pair, prompts, self.prompt, writer=other, max_new_tokens=self.max_new_tokens)
        tables, failed = [], []
        for number, prompt in enumerate(prompts, 1):
            try:
                rewrites = self._rewritten(pair, prompt, fitted, other)
            except RequestError as error:  # a dense model that answers nothing
                failed.append(f"prompt {number}: {error}")
                continue
            show_rewrites(rewrites)
            tables.append(rewrites.table().assign(raw=prompt))
        if tables:
            self.write(lambda: _joined(tables))
        if failed:
            n = len(prompts)
            raise LensError(f"expected versions of {n} prompts, got those of {n - len(failed)}; {'; '.join(failed)}")

    def _file(self) -> Path | None:
        """The file of prompts, where one was given."""
        from lcc_lens.core.reading import read_text

        is_file = Path(self.prompt).suffix in (".txt", ".jsonl", ".json")
        if not (is_file and (os.path.isfile(self.prompt) or len(self.prompt.split()) == 1)):
            return None
        read_text(Path(self.prompt))  # refused before a model is looked for
        return Path(self.prompt)

    def _models(self, fitted: Rewriter | None) -> tuple[str, str]:
        from lcc_lens.analysis.scan.scan import Scan, has_scan

        if fitted is not None:
            return fitted.record.model, fitted.record.pruned
        if not has_scan(self.run):
            raise RequestError(f"expected a rewriter or a scan in {self.run}, got neither; fit one first")
        record = Scan.load(self.run).record
        return record.dense, record.pruned

    def _rewritten(self, pair: Pair, prompt: str, fitted: Rewriter | None, other: LoadedModel | None) -> Rewrites:
        from lcc_lens.prompting.frames import split_prompt
        from lcc_lens.prompting.rewriting.rewrites import DENSE, REWRITTEN, rewrite_prompt, written_by

        if self.rewriter is None and fitted is not None:
            return fitted.rewrite(prompt, pair, n=self.n, max_new_tokens=self.max_new_tokens)
        core = split_prompt(prompt, pair.tokenizer).core
        written = written_by(other or pair, core, self.n, max_new_tokens=self.max_new_tokens)
        target = "pruned" if fitted is None else fitted.record.target
        return rewrite_prompt(pair, prompt, written, target=target, by=DENSE if other is None else REWRITTEN)


def _prompts_of(file: Path, dense: str) -> list[str]:
    """The prompts of a file, each once, without the dense model's chat template around them."""
    from lcc_lens.models.loading.hooked import load_tokenizer
    from lcc_lens.models.loading.references import resolve
    from lcc_lens.prompting.tables import read_prompts

    prompts = read_prompts(str(file), tokenizer=load_tokenizer(resolve(dense)))
    return list(dict.fromkeys(raw or text for text, raw in prompts))


def show_rewrites(rewrites: Rewrites) -> None:
    """Print the versions of one prompt with their merits and likelihoods, and the choice."""
    from lcc_lens.prompting.merits import MERITS

    for number, candidate in enumerate(rewrites.candidates, 1):
        console().print(f"{number} {candidate.source}: {shortened(candidate.text, _SHOWN)}")
    columns = ["", *(name.replace("_", " ") for name in MERITS), "nats per token", "over raw", "±"]
    rows = [
        [
            str(number), *(f"{score:.2f}" for score in c.merits.scores.values()),
            f"{c.ranked.log_likelihood:.3f}",
            *(["", ""] if c.source == "raw" else [f"{c.ranked.margin:+.3f}", f"{c.ranked.stderr:.3f}"]),
        ]
        for number, c in enumerate(rewrites.candidates, 1)
    ]  # fmt: skip
    show_table(f"versions, by the {rewrites.target} model's likelihood of the response", columns, rows)
    console().print(rewrites.verdict, soft_wrap=True)


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    return pd.concat(tables, ignore_index=True)
