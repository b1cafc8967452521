"""Studies of several draws of examples, each measured once, here or by a job of a cluster, and joined."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcc_lens.core.config import package_version
from lcc_lens.core.errors import LensError, RequestError, first_line
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.machine.cluster import JOBS, Cluster
from lcc_lens.core.outputs.places import writing_run
from lcc_lens.core.ranges import Count, Length, check_numbers
from lcc_lens.data.checks import check_data
from lcc_lens.data.datasets import Data, load_data
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.pair import Pair, check_models, load_pair
from lcc_lens.prompting.measuring import prompt_study
from lcc_lens.prompting.reactions import require_relative_positions
from lcc_lens.prompting.restored import check_restored, restored_sha256
from lcc_lens.prompting.soft_prompt import fit_soft_prompt
from lcc_lens.prompting.study import PromptStudy, joined_studies
from lcc_lens.prompting.variants import RAW, SOFT, check_variants, prompt_variants, require_prompts
from lcc_lens.restoration.refitted import pair_hashes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyRequest:
    """What the studies of all draws share (see :func:`~lcc_lens.prompting.measuring.prompt_study`).

    Args:
        dense: reference of the dense model.
        pruned: reference of the pruned model.
        data: instructions or questions.
        variants: how prompts are written; ``raw`` is always measured.
        restored: a restoration's run, or a model's reference.
        examples: held-out examples of a draw.
        max_length: tokens of prompt and response at most.
        response_tokens: the first tokens of a response that count.
        soft_examples: training examples of the variant ``soft``.
        heads: also measure the reactions of all heads, to every written variant.
        head_examples: examples of a draw that heads are patched on.
        one_at_a_time: hold one model in memory at a time.
    """

    dense: str
    pruned: str
    data: str
    variants: tuple[str, ...]
    restored: str | None = None
    examples: Count = 96
    max_length: Length | None = None
    response_tokens: Count = 128
    soft_examples: Count = 240
    heads: bool = False
    head_examples: Count = 16
    one_at_a_time: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)

    @property
    def all_variants(self) -> tuple[str, ...]:
        """The variants, with ``raw`` first."""
        return tuple(dict.fromkeys((RAW, *self.variants)))

    @property
    def patched(self) -> tuple[str, ...]:
        """The variants to which heads' reactions are measured."""
        return tuple(v for v in self.all_variants if v not in (RAW, SOFT)) if self.heads else ()

    def check(self) -> None:
        """Refuse what can be told before any model is loaded.

        Raises:
            RequestError: unknown variants, data or models; text without prompts; heads without a variant to react to;
                or a restoration of another model.
        """
        check_variants(self.variants)
        if self.heads and not self.patched:
            raise RequestError(
                f"expected written variants that heads react to, got {', '.join(self.variants)}; name others, or leave "
                "--heads out"
            )
        check_data([self.data])
        require_prompts(self.data)
        check_models(self.dense, self.pruned, self.max_length)
        check_restored(self.restored, resolve(self.pruned))


def study_draws(
    request: StudyRequest, run: str | Path, *, seeds: Count = 3, cluster: Cluster | None = None
) -> PromptStudy:
    """Measure how models react to variants of prompts on several draws of examples, and join the studies.

    Every draw's study is kept in ``prompts_SEED.safetensors`` and read again by the same request, whatever the number
    of draws. Where anything else differs (examples, variants, models), the draw is measured again, and the log says so.

    Args:
        run: the run directory, also for the joined study.
        seeds: how many draws.
        cluster: where every draw is a job (see :meth:`~lcc_lens.core.machine.cluster.Cluster.compute`).

    Raises:
        RequestError: see :meth:`StudyRequest.check`; or submitit refuses the options.
        LensError: a job failed.
        InterruptedRun: Ctrl-C while waiting; the jobs go on, and the same call collects them.
    """
    run = Path(run)
    request.check()
    if cluster is not None:
        cluster.check()
    with writing_run(run):
        hashes = pair_hashes(request.dense, request.pruned)
        missing = [seed for seed in range(seeds) if kept_study(request, run, seed, hashes) is None]
        if cluster is not None:
            _submit(request, run, missing, cluster)
        elif missing:
            pair = _loaded(request)
            for seed in missing:
                _measured(request, pair, seed, hashes).save(_file(run, seed))
        studies = [kept_study(request, run, seed, hashes) for seed in range(seeds)]
        study = joined_studies([study for study in studies if study is not None])
        study.save(run)
    return study


def kept_study(request: StudyRequest, run: Path, seed: int, hashes: Mapping[str, str]) -> PromptStudy | None:
    """The study of a draw, if the run has it and it is of this request; the log says what differs otherwise."""
    decides = _decides(request, seed, hashes)
    if not _file(run, seed).exists():
        return None
    study = PromptStudy.load(_file(run, seed))
    changed = [name for name, value in decides.items() if study.record.request.get(name) != value]
    if changed:
        logger.warning("measuring draw %d again: the one in %s has other %s", seed, run, ", ".join(changed))
    return None if changed else study


def _decides(request: StudyRequest, seed: int, hashes: Mapping[str, str]) -> dict[str, str]:
    """Hashes of all that decides the study of a draw, by what a message calls it.

    Reactions of heads that are not asked for do no harm.
    """
    data = _drawn(request, seed)
    parts: dict[str, Any] = {
        "models": hashes,
        "restored models": restored_sha256(request.restored),
        "variants": request.all_variants,
        "examples": (data.name, data.source, data.examples),
        "lengths": (request.max_length, request.response_tokens),
        "versions of lcc-lens": package_version(),
    }
    if SOFT in request.all_variants:
        parts["examples of the soft prompt"] = _training(request, seed).examples
    if request.heads:
        parts["examples of heads"] = request.head_examples
    return {name: fingerprint(part) for name, part in parts.items()}


def compute_draw(request: StudyRequest, run: Path, seed: int) -> None:
    """Measure one draw and keep its study, unless the run has it: what a job does."""
    hashes = pair_hashes(request.dense, request.pruned)
    if kept_study(request, run, seed, hashes) is None:
        _measured(request, _loaded(request), seed, hashes).save(_file(run, seed))


def _submit(request: StudyRequest, run: Path, missing: list[int], cluster: Cluster) -> None:
    """Let a cluster compute the missing draws.

    Raises:
        LensError: some of them failed.
    """
    jobs = {f"draw {seed}": (request, run.resolve(), seed) for seed in missing}
    errors = cluster.compute(run, compute_draw, jobs)
    for name, error in errors.items():
        logger.warning("%s failed: %s; its output is in %s", name, first_line(error), run / JOBS)
    if errors:
        raise LensError(
            f"expected {len(missing)} finished draws, got {len(missing) - len(errors)}; the others are kept, and the "
            "same command tries again"
        )


def _loaded(request: StudyRequest) -> Pair:
    pair = load_pair(request.dense, request.pruned, one_at_a_time=request.one_at_a_time)
    if request.heads:
        require_relative_positions(pair.pruned)  # before a soft prompt is trained
    return pair


def _measured(request: StudyRequest, pair: Pair, seed: int, hashes: Mapping[str, str]) -> PromptStudy:
    soft = None
    if SOFT in request.all_variants:
        soft = fit_soft_prompt(pair, _training(request, seed), max_length=request.max_length, seed=seed)
    study = prompt_study(
        pair, prompt_variants(_drawn(request, seed), request.all_variants, pair.tokenizer), request.restored,
        heads=request.patched, soft_prompt=soft, head_examples=request.head_examples, max_length=request.max_length,
        response_tokens=request.response_tokens,
    )  # fmt: skip
    return replace(study, record=replace(study.record, request=_decides(request, seed, hashes)))


def _drawn(request: StudyRequest, seed: int) -> Data:
    return load_data(request.data, request.examples, role="held-out", seed=seed)


def _training(request: StudyRequest, seed: int) -> Data:
    return load_data(request.data, request.soft_examples, role="train", seed=seed)


def _file(run: Path, seed: int) -> Path:
    return run / f"prompts_{seed}.safetensors"
