"""What all cells of a comparison share."""

from __future__ import annotations

from dataclasses import dataclass

from lcc_lens.analysis.selectors.names import SelectorName
from lcc_lens.core.errors import RequestError
from lcc_lens.pruning.jobs import REFIT_DATA, REFIT_SAMPLES

#: Settings that only say what is measured: cells that differ in them alone were trained alike.
MEASURING = ("texts", "blocks", "block_length", "tasks", "limit", "speed_rounds")


@dataclass(frozen=True)
class CompareConfig:
    """What every cell shares.

    ``examples`` train; ``validation`` held-out responses choose the best numbers (calibration ones, where ``data`` is
    one of the ``tasks``, whose held-out items are measured), ``responses`` others are measured;
    ``texts`` are of another kind than the training data, in ``blocks`` of ``block_length`` tokens each, the first being
    the main figure; ``tasks`` are measured zero-shot on their first ``limit`` items. ``refit_data`` calibrates refits.
    Inference is timed at the end in ``speed_rounds`` rounds (not at all if 0).
    """

    data: str = "alpaca"
    examples: int = 480
    validation: int = 24
    responses: int = 96
    texts: tuple[str, ...] = ("wikitext", "c4")
    blocks: int = 16
    block_length: int = 512
    tasks: tuple[str, ...] = ()
    limit: int | None = 200
    max_length: int = 256
    scan_examples: int = 96
    heads: float = 1.0
    selector: SelectorName = "mse"
    batch_size: int = 8
    epochs: int = 1
    low_rank: int = 16
    lora_rank: int = 8
    lofit_share: float = 0.2
    refit_data: tuple[str, ...] = REFIT_DATA
    refit_samples: int = REFIT_SAMPLES
    speed_rounds: int = 15

    def __post_init__(self) -> None:
        if not self.texts:
            raise RequestError("expected at least one text to measure perplexity on, got none; name one")
