"""Restoration of one pair: check, encode, build the injection, choose a learning rate, train, measure, freeze."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.config import package_version
from lcc_lens.core.errors import RequestError
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.heads import Head, HeadLike
from lcc_lens.core.machine.processes import wait_for_all
from lcc_lens.core.metrics import learned_warning
from lcc_lens.core.outputs.places import RESUMED, writing_run
from lcc_lens.core.progress import track
from lcc_lens.core.ranges import ranged
from lcc_lens.data.batches import sequences_sha256
from lcc_lens.data.datasets import Data
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.losses import sequence_loss
from lcc_lens.models.hooked.offloading import in_step_if_sharded
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.checks import check_request
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.constants import Start
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.methods import HeadSearch
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.record import RestorationRecord
from lcc_lens.restoration.refitted import refit_origin
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.run_folder import RunFolder
from lcc_lens.restoration.settings import LOW_RANK, RestoreSettings, with_preset
from lcc_lens.restoration.training.config import Step, TrainConfig
from lcc_lens.restoration.training.loop import train
from lcc_lens.restoration.training.lr_range import range_test
from lcc_lens.restoration.training.state import learning_rates
from lcc_lens.restoration.training.tracking import Log, check_log, training_log
from lcc_lens.restoration.training.validation import validation_loss
from lcc_lens.restoration.training_data import training_sequences

logger = logging.getLogger(__name__)


@ranged
def restore(
    pair: Pair,
    scan: Scan | None,
    heads: Sequence[HeadLike],
    data: Data,
    *,
    method: str | MethodSpec = "lcc",
    config: TrainConfig | None = None,
    validation: Data | None = None,
    rank: int | None = None,
    mlp_rank: int | None = None,
    low_rank: int | None = None,
    start: Start = "zero",
    max_length: int | None = None,
    limit: int | None = None,
    shuffle_responses: bool = False,
    tune_lr: bool = False,
    exportable: bool = True,
    run: str | Path | None = None,
    resume: bool = False,
    on_step: Callable[[Step], None] | None = None,
    log: Log | None = None,
    before_refit: str | Path | None = None,
) -> Restoration:
    """Train a constant per chosen head and keep the best (Eq. 8), or restore by another method or a control.

    ``rank`` to ``exportable`` are documented at :class:`~lcc_lens.restoration.settings.RestoreSettings`.

    Args:
        pair: the hooked models; ``scan``: their scan, for methods that need one; ``heads``: the heads to act on.
        data: training examples (role ``train``); ``validation``: held-out ones of the same kind, by default a tenth of
            the training groups. ``mean-shift`` uses only the latter.
        method: one of :data:`~lcc_lens.restoration.injections.methods.METHODS`, or several joined by ``+``.
        config: training settings; the method's own objective and learning rate where none are given.
        run: the run directory, where everything is written; ``resume``: go on from its checkpoint.
        on_step: called after every step; ``log``: ``"trackio"``, or an object with ``log(metrics, step=...)``.
        before_refit: the pruned model that the pair's was refitted from: recovery is counted from its loss.

    Raises:
        RequestError: an unknown method, a scan of other weights, a model whose checkpoint cannot hold the result, data
            that overlap, or nothing to resume.
        InterruptedRun: Ctrl-C, after the state was saved.

    Example:
        >>> restore(pair, scan, scan.select("mse", share=0.25), load_data("alpaca", n=480))  # doctest: +SKIP
    """
    spec = MethodSpec.parse(method)
    settings = RestoreSettings(
        rank, mlp_rank, low_rank, start, max_length, limit, shuffle_responses, tune_lr, exportable
    ).fitting(pair.context).completed(spec)  # fmt: skip
    steps = _Steps(pair, scan, heads, spec, with_preset(config, spec), settings, before_refit, log)
    steps.check()
    folder, inputs = None if run is None else Path(run), [pair.dense_id.path, pair.pruned_id.path]
    with in_step_if_sharded(pair.dense, pair.pruned), writing_run(folder, inputs=inputs, again=RESUMED):
        steps.encode(data, validation)
        steps.open_folder(run, resume=resume)
        steps.build_injection()
        steps.choose_learning_rate()
        steps.train(on_step)
        return steps.freeze()


class _Steps:
    """One restoration under way: the steps of :func:`restore`, in their order."""

    def __init__(
        self,
        pair: Pair,
        scan: Scan | None,
        heads: Sequence[HeadLike],
        spec: MethodSpec,
        config: TrainConfig,
        settings: RestoreSettings,
        before_refit: str | Path | None,
        log: Log | None,
    ) -> None:
        self.pair, self.scan, self.heads, self.log = pair, scan, [Head.of(head) for head in heads], log
        self.spec, self.config, self.settings, self.before_refit = spec, config, settings, before_refit

    def check(self) -> None:
        """Refuse what cannot be served, before any work."""
        check_log(self.log)
        check_request(self.pair, self.scan, self.heads, self.spec, self.config, self.settings)
        if self.spec.preset.on_refit and self.before_refit is None:
            raise RequestError(
                f"expected a model that was refitted for {self.spec.name}; call lcc.restore_models, which refits first"
            )

    def encode(self, data: Data, validation: Data | None) -> None:
        """Tokenise training and held-out data; a preset that chooses its heads trains for that here."""
        shuffle = self.config.seed if self.settings.shuffle_responses else None
        self.data = data
        self.training, self.held_out = training_sequences(
            self.pair, self.scan, data, validation, self.settings.max_length, self.settings.limit, shuffle
        )
        self.teacher = self.pair.dense if self.config.objective.needs_teacher else None
        if self.spec.preset.choose_heads is not None:
            search = HeadSearch(
                self.pair.pruned, self.pair.output_projections, self.heads, self.training, self.held_out,
                replace(self.config, lr=None), self.teacher,
            )  # fmt: skip
            self.heads = self.spec.preset.choose_heads(search)

    def open_folder(self, run: str | Path | None, *, resume: bool) -> None:
        """Open the run directory; a resumed run finds there what it measured before its first step."""
        # by content, so that a run may be moved, and its models and data named otherwise
        scanned = None if self.scan is None else self.scan.record.without_places()
        before = None if self.before_refit is None else Checkpoint(resolve(self.before_refit)).sha256
        tokens = [sequences_sha256(part) for part in (self.training, self.held_out)]
        models = [self.pair.dense_id.sha256, self.pair.pruned_id.sha256, str(self.pair.dtype)]
        self.inputs = [models, scanned, self.data.groups, tokens, package_version()]
        self.kept = {
            "method": self.spec.text, **asdict(self.settings), "heads": [str(head) for head in self.heads]
        }  # fmt: skip
        tune_lr = self.kept.pop("tune_lr")
        self.kept.pop("exportable")
        request = fingerprint(self.inputs, self.config, self.kept, tune_lr, before)
        self.folder = RunFolder(run, self.pair, self.data.source, self.config.seed, resume=resume)
        self.folder.keep_scan(self.scan)
        self.beginning = self.folder.beginning(request)

    def build_injection(self) -> None:
        """Build what is trained. One model at a time: the dense one's loss is measured before the pruned one loads."""
        self.losses = dict(self.beginning.losses)
        if self.pair.one_at_a_time and not self.losses:
            self.losses["dense"] = self._loss(self.pair.dense)
        rank, mlp_rank, low_rank = self.settings.rank, self.settings.mlp_rank, self.settings.low_rank or LOW_RANK
        inputs = Ingredients.of(
            self.pair, self.scan, self.heads, sequences=self.training, rank=rank, mlp_rank=mlp_rank,
            low_rank=low_rank, start=self.settings.start, seed=self.config.seed,
        )  # fmt: skip
        self.injection = self.spec.build(inputs)

    def choose_learning_rate(self) -> None:
        """Try learning rates if asked, and measure both models before the first step, unless a resumed run did."""
        if not self.beginning.losses:
            tested = None
            if self.settings.tune_lr and self.injection.n_trained:
                tested = range_test(
                    self.pair.pruned, self.injection, self.training, self.held_out, self.config, teacher=self.teacher
                )
            self.beginning = replace(self.beginning, losses=self._unrestored_losses(), lr_range=tested)
        self.losses, tested = dict(self.beginning.losses), self.beginning.lr_range
        if tested is not None:
            self.config = replace(self.config, lr=tested.best)
        self.kept = {
            **asdict(self.config), **self.kept, "learning_rates": learning_rates(self.injection, self.config.lr),
            "lr_range": None if tested is None else tested.by_rate,
        }  # fmt: skip
        self.folder.begin(self.kept, self.beginning)

    def train(self, on_step: Callable[[Step], None] | None) -> None:
        """Train the injection, every step logged; it ends with the parameters of the lowest held-out loss."""
        models = {"dense": self.pair.dense_id.reference, "pruned": self.pair.pruned_id.reference}
        about = {**models, "data": self.data.source, **self.kept}
        with training_log(self.log, self.folder.root, about, resume=self.folder.resumes) as tracked:
            if self.injection.n_trained:
                tested, n_steps = self.beginning.lr_range, self.config.n_steps(len(self.training))
                steps = train(
                    self.pair.pruned, self.injection, self.training, self.held_out, self.config, teacher=self.teacher,
                    run=self.folder.root, resume=self.folder.resumes, identity=fingerprint(self.inputs, self.kept),
                    first_loss=None if tested is None else tested.start_loss,
                )  # fmt: skip
                for step in track(steps, n_steps, "restore"):
                    self.folder.add(step)
                    tracked.add(step)
                    if on_step is not None:
                        on_step(step)
            self.losses["restored"] = self._loss(self.pair.pruned, self.injection)
            tracked.finish(self.losses)

    def freeze(self) -> Restoration:
        """Freeze the injection with its record, and write it."""
        data, n_examples, n_trained = self.data.name, len(self.training), self.injection.n_trained
        if self.scan is not None and not n_trained and not self.spec.needs_sequences:  # it was taken from the scan
            data, n_examples = self.scan.record.data, self.scan.record.n_examples
        dense, pruned = self.pair.dense_id, self.pair.pruned_id
        record = RestorationRecord(
            dense.reference, pruned.reference, dense.sha256, pruned.sha256, self.spec.text, data, n_examples,
            self.config.seed, self.kept, self.losses, n_trained=n_trained,
            preset=self.spec.preset_name,
            refit=None if self.before_refit is None else refit_origin(self.before_refit, self.pair.pruned_id.path),
        )  # fmt: skip
        restoration = Restoration.of(self.injection, record)
        self.pair.require_unchanged()
        if self.injection.n_trained and (warning := learned_warning(self.losses)):
            logger.warning("%s", warning)
        self.folder.finish(restoration, len(self.held_out))
        wait_for_all()
        return restoration

    def _loss(self, model: HookedModel, injection: Injection | None = None) -> float:
        return validation_loss(model, injection, self.held_out, self.config.micro_tokens)

    def _unrestored_losses(self) -> dict[str, float]:
        """The losses that a restoration starts from, in nats per response token."""
        dense = self.losses["dense"] if self.losses else self._loss(self.pair.dense)
        losses = {"dense": dense, "pruned": self._loss(self.pair.pruned)}
        if self.before_refit is not None:
            pruned = sequence_loss(load_plain(resolve(self.before_refit)), self.held_out)["loss"]
            losses |= {"pruned": pruned, "refitted": losses["pruned"]}
        return losses
