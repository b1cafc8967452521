"""Head types of several models: the scores of every head, tables, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_tensors, require_made, write_tensors
from lcc_lens.core.heads import all_heads
from lcc_lens.core.outputs.places import refuse_model
from lcc_lens.core.ranges import Count, check_number
from lcc_lens.core.reading import convert, parse_json, reading
from lcc_lens.core.showing import Shown

if TYPE_CHECKING:
    import pandas as pd

HEAD_TYPES_FILE = "head_types.safetensors"
#: Types that a pattern on repeated random tokens shows.
PATTERN_TYPES = ("previous", "duplicate", "induction")
#: What is measured of patterns on text.
MEASURES = ("sink", "entropy", "distance", "total_variation", "jensen_shannon")
#: Those of them that the dense model has none of: how far patterns are from its own.
_FROM_DENSE = MEASURES[-2:]
#: All scores of a head; the last one is of the weights alone.
SCORES = (*PATTERN_TYPES, *MEASURES, "copying")
#: Scores that the dense model's heads have, by which they are ranked.
KINDS = tuple(name for name in SCORES if name not in _FROM_DENSE)
_AGAIN = "compute head types again"


@dataclass(frozen=True)
class HeadTypesRecord:
    """What head types were computed on.

    ``n_texts`` are the sequences of ``data``, on which :data:`MEASURES` are means. ``restoration_sha256`` is the
    ``content_sha256`` of the restoration; an injection, which may be trained on, has none.
    """

    models: tuple[str, ...]
    data: str
    n_sequences: int
    length: int
    seed: int
    dense_sha256: str
    pruned_sha256: str
    n_texts: int | None = None  # an earlier version did not say
    restoration_sha256: str | None = None


@dataclass(frozen=True, repr=False)
class HeadTypes(Shown):
    """Types of every head in several models, with standard errors over sequences.

    The first axis follows ``record.models``: ``dense``, ``pruned`` and, with a restoration, ``restored``.

    Attributes:
        record: what they were computed on.
        value: by name: ``previous``, ``duplicate``, ``induction`` (share of attention on repeated random tokens),
            ``sink``, ``entropy``, ``distance``, ``total_variation``, ``jensen_shannon`` (see
            :func:`~lcc_lens.analysis.head_types.patterns.pattern_measures`), and ``copying``
            (:func:`~lcc_lens.analysis.head_types.copying.copying_scores`).
        stderr: the same for standard errors; NaN for ``copying``, which reads weights alone.
        losses: loss per token in nats on the first and on the second copy of the random tokens.
        in_context: loss on the last quarter of a text minus that on the first quarter, in nats (Olsson et al. 2022).
    """

    made_by: ClassVar[str] = "head_types(pair), or HeadTypes.load(run)"
    record: HeadTypesRecord
    value: Mapping[str, Float[Tensor, "model layer head"]]
    stderr: Mapping[str, Float[Tensor, "model layer head"]]
    losses: Float[Tensor, "model copy"]
    in_context: Float[Tensor, " model"]

    def _facts(self) -> dict[str, Any]:
        names = self.record.models
        strongest = self.value["induction"].flatten(1).max(1).values.tolist()

        def each(values: list[float]) -> str:
            return ", ".join(f"{name} {value:.3g}" for name, value in zip(names, values, strict=True))

        return {
            "strongest induction": each(strongest),
            "loss on a repetition": each(self.losses[:, 1].tolist()),
            "loss late minus early": each(self.in_context.tolist()),
            "patterns on": self.record.data,
        }

    def table(self) -> pd.DataFrame:
        """One row per head: ``layer``, ``head``, and a column per measure and model, such as ``induction_pruned``."""
        import pandas as pd

        heads = all_heads(*self.value["induction"].shape[1:])
        columns: dict[str, Any] = {"layer": [h.layer for h in heads], "head": [h.head for h in heads]}
        for name, values in self.value.items():
            for model, value in zip(self.record.models, values, strict=True):
                if name in KINDS or model != "dense":
                    columns[f"{name}_{model}"] = value.flatten().tolist()
        return pd.DataFrame(columns)

    def strongest(self, kind: str = "induction", n: int = 10) -> pd.DataFrame:
        """The dense model's strongest heads of a type, and what is left of each: one row per head, strongest first.

        Args:
            kind: ``previous``, ``duplicate``, ``induction``, ``sink``, ``entropy``, ``distance`` or ``copying``.
            n: how many heads.

        Raises:
            RequestError: an unknown type, one that the dense model has none of, or fewer than one head.
        """
        if kind not in KINDS:
            raise RequestError(f"expected one of {', '.join(KINDS)}, got {kind!r}; correct the name")
        check_number("n", n, Count)
        columns = ["layer", "head", *(f"{kind}_{model}" for model in self.record.models)]
        table = self.table()[columns].sort_values(f"{kind}_dense", ascending=False, kind="stable").head(n)
        for model in self.record.models[1:]:
            table[f"left_{model}"] = table[f"{kind}_{model}"] / table[f"{kind}_dense"]
        return table.reset_index(drop=True)

    def behaviour(self) -> pd.DataFrame:
        """One row per model: the losses on both copies of random tokens, and the loss late minus early in texts."""
        import pandas as pd

        first, second = self.losses.T.tolist()
        return pd.DataFrame(
            {"model": self.record.models, "first_copy": first, "repetition": second, "in_context": self.in_context}
        )

    def save(self, run: str | Path) -> None:
        """Write ``head_types.safetensors`` into a run directory, atomically.

        Raises:
            RequestError: the folder is a model's.
        """
        refuse_model(Path(run))
        tensors = {f"value.{name}": t for name, t in self.value.items()}
        tensors |= {f"stderr.{name}": t for name, t in self.stderr.items()}
        tensors |= {"losses": self.losses, "in_context": self.in_context}
        write_tensors(Path(run) / HEAD_TYPES_FILE, tensors, {"record": json.dumps(vars(self.record))})

    @classmethod
    def load(cls, run: str | Path) -> HeadTypes:
        """Read what :meth:`save` wrote.

        Raises:
            RequestError: the file is missing, damaged or of another layout.
        """
        path = require_made(Path(run) / HEAD_TYPES_FILE, "HeadTypes.save")
        tensors, metadata = read_tensors(path)
        with reading(path, _AGAIN):
            record = convert(parse_json(metadata["record"], str(path), _AGAIN), HeadTypesRecord, str(path), _AGAIN)
            value, stderr = ({n: tensors[f"{group}.{n}"] for n in SCORES} for group in ("value", "stderr"))
            return cls(record, value, stderr, tensors["losses"], tensors["in_context"])
