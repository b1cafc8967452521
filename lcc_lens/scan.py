"""The scan of a pair: what pruning took from every head, from one streaming pass of each model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lcc_lens.activations import SITES, Positions, Site, check_sites
from lcc_lens.data import Data
from lcc_lens.errors import InterruptedRun, RequestError
from lcc_lens.headmap import HeadMap
from lcc_lens.heads import Head
from lcc_lens.memory import trim_heap
from lcc_lens.pair import Pair
from lcc_lens.passes import ScanPlan, dense_pass, pruned_pass, running_sums
from lcc_lens.progress import track
from lcc_lens.pruning.report import common_pattern
from lcc_lens.pruning.zeros import matrix_zeros, share_of_zeros
from lcc_lens.scan_request import checked_length, pair_sequences, possible_selectors
from lcc_lens.scan_state import ScanState
from lcc_lens.scanned import SCAN_RECORD, SCAN_TENSORS, Scan, ScanRecord
from lcc_lens.selectors import SelectorName
from lcc_lens.selectors.linear_probe import Solver
from lcc_lens.selectors.registry import Evidence, ScoreSettings, check_selectors, score
from lcc_lens.statistics import RunningDifferences
from lcc_lens.token_loss import token_losses

__all__ = ["SCAN_RECORD", "SCAN_TENSORS", "Scan", "ScanRecord", "scan"]

logger = logging.getLogger(__name__)
#: Where a run directory keeps a scan that is not through.
UNFINISHED = ".scan.unfinished"


def scan(
    pair: Pair,
    data: Data,
    *,
    positions: Positions = "all",
    sites: Sequence[Site] = SITES,
    spectra: Sequence[Site] = ("z",),
    selectors: Sequence[SelectorName] | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    probe_rank: int = 1,
    probe_solver: Solver = "newton",
    probe_folds: int | None = None,
    selector_examples: int = 32,
    display: int = 8,
    batch_tokens: int = 1024,
    seed: int = 0,
    run: str | Path | None = None,
) -> Scan:
    """Find what pruning took from every head.

    Both models run over the data in batches of similar length; only sums are kept, and no logits are computed. The
    pruned model reads no further than an activation counts. For questions with right and wrong answers the dense
    model's outputs at the question's end come from the pass over the right answer, and the wrong answer goes on from
    that pass's key-value cache.

    Args:
        pair: the hooked models.
        data: examples; use the role ``probe`` to keep them apart from training.
        positions: where differences are taken: at ``all`` tokens, since an injection acts on all of them and a
            mean over more samples is steadier; at the ``last`` token of the question as in the paper; at the ``end``;
            at those that predict the ``response``; or at chosen positions (negative ones count from the end).
        sites: also compare the MLP's post-activation (``mlp``) and the residual stream (``resid``); heads always.
        spectra: sites whose singular values are wanted, and with them a wide site's first directions, which ``mlp-lcc``
            needs; each costs the square of the site's width in memory.
        selectors: which scores to compute. If not given: those that cost next to nothing on these data. ``kl``,
            ``attribution``, ``gradient`` and ``patching`` run a model again; ``mse`` and ``random`` always come.
        max_length: tokens per example at most, where answers are cut; 512, or the models' context if that is shorter.
        limit: sequences at most (text is cut into many).
        probe_rank: K of the probes' activation editing.
        probe_solver: ``newton``, to convergence, or ``published``, 200 steps of Adam.
        probe_folds: cross-validate the linear probe in so many parts.
        selector_examples: examples for selectors that run the models again.
        display: examples whose loss is kept token by token.
        batch_tokens: tokens per forward pass at most; decides speed and memory.
        seed: of the probes.
        run: a run directory: the scan is saved there, and goes on there after an interruption.

    Raises:
        RequestError: no usable example, fewer than two samples, an unknown name, or a selector that these data or
            models cannot serve.
        LensError: an activation is not finite (names layer and head).
        InterruptedRun: Ctrl-C, after the state was saved.

    Example:
        >>> result = scan(pair, load_data("boolq", n=256, role="probe"))  # doctest: +SKIP
        >>> result.select("probe", share=0.25)[:2]  # doctest: +SKIP
        [Head(layer=0, head=4), Head(layer=1, head=0)]
    """
    check_sites([*sites, *spectra])
    named = None if selectors is None else check_selectors(selectors)
    length = checked_length(pair, max_length)
    right, wrong = pair_sequences(data, pair, length, limit)
    wanted = possible_selectors(named, pair, data, wrong)
    present: tuple[Site, ...] = tuple(site for site in SITES if site == "z" or (site in sites and site in pair.sites))
    plan = ScanPlan(tuple(right), wrong, positions, present, batch_tokens)
    with _state(run, pair, plan, spectra) as state, _interruptible(can_go_on=run is not None):
        work = _Work(pair, plan, [site for site in spectra if site in present], state)
        for _ in track(work.batches(), work.n_batches(), "scan heads"):
            pass
        heads, *others = (work.sums.pop(site).finish() for site in present)  # the sums are large and let go one by one
        if heads.n_samples < 2:
            raise RequestError(f"wanted at least 2 positions to compare, got {heads.n_samples}; scan more examples")
        components = heads.components()
        _warn(heads.n_samples, components.d_head, heads.is_silent.nonzero().tolist())
        settings = ScoreSettings(probe_rank, probe_solver, probe_folds, selector_examples, seed, batch_tokens)
        layers = work.layers if wrong is not None else None
        scores = score(wanted, Evidence(pair, plan.sequences, heads, components, layers, settings))
        result = Scan(
            record=_record(pair, data, plan, heads.n_samples, length, probe_rank if wrong is not None else None, seed),
            heads=heads,
            components=components,
            others=dict(zip(present[1:], others, strict=True)),
            selected_by=dict(scores),
            tokens=token_losses(pair, plan.sequences, display),
        )
        if run is not None:
            result.save(run)
        state.discard()
    return result


@contextmanager
def _interruptible(*, can_go_on: bool) -> Iterator[None]:
    """Say how to go on after Ctrl-C.

    Raises:
        InterruptedRun: Ctrl-C where the work done so far is kept.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if not can_go_on:
            raise
        raise InterruptedRun("scan stopped; finished examples are kept, run the same command again to go on") from stop


@dataclass
class _Work:
    """The passes still to come, batch by batch; everything finished lies in the state."""

    pair: Pair
    plan: ScanPlan
    spectra: Sequence[Site]
    state: ScanState

    def __post_init__(self) -> None:
        self.shards = self.plan.shards()
        self.sums: dict[Site, RunningDifferences] = {}

    def n_batches(self) -> int:
        """How many batches are to come."""
        dense = sum(len(self.plan.dense_batches(self.shards[i])) for i in self._dense_to_come())
        return dense + sum(len(self.plan.pruned_batches(shard)) for shard in self.shards[self.state.n_done :])

    def batches(self) -> Iterator[None]:
        """Do the work; yields after every batch. One model at a time runs over everything before the other."""
        if self.pair.one_at_a_time:
            for number in self._dense_to_come():
                self.state.keep_dense(number, (yield from dense_pass(self.pair, self.plan, self.shards[number])))
        self.sums = running_sums(self.pair.pruned, self.plan.sites, self.spectra)
        self.state.restore(self.sums)
        for number in range(self.state.n_done, len(self.shards)):
            yield from self._shard(number)

    def layers(self) -> Iterator[Any]:
        """The probes' features, in the order of the examples."""
        return self.state.layers([i for shard in self.shards for i in shard], self.pair.n_layers)

    def _shard(self, number: int) -> Generator[None, None, None]:
        shard = self.shards[number]
        dense: dict[str, list[Tensor]]
        if self.pair.one_at_a_time:
            dense = self.state.dense(number)
        else:
            dense = yield from dense_pass(self.pair, self.plan, shard)
        question = yield from pruned_pass(self.pair, self.plan, shard, dense, self.sums)
        features = None
        if question is not None:
            features = {"pruned_question": question, **{name: dense[name] for name in ("question", "right", "wrong")}}
        self.state.finish(self.sums, features)
        trim_heap()

    def _dense_to_come(self) -> list[int]:
        to_come = range(self.state.n_done, len(self.shards))
        return [i for i in to_come if not (self.pair.one_at_a_time and self.state.has_dense(i))]


def _state(run: str | Path | None, pair: Pair, plan: ScanPlan, spectra: Sequence[Site]) -> ScanState:
    digest = hashlib.sha256()
    for sequence in [*plan.sequences, *(plan.wrong or ())]:
        digest.update(f"{sequence.loss_from} {sequence.tokens.tolist()}".encode())
    identity = {
        "models": [pair.dense_id.sha256, pair.pruned_id.sha256, str(pair.dtype)],
        "tokens": digest.hexdigest(),
        "settings": [plan.positions, plan.sites, sorted(spectra), plan.batch_tokens, pair.one_at_a_time],
    }
    return ScanState(None if run is None else Path(run) / UNFINISHED, identity)


def _record(
    pair: Pair, data: Data, plan: ScanPlan, n_samples: int, max_length: int, probe_rank: int | None, seed: int
) -> ScanRecord:
    pattern, sparsity = _zeros(pair)
    mapping = HeadMap((), ()) if pair.head_map.is_identity else pair.head_map
    return ScanRecord(
        dense=pair.dense_id.reference,
        pruned=pair.pruned_id.reference,
        dense_sha256=pair.dense_id.sha256,
        pruned_sha256=pair.pruned_id.sha256,
        data=data.name,
        source=data.source,
        positions=plan.positions,
        n_examples=len(plan.sequences),
        n_samples=n_samples,
        max_length=max_length,
        probe_rank=probe_rank,
        seed=seed,
        groups=tuple(sorted(data.groups)),
        negatives=data.negatives,
        pattern=pattern,
        sparsity=sparsity,
        dense_heads=mapping.dense_heads,
        removed_heads=mapping.removed,
    )


def _zeros(pair: Pair) -> tuple[str, float | None]:
    """Pattern and share of the pruned model's zeros, whoever pruned it."""
    try:
        matrices = matrix_zeros(pair.pruned_id.path)
    except RequestError as error:  # matrices that cannot be told apart (fused experts) keep no one from scanning heads
        logger.info("zeros not counted: %s", error)
        return "", None
    return common_pattern({matrix.pattern for matrix in matrices}), share_of_zeros(matrices)


def _warn(n_samples: int, d_head: int, silent: Iterable[Sequence[int]]) -> None:
    """Say what the data leave open."""
    if n_samples < d_head:
        logger.warning(
            "wanted at least %d samples to determine every direction, got %d: the last %d directions of each head are "
            "arbitrary; all other statistics hold", d_head, n_samples, d_head - n_samples,
        )  # fmt: skip
    heads = [str(Head(layer, head)) for layer, head in silent]
    if heads:
        shown = ", ".join(heads[:8]) + (", ..." if len(heads) > 8 else "")
        logger.warning("%d heads put out nothing but zeros in the pruned model: %s", len(heads), shown)
