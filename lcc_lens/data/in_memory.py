"""Prompts given as strings, in place of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lcc_lens.core.errors import RequestError
from lcc_lens.data.datasets import Data
from lcc_lens.data.prompts import Example
from lcc_lens.data.registry import DATASETS
from lcc_lens.data.user_files import is_data_file


def as_data(data: Data | str | Path | Sequence[str]) -> Data:
    """The data, or prompts as data: every string is one sequence, of which every token after the first counts.

    Args:
        data: data of :func:`~lcc_lens.data.datasets.load_data`, a prompt, or several prompts.

    Raises:
        RequestError: no prompt, something else than strings, or the name of a data set.

    Example:
        >>> len(as_data(["The capital of France is", "2 + 2 ="]))
        2
    """
    if isinstance(data, Data):
        return data
    data = str(data) if isinstance(data, Path) else data
    prompts = [data] if isinstance(data, str) else list(data)
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise RequestError(f"expected data of load_data, or prompts as strings, got {data!r:.60}; name some prompts")
    if isinstance(data, str) and (data in DATASETS or is_data_file(data)):
        raise RequestError(f"expected prompts, got the name of data, {data!r}; pass load_data({data!r}, role='probe')")
    examples = tuple(Example("", prompt, group=prompt) for prompt in prompts)
    return Data(f"{len(prompts)} prompts", "instruction", examples, "given as strings")
