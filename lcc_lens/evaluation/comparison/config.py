"""Settings that all runs of a comparison share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lcc_lens.analysis.selectors.names import DEFAULT_SELECTOR
from lcc_lens.analysis.selectors.registry import check_selectors
from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Count, Length, Natural, Share, check_numbers
from lcc_lens.data.checks import or_mix
from lcc_lens.data.panel import available_panel, panel_labels
from lcc_lens.data.registry import require_dataset
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.pruning.calibration.texts import REFIT_DATA, REFIT_SAMPLES
from lcc_lens.restoration.settings import TRAIN_DATA

#: Settings that only say what is measured; two runs that differ in nothing else share their training.
MEASURING = ("texts", "blocks", "block_length", "tasks", "limit", "speed_rounds")


def default_data() -> str:
    """What is trained on where nothing is named."""
    return "+".join(or_mix(TRAIN_DATA))


@dataclass(frozen=True)
class CompareConfig:
    """Settings that all runs of a comparison share.

    Args:
        data: what is trained on, in ``examples`` examples of at most ``max_length`` tokens; ``alpaca`` if not given, or
            ``mix`` where that cannot be had.
        validation: held-out responses that choose the best parameters. If ``data`` is also one of the ``tasks``, whose
            held-out items are measured, calibration responses choose instead.
        responses: other held-out responses, which are measured.
        texts: domains, measured in ``blocks`` held-out blocks of ``block_length`` tokens each; the first gives the main
            perplexity. The panel that can be had (see :data:`~lcc_lens.data.panel.PANEL`) if not given.
        tasks: measured zero-shot on their first ``limit`` items.
        scan_examples: examples of the scan that chooses ``heads``, a fraction, by ``selector``.
        low_rank: rank of the method ``low-rank``; ``lora_rank`` that of the adapters.
        lofit_share: fraction of the heads that LoFiT chooses.
        refit_data: calibration data of refits, in ``refit_samples`` sequences.
        speed_rounds: timed rounds of inference at the end; 0 for none.

    Raises:
        RequestError: no text, two of the same name, an unknown data set or selector, or a number out of range.
    """

    data: str = field(default_factory=default_data)
    examples: Count = 480
    validation: Count = 24
    responses: Count = 96
    texts: tuple[str, ...] = field(default_factory=available_panel)
    blocks: Count = 8
    block_length: Length = 512
    tasks: tuple[str, ...] = ()
    limit: Count | None = 200
    max_length: Length = 256
    scan_examples: Count = 96
    heads: Share = 1.0
    selector: str = DEFAULT_SELECTOR
    batch_size: Count = 8
    epochs: Count = 1
    low_rank: Count = 16
    lora_rank: Count = 8
    lofit_share: Share = 0.2
    refit_data: tuple[str, ...] = field(
        default_factory=lambda: or_mix(*REFIT_DATA, told=False)
    )  # not every comparison refits
    refit_samples: Count = REFIT_SAMPLES
    speed_rounds: Natural = 15

    @property
    def needed_selector(self) -> str:
        """The selector that scans compute; for all heads any score serves, and ``mse`` is free."""
        return self.selector if self.heads < 1 else "mse"

    def fitting(self, context: int | None) -> CompareConfig:
        """The same with lengths that a model reads; a default is cut to its context.

        Raises:
            RequestError: a length that is not the default is longer than the context.
        """
        lengths: dict[str, Any] = {}
        for name in ("max_length", "block_length"):
            default, length = getattr(CompareConfig, name), getattr(self, name)
            lengths[name] = fitting_length(None if length == default else length, context, default=default)
        return replace(self, **lengths)

    def __post_init__(self) -> None:
        check_numbers(self)
        check_selectors([self.selector])
        if not self.texts:
            raise RequestError("expected at least one text to measure perplexity on, got none; name one")
        for name in (self.data, *self.texts):
            require_dataset(name)
        panel_labels(self.texts)
