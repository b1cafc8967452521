"""The subcommands rewrite fit and rewrite."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Count
from lcc_lens.frontends.cli.options import Common, DenseModel, Maybe, PrunedModel, RunPath, Switch, Tabled
from lcc_lens.frontends.cli.prompting import shortened
from lcc_lens.frontends.cli.show import console, show_facts, show_table
from lcc_lens.prompting.rewriting.settings import RewriterOptions, RewriterSettings

if TYPE_CHECKING:
    import pandas as pd

    from lcc_lens.models.loading.hooked import LoadedModel
    from lcc_lens.models.pair import Pair
    from lcc_lens.prompting.rewriting.preferences import Preferences
    from lcc_lens.prompting.rewriting.rewriter import Rewriter, Rewrites

#: The folder in a run that holds the rewriter, its checkpoint and its preferences.
_FOLDER, _PREFERENCES = "rewriter", "preferences.json"
#: Characters of a version that are shown; the table of --out has all of it.
_SHOWN = 120


@dataclass(frozen=True, kw_only=True)
class PreferenceData:
    """Preferences to train on."""

    data: Maybe[str] = None
    """Training instructions or questions (alpaca if not given, or arc_easy where it cannot be had)."""
    examples: Count = 240
    """Training examples."""
    candidates: Count = 6
    """Versions of every prompt: half by rule, the others by the dense model."""
    version_tokens: Count = 64
    """Tokens of a version at most."""
    preferences: Maybe[Path] = None
    """A JSON file of preferences, such as MePO's, in place of measured ones."""


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
    target: Literal["pruned", "dense"] = "pruned"
    """The model whose likelihood of the response decides between versions."""
    resume: Switch = False
    """Go on with the preferences and the checkpoint in the folder."""
    recipe: Maybe[Path] = None
    """A recipe (recipes/prompts/*.json) in place of target, data and training."""
    dry_run: Switch = False
    """The recipe with a handful of examples, to try its steps; the result means nothing."""
    data: PreferenceData = PreferenceData()
    training: RewriterOptions = field(default_factory=lambda: RewriterOptions(steps=200))

    def execute(self) -> None:
        from lcc_lens.prompting.rewriting.recipe import read_rewriter_recipe

        if self.dry_run and self.recipe is None:
            raise RequestError("expected a recipe to try, got none; name one with --recipe")
        if self.recipe is None:
            return self._fit()
        recipe = read_rewriter_recipe(self.recipe)
        recipe = recipe.dry() if self.dry_run else recipe
        data = replace(
            self.data, data=recipe.data, examples=recipe.examples, candidates=recipe.candidates,
            version_tokens=recipe.version_tokens,
        )  # fmt: skip
        replace(self, target=recipe.target, data=data, training=recipe.training)._fit()
        return None

    def _fit(self) -> None:
        from lcc_lens.models.pair import load_pair
        from lcc_lens.prompting.rewriting.fitting import fit_rewriter
        from lcc_lens.restoration.training.state import CHECKPOINT

        folder = self.run / _FOLDER
        has_checkpoint, has_pairs = ((folder / name).exists() for name in (CHECKPOINT, _PREFERENCES))
        if self.resume and not has_pairs:
            raise RequestError(f"expected preferences to go on with in {folder}, got none; start without --resume")
        ready = self._ready(folder if self.resume else None)
        pair = load_pair(self.dense, self.pruned)
        preferences = ready or self._measured(pair, folder)
        show_facts("preferences", preferences)
        rewriter = fit_rewriter(
            pair, preferences, settings=RewriterSettings(**asdict(self.training)), target=self.target, run=folder,
            resume=self.resume and has_checkpoint,
        )  # fmt: skip
        show_facts("rewriter", rewriter)
        console().print(f"rewriter {folder}", soft_wrap=True)

    def _ready(self, folder: Path | None) -> Preferences | None:
        """Preferences that are there already: those of the resumed run, or of the file that was named."""
        from lcc_lens.data.checks import check_data
        from lcc_lens.prompting.rewriting.preferences import Preferences

        if folder is not None:
            return Preferences.load(folder / _PREFERENCES)
        if self.data.preferences is None:
            check_data([self._data_name()])
            return None
        return Preferences.load(self.data.preferences)

    def _data_name(self) -> str:
        from lcc_lens.data.checks import or_mix

        return self.data.data or or_mix("alpaca", instead="arc_easy")[0]

    def _measured(self, pair: Pair, folder: Path) -> Preferences:
        """Write candidates for training prompts and rank them; the pairs are kept for resuming."""
        from lcc_lens.core.outputs.places import writing_run
        from lcc_lens.data.datasets import load_data
        from lcc_lens.prompting.rewriting.preferences import preference_pairs
        from lcc_lens.prompting.rewriting.writing import candidate_prompts

        data = load_data(self._data_name(), self.data.examples, role="train", seed=self.training.seed)
        with writing_run(folder):
            candidates = candidate_prompts(
                pair, data, self.data.candidates, max_new_tokens=self.data.version_tokens, seed=self.training.seed
            )  # fmt: skip
            preferences = preference_pairs(pair, data, candidates, target=self.target)
            preferences.save(folder / _PREFERENCES)
        return preferences


@dataclass(frozen=True, kw_only=True)
class Rewrite(Tabled):
    """Rewrite prompts, rank the versions, and say whether one is significantly better than the raw prompt."""

    example: ClassVar[str] = 'runs/mine "name some rivers"'

    run: RunPath
    """A run with a rewriter (rewrite fit), or with a scan: the dense model then rewrites without an adapter."""
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT|FILE")]
    """The prompt, or a .txt or .jsonl file of prompts."""
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
        from lcc_lens.prompting.rewriting.rewriter import REWRITER, Rewriter
        from lcc_lens.prompting.tables import read_prompts

        folder, file = self.run / _FOLDER, Path(self.prompt)
        prompts = [self.prompt]
        if file.suffix in (".txt", ".jsonl"):
            prompts = [text for text, _ in read_prompts(self.prompt)]
        fitted = Rewriter.load(folder) if (folder / REWRITER).exists() else None
        pair = load_pair(*self._models(fitted))
        is_loaded = self.rewriter is None or resolve(self.rewriter).resolve() == pair.dense_id.path.resolve()
        other = None if is_loaded else load_hooked(self.rewriter or "")
        tables = []
        for prompt in prompts:
            rewrites = self._rewritten(pair, prompt, fitted, other)
            show_rewrites(rewrites)
            tables.append(rewrites.table().assign(raw=prompt))
        self.write(lambda: _joined(tables))

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
        from lcc_lens.prompting.rewriting.rewriter import DENSE, REWRITTEN, rewrite_prompt, written_by

        if self.rewriter is None and fitted is not None:
            return fitted.rewrite(prompt, pair, n=self.n, max_new_tokens=self.max_new_tokens)
        source, model = (pair, pair.dense) if other is None else (other, other.model)
        core = split_prompt(prompt, pair.tokenizer).core
        written = written_by(
            model, source.tokenizer, source.context, core, self.n, max_new_tokens=self.max_new_tokens
        )  # fmt: skip
        target = "pruned" if fitted is None else fitted.record.target
        return rewrite_prompt(pair, prompt, written, target=target, by=DENSE if other is None else REWRITTEN)


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
