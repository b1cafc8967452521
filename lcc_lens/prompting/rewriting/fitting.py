"""Fit a rewriter to preferences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from lcc_lens.core.config import package_version
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.outputs.places import RESUMED, writing_run
from lcc_lens.core.progress import track
from lcc_lens.core.ranges import ranged
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.pair import Pair
from lcc_lens.prompting.rewriting.preference_files import Preference, check_preferences
from lcc_lens.prompting.rewriting.preference_training import (
    PreferenceObjective,
    PreferenceSequence,
    preference_sequences,
    reward_margins,
)
from lcc_lens.prompting.rewriting.preferences import Preferences, Target, is_dense
from lcc_lens.prompting.rewriting.rewriter import REWRITER, Rewriter, RewriterRecord, new_adapter, trained_parameters
from lcc_lens.prompting.rewriting.settings import LONGEST, RewriterSettings
from lcc_lens.restoration.injections.adapters import AdapterInjection
from lcc_lens.restoration.training.config import Step, TrainConfig
from lcc_lens.restoration.training.loop import train
from lcc_lens.restoration.training.state import CHECKPOINT
from lcc_lens.restoration.training.validation import validation_loss


@ranged
def fit_rewriter(
    pair: Pair,
    preferences: Preferences,
    *,
    settings: RewriterSettings | None = None,
    target: Target = "pruned",
    run: str | Path | None = None,
    resume: bool = False,
) -> Rewriter:
    r"""Train an adapter of the dense model to write the chosen version of a prompt rather than the rejected one.

    Direct preference optimisation of a LoRA on the query and value projections, through the training loop of
    restorations: checkpoints, resuming, several processes. The reference is the same model with the adapter detached.
    The parameters with the lowest held-out loss are kept, the initial ones included; every tenth prompt is held out.

    Args:
        pair: the models; the dense one writes.
        preferences: pairs of versions (see :func:`~lcc_lens.prompting.rewriting.preferences.preference_pairs`).
        target: the model that the pairs were measured on, for the record and for ranking.
        run: a folder for ``checkpoint.safetensors`` and ``rewriter.safetensors``; earlier ones are replaced.
        resume: go on from the checkpoint; the result has the same bits as without an interruption.

    Raises:
        RequestError: fewer than two prompts, equal texts, only longer pairs, no such projections, or nothing to resume.
        LensError: no gradient reaches the adapter.
        InterruptedRun: Ctrl-C; the state was saved.

    Example:
        >>> rewriter = fit_rewriter(pair, preferences, settings=RewriterSettings(lr=1e-4, steps=200))  # doctest: +SKIP

    Reference:
        Rafailov et al. (arXiv 2305.18290); MePO's settings (arXiv 2505.09930).
    """
    is_dense(target)  # refuses another one
    check_preferences(preferences.pairs)
    settings = settings or RewriterSettings()
    folder = None if run is None else Path(run)
    model, objective = pair.dense, PreferenceObjective(beta=settings.beta)
    adapter = new_adapter(model, settings)
    length = fitting_length(settings.max_length, pair.context, default=LONGEST)
    training, held_out = (
        preference_sequences(model, pair.tokenizer, part, length) for part in _split(preferences.pairs)
    )
    if settings.steps is not None:
        training = list(islice(cycle(training), settings.steps * settings.batch_size))
    config = TrainConfig(
        epochs=settings.epochs if settings.steps is None else 1, batch_size=settings.batch_size, lr=settings.lr,
        seed=settings.seed, objective=objective,
    )  # fmt: skip
    identity = fingerprint(pair.dense_id.sha256, pair.pruned_id.sha256, target, settings, preferences.pairs)
    with writing_run(folder, again=RESUMED):
        if not resume:
            _remove_earlier(folder)
        steps = _trained(model, adapter, training, held_out, config, folder, resume, identity)
        record = _record(pair, adapter, preferences, held_out, objective, settings, target, steps)
        tensors = {name: value.detach().cpu().clone() for name, value in trained_parameters(adapter).items()}
        rewriter = Rewriter(record, tensors)
        if folder is not None:
            rewriter.save(folder)
    return rewriter


def _remove_earlier(folder: Path | None) -> None:
    """Remove the rewriter and the checkpoint that a new training replaces: an unfinished one has no rewriter."""
    for file in () if folder is None else (folder / REWRITER, folder / CHECKPOINT):
        file.unlink(missing_ok=True)


def _record(
    pair: Pair,
    adapter: AdapterInjection,
    preferences: Preferences,
    held_out: Sequence[PreferenceSequence],
    objective: PreferenceObjective,
    settings: RewriterSettings,
    target: Target,
    steps: int,
) -> RewriterRecord:
    """What was trained, with the held-out loss before and after."""
    losses = [validation_loss(pair.dense, part, held_out, objective=objective) for part in (None, adapter)]
    correct = reward_margins(pair.dense, adapter, held_out, objective) > 0
    return RewriterRecord(
        model=pair.dense_id.reference, model_sha256=pair.dense_id.sha256, pruned=pair.pruned_id.reference,
        target=target, pairs=len(preferences), preferences_sha256=fingerprint(preferences.pairs), settings=settings,
        steps=steps, first_loss=losses[0], best_loss=losses[1], accuracy=float(correct.float().mean()),
        version=package_version(),
    )  # fmt: skip


def _trained(
    model: HookedModel,
    adapter: AdapterInjection,
    training: Sequence[PreferenceSequence],
    held_out: Sequence[PreferenceSequence],
    config: TrainConfig,
    run: Path | None,
    resume: bool,
    identity: str,
) -> int:
    """Train the adapter in place; returns the number of the last step."""
    n_steps = config.n_steps(len(training))
    steps = train(model, adapter, training, held_out, config, run=run, resume=resume, identity=identity)
    last = n_steps
    for step in track(steps, n_steps, "fit rewriter"):
        _require_gradients(adapter, step)
        last = step.step
    return last


def _require_gradients(adapter: AdapterInjection, step: Step) -> None:
    """Refuse a training that is dead: some published logs have a gradient of 0 from early on."""
    if not any(p.grad is not None and bool(p.grad.any()) for p in trained_parameters(adapter).values()):
        raise LensError(
            f"expected gradients in the rewriter's adapter, got none at step {step.step} (loss {step.loss:.4f}); lower "
            "the learning rate or check the pairs"
        )


def _split(pairs: Sequence[Preference]) -> tuple[list[Preference], list[Preference]]:
    """Training and held-out pairs, which share no prompt."""
    prompts = sorted({preference.prompt for preference in pairs}, key=fingerprint)
    if len(prompts) < 2:
        raise RequestError(
            f"expected preferences of at least 2 prompts to train and validate on, got {len(prompts)}; add some"
        )
    held_out = set(prompts[::10])
    return [p for p in pairs if p.prompt not in held_out], [p for p in pairs if p.prompt in held_out]
