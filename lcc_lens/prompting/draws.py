"""Studies of several draws of examples, each measured once, here or by a job of a cluster, and joined."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lcc_lens.core.errors import LensError, first_line
from lcc_lens.core.machine.cluster import JOBS, Cluster
from lcc_lens.core.outputs.places import writing_run
from lcc_lens.core.ranges import Count, Length, check_numbers
from lcc_lens.data.checks import check_data
from lcc_lens.data.datasets import Data, load_data
from lcc_lens.models.pair import Pair, check_models, load_pair
from lcc_lens.prompting.measuring import check_restored, prompt_study
from lcc_lens.prompting.soft_prompt import fit_soft_prompt
from lcc_lens.prompting.study import PromptStudy, joined_studies
from lcc_lens.prompting.variants import RAW, SOFT, check_variants, prompt_variants
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
            RequestError: unknown variants, data or models.
        """
        check_variants(self.variants)
        check_data([self.data])
        check_models(self.dense, self.pruned, self.max_length)
        check_restored(self.restored)


def study_draws(
    request: StudyRequest, run: str | Path, *, seeds: Count = 3, cluster: Cluster | None = None
) -> PromptStudy:
    """Measure how models react to variants of prompts on several draws of examples, and join the studies.

    Every draw's study is kept in ``prompts_SEED.safetensors``, and read again if it is of the same request.

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
            pair = load_pair(request.dense, request.pruned, one_at_a_time=request.one_at_a_time)
            for seed in missing:
                _measured(request, pair, seed).save(_file(run, seed))
        studies = [kept_study(request, run, seed, hashes) for seed in range(seeds)]
        study = joined_studies([study for study in studies if study is not None])
        study.save(run)
    return study


def kept_study(request: StudyRequest, run: Path, seed: int, hashes: Mapping[str, str]) -> PromptStudy | None:
    """The study of a draw, if the run has it."""
    if not _file(run, seed).exists():
        return None
    study = PromptStudy.load(_file(run, seed))
    is_whole = set(request.patched) <= set(study.reactions) and study.record.answers(
        hashes, _drawn(request, seed), request.all_variants, request.restored, request.response_tokens
    )
    return study if is_whole else None


def compute_draw(request: StudyRequest, run: Path, seed: int) -> None:
    """Measure one draw and keep its study, unless the run has it: what a job does."""
    if kept_study(request, run, seed, pair_hashes(request.dense, request.pruned)) is None:
        pair = load_pair(request.dense, request.pruned, one_at_a_time=request.one_at_a_time)
        _measured(request, pair, seed).save(_file(run, seed))


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


def _measured(request: StudyRequest, pair: Pair, seed: int) -> PromptStudy:
    soft = None
    if SOFT in request.all_variants:
        training = load_data(request.data, request.soft_examples, role="train", seed=seed)
        soft = fit_soft_prompt(pair, training, max_length=request.max_length, seed=seed)
    return prompt_study(
        pair, prompt_variants(_drawn(request, seed), request.all_variants), request.restored, heads=request.patched,
        soft_prompt=soft, head_examples=request.head_examples, max_length=request.max_length,
        response_tokens=request.response_tokens,
    )  # fmt: skip


def _drawn(request: StudyRequest, seed: int) -> Data:
    return load_data(request.data, request.examples, role="held-out", seed=seed)


def _file(run: Path, seed: int) -> Path:
    return run / f"prompts_{seed}.safetensors"
