"""Data of a comparison: for training, for choosing the best parameters, and for measuring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import TokenSequence
from lcc_lens.data.datasets import Data, encode
from lcc_lens.data.panel import panel_labels
from lcc_lens.data.roles import Role, check_disjoint
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.evaluation.comparison.measures import Measures
from lcc_lens.evaluation.panel import panel_blocks
from lcc_lens.restoration.training_data import is_corpus, load_role, run_writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ComparisonData:
    """Data of a comparison; the held-out part is read once.

    Args:
        config: what all runs share.
        dense: reference of the dense model, which may write some of the text.
        folder: keeps that text.
    """

    def __init__(self, config: CompareConfig, dense: str | Path, folder: Path) -> None:
        self._config, self._dense, self._folder = config, dense, folder
        self._kept: tuple[list[TokenSequence], Measures] | None = None

    def training(self, entry: Entry, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[TokenSequence]:
        """Training examples of a run, drawn by its seed; the control ``shuffled`` gets other prompts' responses.

        Raises:
            RequestError: an example is also held out.
        """
        data = self._load(self._config.examples, "train", seed)
        check_disjoint(data.groups, self._held_out().groups, "training data", "held-out data")
        if entry.control == "shuffled":
            data = data.with_shuffled_responses(seed)
        return encode(data, tokenizer, max_length=self._config.max_length, limit=self._config.examples)

    def probe(self) -> Data:
        """What a pair is scanned on."""
        return self._load(self._config.scan_examples, "probe")

    def validation(self, tokenizer: PreTrainedTokenizerBase) -> list[TokenSequence]:
        """Responses that choose the best parameters."""
        return self._read(tokenizer)[0]

    def measures(self, tokenizer: PreTrainedTokenizerBase) -> Measures:
        """The data for measuring, which nothing else uses."""
        return self._read(tokenizer)[1]

    def _load(self, n: int, role: Role, seed: int = 0) -> Data:
        writer = run_writer(self._dense, self._folder, n, self._config.max_length)
        return load_role(self._config.data, n, role, seed, writer)

    def _held_out(self) -> Data:
        return self._load(self._config.validation + self._config.responses, "held-out")

    def _read(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenSequence], Measures]:
        if self._kept is not None:
            return self._kept
        config = self._config
        n_held_out, data = config.validation + config.responses, self._held_out()
        held_out = encode(data, tokenizer, max_length=config.max_length, limit=n_held_out)
        validation, responses = held_out[: config.validation], held_out[config.validation :]
        chose = frozenset() if is_corpus(config.data) else data.groups
        if config.data in config.tasks or is_corpus(config.data):  # what is measured must choose nothing
            other = self._load(config.validation, "calibration")
            validation = encode(other, tokenizer, max_length=config.max_length, limit=config.validation)
            responses = held_out
        if not responses:
            raise RequestError(
                f"expected more than {config.validation} held-out responses in {config.data}, got {len(held_out)}: so "
                "many choose the best parameters, the others are measured; add data"
            )
        blocks = panel_blocks(
            tokenizer, config.texts, blocks=config.blocks, length=config.block_length, without=chose
        )  # fmt: skip
        texts = {label: blocks[name] for name, label in panel_labels(config.texts).items() if name in blocks}
        self._kept = validation, Measures(texts, responses, config.tasks, config.limit)
        return self._kept
