"""How pruning changes a model's reaction to its prompt, and whether a better prompt and a restoration add up.

    python benchmarks/prompts.py [--folder runs/prompts] [--examples 96] [--seeds 3] [--restorations lcc best]

SmolLM2-135M, Wanda 50 % and 2:4. A part is one pruned model and one seed, which draws the examples. Held-out Alpaca
responses are scored after every variant of their prompts in the dense, the pruned and the restored models; ARC-easy and
OpenBookQA give accuracies of the pruned one. The rows "ranked" choose a version per prompt without its response, by the
likelihood of the dense model's own answer under the pruned model ("ranked on dense": under the dense one); "rewriter"
is the adapter that direct preference optimisation trains on training prompts, "rewriter, shuffled" the same with chosen
and rejected exchanged at random. Heads: the reaction of each head to a variant beside the norm that pruning took.

Every study is kept in the folder; the script can be stopped at any time and goes on. The committed file is written anew
after every part.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from run import command_given, describe, rounded
from transformers.utils import logging as transformers_logging

from lcc_lens.analysis.scan.scan import Scan, has_scan, scan
from lcc_lens.core.files import write_json
from lcc_lens.core.reading import read_json
from lcc_lens.data.datasets import Data, load_data
from lcc_lens.exporters.huggingface import export
from lcc_lens.models.pair import load_pair
from lcc_lens.prompting.frames import split_prompt
from lcc_lens.prompting.measuring import prompt_study
from lcc_lens.prompting.rewriting.fitting import fit_rewriter
from lcc_lens.prompting.rewriting.preferences import Preferences, preference_pairs
from lcc_lens.prompting.rewriting.rewriter import REWRITER, Rewriter
from lcc_lens.prompting.rewriting.rewrites import rewrite_prompt
from lcc_lens.prompting.rewriting.settings import RewriterSettings
from lcc_lens.prompting.rewriting.writing import candidate_prompts, proposals
from lcc_lens.prompting.soft_prompt import SoftPrompt, fit_soft_prompt
from lcc_lens.prompting.study import PromptStudy, joined_studies
from lcc_lens.prompting.variants import RAW, prompt_variants
from lcc_lens.prompting.wording import overlap
from lcc_lens.pruning.jobs import prune
from lcc_lens.restoration.jobs import restore_models
from lcc_lens.restoration.result import RESTORATION_TENSORS, Restoration

OUT = Path(__file__).parent / "prompts.json"
MODELS: dict[str, dict[str, Any]] = {"wanda 50%": {"sparsity": 0.5}, "wanda 2:4": {"pattern": "2:4"}}
VARIANTS = ("clear", "precise", "concise-cot", "merits", "verbose", "filler", "filler-long", "degraded")
CHOICES = ("arc_easy", "openbookqa")
TOP = 0.1
_MAX_LENGTH, _RESPONSE, _VERSION = 512, 96, 48


class Part:
    """One pruned model and one seed; what is finished lies in its folder."""

    def __init__(self, name: str, seed: int, given: argparse.Namespace) -> None:
        self.name, self.seed, self.given = name, seed, given
        self.model = given.folder / name.replace(" ", "_").replace(":", "-").replace("%", "")
        self.folder = self.model / f"seed_{seed}"
        pruned = self.model / "pruned"
        if not pruned.exists():
            prune("smollm2", pruned, calibration="c4", n_samples=64, **MODELS[name])
        self.pair = load_pair("smollm2", pruned)

    def restored(self, method: str) -> Path:
        """The exported restoration with the part's seed."""
        run, out = self.folder / method, self.folder / f"{method}_exported"
        if not (run / RESTORATION_TENSORS).exists():
            data = load_data("alpaca", self.given.restored_on, role="train", seed=self.seed)
            restore_models("smollm2", self.model / "pruned", run, data, method=method)
        if not out.exists():
            restoration = Restoration.load(run)
            export(restoration, restoration.record.pruned, out)
        return out

    def study(self, name: str, make: Callable[[], PromptStudy]) -> PromptStudy:
        """A study, read if it is there."""
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            start = time.perf_counter()
            make().save(file)
            print(f"{self.name} seed {self.seed} {name}: {time.perf_counter() - start:.0f} s", flush=True)
        return PromptStudy.load(file)

    def responses(self, method: str | None) -> PromptStudy:
        """Held-out Alpaca responses after every variant, with one restoration."""

        def make() -> PromptStudy:
            data = load_data("alpaca", self.given.examples, role="held-out", seed=self.seed)
            variants = {**prompt_variants(data, (RAW, *VARIANTS)), **self.rewritten(data)}
            soft = None
            if self.given.soft:
                variants |= prompt_variants(data, ("soft",))
                soft = self.soft()
            restored = None if method is None else self.restored(method)
            return prompt_study(
                self.pair, variants, restored, soft_prompt=soft, max_length=_MAX_LENGTH, response_tokens=_RESPONSE,
                heads=self.given.heads if method is None else (), head_examples=self.given.head_examples,
            )  # fmt: skip

        return self.study(f"alpaca_{method or 'pruned'}", make)

    def choices(self, task: str) -> PromptStudy:
        """Right and wrong answers of a task after every written variant."""

        def make() -> PromptStudy:
            data = load_data(task, self.given.items, role="held-out", seed=self.seed)
            return prompt_study(self.pair, prompt_variants(data, (RAW, *VARIANTS)), max_length=_MAX_LENGTH)

        return self.study(task, make)

    def soft(self) -> SoftPrompt:
        data = load_data("alpaca", self.given.trained_on, role="train", seed=self.seed)
        return fit_soft_prompt(self.pair, data, max_length=256, seed=self.seed)

    def rewritten(self, data: Data) -> dict[str, Data]:
        """The rows that rewrite each prompt, as variants of the data; kept as JSON."""
        file = self.folder / "rewritten.json"
        kept: dict[str, list[str]] = read_json(file) if file.exists() else {}
        rows: dict[str, Callable[[str], str]] = {
            "ranked": lambda prompt: rewrite_prompt(self.pair, prompt, self.written(prompt)).chosen.text,
            "ranked on dense": lambda prompt: (
                rewrite_prompt(self.pair, prompt, self.written(prompt), target="dense").chosen.text
            ),
            "rewriter": lambda prompt: self.by_rewriter(prompt, shuffled=False),
            "rewriter, shuffled": lambda prompt: self.by_rewriter(prompt, shuffled=True),
        }
        for name, choose in rows.items():
            if name in self.given.rewrites and name not in kept:
                start = time.perf_counter()
                kept[name] = [choose(example.prompt) for example in data.examples]
                write_json(file, kept)
                print(f"{self.name} seed {self.seed} {name}: {time.perf_counter() - start:.0f} s", flush=True)
        return {name: _with_cores(data, texts) for name, texts in kept.items()}

    def written(self, prompt: str) -> list[str]:
        """The dense model's own versions of a prompt."""
        core = split_prompt(prompt).core
        return proposals(
            self.pair.dense, self.pair.tokenizer, core, 3, context=self.pair.context, max_new_tokens=_VERSION
        )  # fmt: skip

    def by_rewriter(self, prompt: str, *, shuffled: bool) -> str:
        """The trained rewriter's greedy version; the prompt itself if it writes nothing."""
        rewriter = self.rewriter(shuffled=shuffled)
        model, core = rewriter.model_of(self.pair), split_prompt(prompt).core
        with rewriter.adapter(model).attached(model):
            found = proposals(
                model, self.pair.tokenizer, core, 1, context=self.pair.context, max_new_tokens=_VERSION
            )  # fmt: skip
        return found[0] if found else core

    def rewriter(self, *, shuffled: bool) -> Rewriter:
        """The adapter that is trained on preferences, or on shuffled ones."""
        folder = self.folder / ("rewriter_shuffled" if shuffled else "rewriter")
        if (folder / REWRITER).exists():
            return Rewriter.load(folder)
        preferences, file = None, self.folder / "preferences.json"
        if file.exists():
            preferences = Preferences.load(file)
        else:
            data = load_data("alpaca", self.given.trained_on, role="train", seed=self.seed)
            versions = candidate_prompts(self.pair, data, 6, max_new_tokens=_VERSION, seed=self.seed)
            preferences = preference_pairs(self.pair, data, versions, response_tokens=_RESPONSE)
            preferences.save(file)
        settings = RewriterSettings(steps=self.given.steps, lr=1e-4, seed=self.seed)
        return fit_rewriter(
            self.pair, preferences.shuffled(self.seed) if shuffled else preferences, settings=settings, run=folder
        )  # fmt: skip

    def scanned(self) -> Scan:
        run = self.model / "scan"
        if not has_scan(run):
            data = load_data("alpaca", 64, role="probe")
            scan(self.pair, data, sites=("z",), display=0, max_length=256, selectors=(), run=run)
        return Scan.load(run)


def _with_cores(data: Data, cores: Sequence[str]) -> Data:
    examples = (
        replace(example, prompt=split_prompt(example.prompt).having(core))
        for example, core in zip(data.examples, cores, strict=True)
    )
    return replace(data, examples=tuple(examples))


def rows_of(parts: Sequence[Part], methods: Sequence[str]) -> dict[str, Any]:
    """Everything that was measured of one pruned model, over its seeds."""
    studies = {method: joined_studies([part.responses(method) for part in parts]) for method in methods}
    first = joined_studies([part.responses(None) for part in parts])
    result: dict[str, Any] = {
        "examples": len(first.record.groups), "rows": _records(first),
        "sensitivity": first.sensitivity().to_dict("records"),
        "restored": {m: _records(s, s.interaction()) for m, s in studies.items()},
        "restored_sensitivity": {m: s.sensitivity().to_dict("records") for m, s in studies.items()},
        "choices": {task: _records(joined_studies([part.choices(task) for part in parts])) for task in CHOICES},
        "heads": heads_of(first, parts[0].scanned()),
    }  # fmt: skip
    result["overlap"] = _overlaps(parts)
    return rounded(result)


def _records(study: PromptStudy, other: Any = None) -> list[dict[str, Any]]:
    table = study.table()
    return (table if other is None else table.merge(other, on="variant")).to_dict("records")


def _overlaps(parts: Sequence[Part]) -> dict[str, float]:
    """By row that rewrites, the mean fraction of the response that its prompts give away; of the raw ones too."""
    sums: dict[str, list[float]] = {}
    for part in parts:
        file = part.folder / "rewritten.json"
        data = load_data("alpaca", part.given.examples, role="held-out", seed=part.seed)
        rows = {RAW: [split_prompt(e.prompt).core for e in data.examples], **(read_json(file) if file.exists() else {})}
        for name, texts in rows.items():
            pairs = zip(texts, data.examples, strict=True)
            sums.setdefault(name, []).extend(overlap(text, example.response) for text, example in pairs)
    return {name: sum(values) / len(values) for name, values in sums.items()}


def heads_of(study: PromptStudy, found: Scan, n_draws: int = 2000) -> list[dict[str, Any]]:
    """Per variant: how much of all heads' reaction lies in those that pruning changed most, and in random ones."""
    lost = found.relative_loss.flatten().double()
    n_top = math.ceil(TOP * len(lost))
    rows = []
    for variant in study.reactions:
        scores = study.heads(variant)
        reaction = scores.value.flatten().double().abs()
        generator = torch.Generator().manual_seed(0)
        random = torch.stack([
            reaction[torch.randperm(len(reaction), generator=generator)[:n_top]].sum() for _ in range(n_draws)
        ]) / reaction.sum()  # fmt: skip
        best = scores.table().sort_values("value", key=abs, ascending=False).head(5)
        ranks = torch.stack([x.argsort().argsort().double() for x in (reaction, lost)])
        in_lost = reaction[lost.topk(n_top).indices].sum() / reaction.sum()
        rows.append({
            "variant": variant, "examples": scores.n_examples, "share_of_lost_heads": float(in_lost),
            "share_of_random_heads": float(random.mean()), "random_low": float(random.quantile(0.025)),
            "random_high": float(random.quantile(0.975)), "rank_correlation": float(torch.corrcoef(ranks)[0, 1]),
            "highest": [[f"L{row.layer}H{row.head}", row.value, row.stderr] for row in best.itertuples()],
        })  # fmt: skip
    return rows


def main() -> None:
    """Measure the parts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/prompts"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--restorations", nargs="*", default=["lcc", "best"])
    parser.add_argument("--restored-on", type=int, default=480)
    parser.add_argument("--trained-on", type=int, default=240)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--soft", action=argparse.BooleanOptionalAction, default=True)
    rewrites = ["ranked", "ranked on dense", "rewriter", "rewriter, shuffled"]
    parser.add_argument("--rewrites", nargs="*", default=rewrites, choices=rewrites)
    parser.add_argument("--heads", nargs="*", default=["clear", "concise-cot", "filler", "degraded"])
    parser.add_argument("--head-examples", type=int, default=16)
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    sizes = {name: value for name, value in vars(given).items() if name not in ("folder", "out")}
    results: dict[str, Any] = {}
    own = {name: value for name, value in sizes.items() if name not in ("models", "seeds")}
    if (note := given.folder / "sizes.json").exists() and read_json(note) != own:
        sys.exit(f"expected the sizes in {note}, got others; name another --folder")
    write_json(note, own)
    for name in given.models:
        parts: list[Part] = []
        for seed in range(given.seeds):
            parts.append(Part(name, seed, given))
            results[name] = {"seeds": seed + 1, **rows_of(parts, given.restorations)}
            command = command_given("--folder", "--out")
            write_json(given.out, {"command": command, "machine": describe(), "sizes": sizes, "models": results})


if __name__ == "__main__":
    main()
