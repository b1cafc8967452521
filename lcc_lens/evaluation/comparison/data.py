"""Data of a comparison: for training, for choosing the best parameters, and for measuring."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import TokenSequence
from lcc_lens.data.datasets import Data, check_disjoint, encode, load_data
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.evaluation.comparison.measures import Measures


class ComparisonData:
    """Data of a comparison; the held-out part is read once.

    Args:
        config: what all runs share.
    """

    def __init__(self, config: CompareConfig) -> None:
        self._config = config
        self._kept: tuple[list[TokenSequence], Measures] | None = None

    def training(self, entry: Entry, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[TokenSequence]:
        """Training examples of a run, drawn by its seed; the control ``shuffled`` gets other prompts' responses.

        Raises:
            RequestError: an example is also held out.
        """
        data = load_data(self._config.data, self._config.examples, role="train", seed=seed)
        check_disjoint(data.groups, self._held_out().groups, "training data", "held-out data")
        if entry.control == "shuffled":
            data = data.with_shuffled_responses(seed)
        return encode(data, tokenizer, max_length=self._config.max_length)

    def validation(self, tokenizer: PreTrainedTokenizerBase) -> list[TokenSequence]:
        """Responses that choose the best parameters."""
        return self._read(tokenizer)[0]

    def measures(self, tokenizer: PreTrainedTokenizerBase) -> Measures:
        """The data for measuring, which nothing else uses."""
        return self._read(tokenizer)[1]

    def _held_out(self) -> Data:
        return load_data(self._config.data, self._config.validation + self._config.responses, role="held-out")

    def _read(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenSequence], Measures]:
        if self._kept is not None:
            return self._kept
        config = self._config
        held_out = encode(self._held_out(), tokenizer, max_length=config.max_length)
        validation, responses = held_out[: config.validation], held_out[config.validation :]
        if config.data in config.tasks:  # a measured task must not choose the parameters
            data = load_data(config.data, config.validation, role="calibration")
            validation, responses = encode(data, tokenizer, max_length=config.max_length), held_out
        if not responses:
            raise RequestError(
                f"expected more than {config.validation} held-out responses in {config.data}, got {len(held_out)}: so "
                "many choose the best parameters, the others are measured; add data"
            )
        texts = {
            Path(text).stem: encode(
                load_data(text, role="held-out"), tokenizer, max_length=config.block_length, limit=config.blocks
            )
            for text in config.texts
        }
        self._kept = validation, Measures(texts, responses, config.tasks, config.limit)
        return self._kept
