"""Text that the dense model writes itself: data that cover what the model knows and need no data set."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import write_json, write_text
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.machine.memory import release_memory
from lcc_lens.core.reading import read_json
from lcc_lens.data.roles import Role
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.sampling import MAX_REPETITION, SHORTEST, sample_texts

logger = logging.getLogger(__name__)
_ELSEWHERE = "move it, or name another folder to write to"


@dataclass(frozen=True)
class DenseWriter:
    """Samples text from a model and keeps it in files: the ``writer`` of :func:`~lcc_lens.data.datasets.load_data`.

    Args:
        model: reference of the dense model.
        stem: path of the files without ``_<role>_<seed>`` and ``.jsonl`` (the texts) or ``.json`` (their record).
        n: blocks of text to write.
        length: tokens of a block, and of a sampled sequence at most.
        temperature: of the sampling.

    Raises:
        RequestError: a temperature that is not above 0.

    Example:
        >>> writer = DenseWriter("smollm2", Path("out/self_written"), n=128)
        >>> load_data("self", role="train", writer=writer)  # doctest: +SKIP
    """

    model: str | Path
    stem: Path
    n: int
    length: int = 512
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise RequestError(f"expected a temperature above 0, got {self.temperature}; raise it")

    def divided(self, n_parts: int) -> DenseWriter:
        """A writer of so many times fewer blocks."""
        return replace(self, n=-(-self.n // n_parts))

    def write(self, role: Role | None, seed: int) -> tuple[list[str], str]:
        """Texts that no other role gets, and their file; what an earlier call of the same request wrote is read.

        Raises:
            RequestError: sequences too short for a text, or another file in the place of the texts.
        """
        if self.length < SHORTEST:
            raise RequestError(
                f"expected sequences of at least {SHORTEST} tokens for the dense model to write, got {self.length}; "
                "lengthen them"
            )
        path = resolve(self.model)
        request = {
            "dense_sha256": Checkpoint(path).sha256, "n": self.n, "length": self.length,
            "temperature": self.temperature, "role": role, "seed": seed,
        }  # fmt: skip
        file = self.stem.with_name(f"{self.stem.name}_{role or 'any'}_{seed}.jsonl")
        content = _kept(file, request)
        if content is None:
            content = self._sampled(path, file, request)
        return [json.loads(line)["text"] for line in content.splitlines()], str(file)

    def _sampled(self, path: Path, file: Path, request: dict[str, object]) -> str:
        """Sample the texts and write them with a record of the request and their hash."""
        model, tokenizer = load_plain(path), load_tokenizer(path)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        sampled = sample_texts(
            model, tokenizer, self.n * self.length, length=min(self.length, context or self.length),
            temperature=self.temperature, seed=int(fingerprint(request)[:8], 16),
        )  # fmt: skip
        del model
        release_memory()
        if sampled.n_repeated:
            logger.warning(
                "%d of %d texts that the dense model wrote repeated more than %.0f %% of their 4-grams; wrote others",
                sampled.n_repeated, sampled.n_repeated + len(sampled.texts), 100 * MAX_REPETITION,
            )  # fmt: skip
        content = "".join(json.dumps({"text": text}) + "\n" for text in sampled.texts)
        file.parent.mkdir(parents=True, exist_ok=True)
        counts = {"texts": len(sampled.texts), "tokens": sampled.n_tokens, "repeated": sampled.n_repeated}
        # the record first: texts without one are another's
        write_json(file.with_suffix(".json"), {**request, **counts, "sha256": _sha256(content)})
        write_text(file, content)
        return content


def _kept(file: Path, request: dict[str, object]) -> str | None:
    """What the file holds, if its record says the same request and hash; what the program did not write is refused."""
    note = file.with_suffix(".json")
    record = read_json(note, advice=_ELSEWHERE) if note.exists() else {}
    if (note.exists() or file.exists()) and not (isinstance(record, dict) and "dense_sha256" in record):
        raise RequestError(f"expected text that lcc-lens wrote in {file}, got another file; {_ELSEWHERE}")
    if not file.exists():
        return None
    content = file.read_text(encoding="utf-8")
    wanted = {**request, "sha256": _sha256(content)}
    return content if {name: record.get(name) for name in wanted} == wanted else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
