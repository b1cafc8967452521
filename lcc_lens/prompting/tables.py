"""Prompts from files and data sets, and their merits as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lcc_lens.core.errors import RequestError
from lcc_lens.data.datasets import load_data
from lcc_lens.models.loading.hooked import LoadedModel
from lcc_lens.prompting.frames import split_prompt
from lcc_lens.prompting.merits import MERITS, Merits, check_prompt, merits
from lcc_lens.prompting.rewriting.preference_files import is_preference_file, read_preferences

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase


def read_prompts(
    name: str, n: int | None = None, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[tuple[str, str | None]]:
    """Prompts without their templates, each with the original that it was rewritten from, if the file has one.

    Args:
        name: a data set, or a file: ``.txt`` (a prompt per paragraph), ``.jsonl``, or preferences (``.json`` or
            ``.jsonl``).
        n: how many at most; of a data set drawn with ``seed``, of a file the first.
        tokenizer: one whose chat template may be around the prompts.

    Raises:
        RequestError: no such data, or none that can be read.
    """
    if is_preference_file(name):
        return [(preference.chosen, preference.prompt) for preference in read_preferences(name)[:n]]
    data = load_data(name, None if Path(name).exists() else n, seed=seed)
    texts = (example.response if data.kind == "text" else example.prompt for example in data.examples[:n])
    return [(split_prompt(text, tokenizer).core, None) for text in texts]


def scored_prompts(
    prompts: Sequence[tuple[str, str | None]], model: LoadedModel | None = None
) -> list[tuple[str, Merits]]:
    """The merits of prompts, each with its original; all are checked before one is scored.

    Raises:
        RequestError: a prompt that cannot be scored; names its number.
    """
    for number, (text, original) in enumerate(prompts, 1):
        try:
            check_prompt(text, original, model)
        except RequestError as error:
            raise RequestError(f"{error} (prompt {number} of {len(prompts)})") from error
    return [(text, merits(text, original, model)) for text, original in prompts]


def merits_table(scored: Sequence[tuple[str, Merits]]) -> pd.DataFrame:
    """One row per prompt: the prompt, its four merits, a model's likelihoods where there are any, what lowers them."""
    import pandas as pd

    extra = [
        name
        for name in ("prompt_log_likelihood", "original_log_likelihood")
        if any(getattr(m, name) is not None for _, m in scored)
    ]
    rows = [
        {"prompt": text, **{name: getattr(found, name) for name in (*MERITS, *extra)}, "lowered": found.reasons}
        for text, found in scored
    ]
    return pd.DataFrame(rows, columns=["prompt", *MERITS, *extra, "lowered"])
