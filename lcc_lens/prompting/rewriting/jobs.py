"""Fit a rewriter in a run directory: preferences that are measured or read, then the training; both are resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lcc_lens.core.errors import RequestError
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.outputs.places import RESUMED, writing_run
from lcc_lens.core.ranges import Count, check_numbers
from lcc_lens.core.reading import read_record, write_record
from lcc_lens.data.checks import check_data
from lcc_lens.data.datasets import Data, load_data
from lcc_lens.models.pair import Pair, check_models, load_pair
from lcc_lens.prompting.rewriting.fitting import fit_rewriter
from lcc_lens.prompting.rewriting.preferences import (
    RANKINGS,
    Preferences,
    Target,
    check_examples,
    is_dense,
    preference_pairs,
)
from lcc_lens.prompting.rewriting.rewriter import REWRITER, Rewriter, new_adapter
from lcc_lens.prompting.rewriting.settings import RewriterSettings
from lcc_lens.prompting.rewriting.writing import CANDIDATES, candidate_prompts
from lcc_lens.prompting.variants import require_prompts
from lcc_lens.restoration.refitted import pair_hashes
from lcc_lens.restoration.training.state import CHECKPOINT

#: The folder in a run that holds the rewriter and all that it was made from.
FOLDER = "rewriter"
#: What the rewriter was trained on, and the record of what was asked for.
PREFERENCES, REQUEST = "preferences.json", "request.json"
#: What a record knows by a hash.
_CONTENTS = {
    "dense_sha256": "dense model", "pruned_sha256": "pruned model", "examples_sha256": "examples in the data",
    "preferences_sha256": "pairs in the file of preferences",
}  # fmt: skip
_FILES = (REQUEST, CANDIDATES, RANKINGS, PREFERENCES, CHECKPOINT, REWRITER)


@dataclass(frozen=True)
class PreferenceSource:
    """What preferences are measured on, or the file that holds them.

    Args:
        data: training instructions or questions.
        examples: how many of them.
        candidates: versions of every prompt: half by rule, the others by the dense model.
        version_tokens: tokens of a version at most.
        file: preferences in place of measured ones.
    """

    data: str = "alpaca"
    examples: Count = 240
    candidates: Count = 6
    version_tokens: Count = 64
    file: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self)

    def read(self, seed: int) -> Preferences | Data:
        """The file's preferences, or the examples to measure on.

        Raises:
            RequestError: they cannot be had, or preferences cannot be measured on them.
        """
        if self.file is not None:
            return Preferences.load(self.file)
        require_prompts(self.data)
        check_data([self.data])
        data = load_data(self.data, self.examples, role="train", seed=seed)
        check_examples(data)
        return data

    def record(self, content: Preferences | Data, seed: int) -> dict[str, Any]:
        """What decides the preferences, by the names of options."""
        if isinstance(content, Preferences):
            return {"preferences_sha256": fingerprint(content.pairs)}
        options = {name: value for name, value in asdict(self).items() if name != "file"}
        return {**options, "seed": seed, "examples_sha256": fingerprint(content.examples)}


class RewriterJob:
    """A rewriter that is fitted in a run directory: first its preferences, then the training.

    Args:
        dense: reference of the dense model, which rewrites.
        pruned: of the model pruned from it.
        run: the run directory; everything goes into its folder ``rewriter``.
        target: the model whose likelihood of the response decides between versions.
        resume: go on with the candidates, rankings and checkpoint in the folder.
        overwrite: replace what the folder holds.

    Raises:
        RequestError: what can be told before any model is loaded: a folder in use, nothing to resume, a resumed job
            with other options, models or data, or data without prompts.
    """

    def __init__(
        self,
        dense: str,
        pruned: str,
        run: Path,
        source: PreferenceSource,
        settings: RewriterSettings,
        *,
        target: Target = "pruned",
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        is_dense(target)  # refuses another one
        self.folder, self._resume = run / FOLDER, resume
        self._source, self._settings, self._target = source, settings, target
        _check_folder(self.folder, resume=resume, overwrite=overwrite)
        check_models(dense, pruned, settings.max_length)
        self._content = source.read(settings.seed)
        self._record = {"target": target, **source.record(self._content, settings.seed), **pair_hashes(dense, pruned)}
        if resume:
            _require_same(self.folder, self._record)
        self._dense, self._pruned = dense, pruned

    def load(self) -> Pair:
        """The models, if an adapter can be trained on the dense one."""
        pair = load_pair(self._dense, self._pruned)
        new_adapter(pair.dense, self._settings)
        return pair

    def preferences(self, pair: Pair) -> Preferences:
        """The file's preferences, or measured ones; kept in the folder.

        Raises:
            InterruptedRun: Ctrl-C; finished examples are kept.
        """
        with writing_run(self.folder, again=RESUMED):
            if not self._resume:
                for name in _FILES:
                    (self.folder / name).unlink(missing_ok=True)
                write_record(self.folder / REQUEST, self._record)
            content = self._content
            preferences = content if isinstance(content, Preferences) else self._measured(pair, content)
            preferences.save(self.folder / PREFERENCES)
        return preferences

    def fit(self, pair: Pair, preferences: Preferences) -> Rewriter:
        """The rewriter (see :func:`~lcc_lens.prompting.rewriting.fitting.fit_rewriter`)."""
        return fit_rewriter(
            pair, preferences, settings=self._settings, target=self._target, run=self.folder,
            resume=self._resume and (self.folder / CHECKPOINT).exists(),
        )  # fmt: skip

    def _measured(self, pair: Pair, data: Data) -> Preferences:
        """Versions of the prompts, ranked."""
        source = self._source
        candidates = candidate_prompts(
            pair, data, source.candidates, max_new_tokens=source.version_tokens, seed=self._settings.seed,
            run=self.folder,
        )  # fmt: skip
        return preference_pairs(pair, data, candidates, target=self._target, run=self.folder)


def _check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds a rewriter, finished or not, unless it goes on or is replaced."""
    if resume:
        if not (folder / REQUEST).exists():
            raise RequestError(f"expected preferences to go on with in {folder}, got none; start without --resume")
        return
    if not overwrite and any((folder / name).exists() for name in _FILES):
        what = "a rewriter" if (folder / REWRITER).exists() else "an unfinished rewriter"
        raise RequestError(f"{folder} holds {what} already; go on with --resume, name another run or pass --overwrite")


def _require_same(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse to go on with another request's work."""
    kept = read_record(folder / REQUEST, dict[str, Any], "start again with --overwrite")
    for name in dict.fromkeys((*kept, *record)):
        if kept.get(name) != record.get(name):
            expected, asked = (_said(name, values) for values in (kept, record))
            raise RequestError(
                f"expected {expected} as in {folder}, got {'another' if asked == expected else asked}; repeat its "
                "options, or start again with --overwrite"
            )


def _said(name: str, record: Mapping[str, Any]) -> str:
    """How the command line calls a value of a record."""
    if name in _CONTENTS:
        return f"{'the' if name in record else 'no'} {_CONTENTS[name]}"
    option = f"--{name.replace('_', '-')}"
    return f"{option} {record[name]}" if name in record else f"no {option}"
