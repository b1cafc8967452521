"""How a dense, a pruned and a restored model react to variants of the same prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_sealed, require_made, write_sealed
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.metrics import bootstrap_interval
from lcc_lens.core.reading import convert, parse_json, reading
from lcc_lens.core.registry import nearest
from lcc_lens.core.showing import Shown
from lcc_lens.data.prompts import Example
from lcc_lens.prompting.variants import RAW

if TYPE_CHECKING:
    import pandas as pd

STUDY = "prompts.safetensors"
_AGAIN = "measure again"
_HEADS = "heads."


@dataclass(frozen=True)
class StudyRecord:
    """What a study was measured on: references and hashes of the weights, data, and hashes of the examples.

    ``request`` holds a hash of everything that decided a kept draw, by name; it is empty in any other study.
    """

    dense: str
    pruned: str
    dense_sha256: str
    pruned_sha256: str
    restored: str | None
    data: str
    source: str
    models: tuple[str, ...]
    variants: tuple[str, ...]
    groups: tuple[str, ...]
    response_tokens: int
    version: str
    request: dict[str, str] = field(default_factory=dict)

    def shared(self) -> StudyRecord:
        """What studies that are joined have in common; hashes tell models, whose paths may differ."""
        return replace(self, dense="", pruned="", restored=None, groups=(), request={})


@dataclass(frozen=True, repr=False)
class PromptStudy(Shown):
    """Log-likelihoods of the same responses after every variant of their prompts, in two or three models. Frozen.

    Args:
        record: what was measured.
        log_likelihood: mean over the response's tokens, nats.
        words: words and numbers of every prompt.
        is_right: whether the right answer is likelier than the wrong one; None for data without wrong answers.
        reactions: by variant the change of each response's log-likelihood when one head of the pruned model, run on the
            raw prompt, gets its output from the run on the variant.

    Gains are differences from the raw prompt of the same example, so all intervals are paired (95 %, bootstrap over
    examples; NaN for a single one).
    """

    made_by: ClassVar[str] = "prompt_study(pair, variants), or PromptStudy.load(file)"

    record: StudyRecord
    log_likelihood: Float[Tensor, "model variant example"]
    words: Int[Tensor, "variant example"]
    is_right: Bool[Tensor, "model variant example"] | None = None
    reactions: dict[str, Float[Tensor, "measured layer head"]] = field(default_factory=dict)

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants, in the order of the tensors."""
        return self.record.variants

    @property
    def models(self) -> tuple[str, ...]:
        """``dense``, ``pruned``, and ``restored`` if there is one."""
        return self.record.models

    def gain(self, model: str, variant: str) -> Float[Tensor, " example"]:
        """By how much the response is likelier than after the raw prompt, nats per token; above 0 is better."""
        values = self.log_likelihood[self._model(model)].double()
        return values[self._variant(variant)] - values[self._variant(RAW)]

    def table(self) -> pd.DataFrame:
        """One row per variant: words, losses, gains and accuracies of every model, and how the gains differ.

        Columns: ``loss_M`` (nats per response token), ``gain_M`` with its interval ``gain_M_low`` and ``gain_M_high``,
        ``accuracy_M`` (data with wrong answers), and ``pruned_minus_dense``, the gain on the pruned model less that on
        the dense one: a prompt that helps the dense model as much does not restore anything.
        """
        import pandas as pd

        rows = []
        for place, variant in enumerate(self.variants):
            row: dict[str, Any] = {"variant": variant, "words": float(self.words[place].double().mean())}
            row |= {
                f"loss_{m}": -float(self.log_likelihood[i, place].double().mean()) for i, m in enumerate(self.models)
            }
            for model in self.models:
                row |= _estimate(f"gain_{model}", self.gain(model, variant))
            row |= _estimate("pruned_minus_dense", self.gain("pruned", variant) - self.gain("dense", variant))
            if self.is_right is not None:
                right = self.is_right[:, place].double().mean(-1).tolist()
                row |= {f"accuracy_{m}": value for m, value in zip(self.models, right, strict=True)}
            rows.append(row)
        return pd.DataFrame(rows)

    def sensitivity(self) -> pd.DataFrame:
        """One row per model: how much a response's log-likelihood varies with the prompt.

        The standard deviation over variants, averaged over examples, with its interval; and ``over_dense``, by how much
        it exceeds the dense model's, paired by example.

        Raises:
            RequestError: a single variant.
        """
        import pandas as pd

        if len(self.variants) < 2:
            raise RequestError(f"expected at least 2 variants to compare, got {self.variants[0]}; measure others too")
        spread = self.log_likelihood.double().std(1)
        rows = [
            {"model": m, **_estimate("sensitivity", spread[i]), **_estimate("over_dense", spread[i] - spread[0])}
            for i, m in enumerate(self.models)
        ]
        return pd.DataFrame(rows)

    def interaction(self) -> pd.DataFrame:
        """One row per variant: the prompt's gain on the restored model less its gain on the pruned one.

        0: prompt and restoration add up. Below 0: they recover the same; above: each helps the other. ``both`` is
        what the variant and the restoration bring together over the raw prompt on the pruned model.

        Raises:
            RequestError: the study has no restored model.
        """
        import pandas as pd

        restored, pruned = self.log_likelihood[self._model("restored")], self.log_likelihood[self._model("pruned")]
        rows = []
        for place, variant in enumerate(self.variants):
            together = restored[place].double() - pruned[self._variant(RAW)].double()
            effect = self.gain("restored", variant) - self.gain("pruned", variant)
            rows.append({"variant": variant, **_estimate("interaction", effect), **_estimate("both", together)})
        return pd.DataFrame(rows)

    def heads(self, variant: str) -> HeadScores:
        """How each head of the pruned model reacts to a variant, nats per response token, with standard errors.

        The pruned model runs on the raw prompt; one head's output at the last token of the prompt and after is replaced
        by its output in the run on the variant. Above 0: this head makes the response likelier.

        Raises:
            RequestError: reactions to this variant were not measured.
        """
        if variant not in self.reactions:
            raise RequestError(
                f"expected a variant with measured heads ({', '.join(self.reactions) or 'none'}), got {variant!r}; "
                "name it in heads"
            )
        return HeadScores.from_examples("reaction", self.reactions[variant], {"variant": variant})

    def save(self, path: str | Path) -> None:
        """Write one file, atomically: ``prompts.safetensors`` in a folder, or the named ``.safetensors``."""
        tensors: dict[str, Tensor] = {"log_likelihood": self.log_likelihood, "words": self.words}
        if self.is_right is not None:
            tensors["is_right"] = self.is_right
        tensors |= {f"{_HEADS}{name}": effects for name, effects in self.reactions.items()}
        write_sealed(_file(path), tensors, {"record": json.dumps(asdict(self.record))})

    @classmethod
    def load(cls, path: str | Path) -> PromptStudy:
        """Read what :meth:`save` wrote.

        Raises:
            RequestError: the file is missing or changed.
        """
        file = require_made(_file(path), "lcc-lens prompts")
        tensors, metadata = read_sealed(file)
        record = convert(parse_json(metadata.get("record", ""), str(file), _AGAIN), StudyRecord, str(file), _AGAIN)
        names = [name for name in tensors if name.startswith(_HEADS)]
        reactions = {name.removeprefix(_HEADS): tensors.pop(name) for name in names}
        with reading(file, _AGAIN):
            return cls(record, **tensors, reactions=reactions)

    def _facts(self) -> dict[str, Any]:
        record = self.record
        facts: dict[str, Any] = {
            "models": ", ".join(self.models),
            "examples": f"{len(record.groups)} of {record.data}",
            "words": "gain, nats per response token, in " + ", ".join(self.models),
        }
        for variant in self.variants:
            gains = (f"{float(self.gain(model, variant).mean()):+.3f}" for model in self.models)
            facts[variant] = "  ".join(gains)
        return facts

    def _model(self, name: str) -> int:
        if name not in self.models:
            raise RequestError(
                f"expected a model of this study ({', '.join(self.models)}), got {name!r}; measure one with restored="
            )
        return self.models.index(name)

    def _variant(self, name: str) -> int:
        if name not in self.variants:
            known = ", ".join(self.variants)
            raise RequestError(
                f"expected a variant of this study ({known}), got {name!r}; {nearest(name, self.variants)}"
            )
        return self.variants.index(name)


def example_key(example: Example) -> str:
    """A short hash of an example, which tells it from all others; wrong answers depend on what else was drawn."""
    return fingerprint(example.group, example.prompt, example.response)[:16]


def joined_studies(studies: Sequence[PromptStudy]) -> PromptStudy:
    """Join studies of the same models and variants over other examples; an example that two share counts once.

    The restored models may differ, as those of other seeds do.

    Raises:
        RequestError: other models, variants or responses.
    """
    if len({fingerprint(study.record.shared()) for study in studies}) > 1:
        raise RequestError("expected studies of the same models, variants and data, got others; measure them again")
    groups: dict[str, tuple[int, int]] = {}
    for number, study in enumerate(studies):
        for place, group in enumerate(study.record.groups):
            groups.setdefault(group, (number, place))
    chosen = [[place for number, place in groups.values() if number == n] for n in range(len(studies))]

    def whole(parts: Sequence[Tensor], axis: int) -> Tensor:
        picked = []
        for part, rows in zip(parts, chosen, strict=True):
            there = [row for row in rows if row < part.shape[axis]]  # heads may be measured on fewer examples
            picked.append(part.index_select(axis, torch.tensor(there, dtype=torch.long)))
        return torch.cat(picked, axis)

    right = [study.is_right for study in studies if study.is_right is not None]
    common = [name for name in studies[0].reactions if all(name in study.reactions for study in studies)]
    reactions = {name: whole([study.reactions[name] for study in studies], 0) for name in common}
    return PromptStudy(
        replace(studies[0].record, groups=tuple(groups), request={}),
        whole([study.log_likelihood for study in studies], 2),
        whole([study.words for study in studies], 1),
        whole(right, 2) if len(right) == len(studies) else None,
        reactions,
    )


def _estimate(name: str, values: Float[Tensor, " example"]) -> dict[str, float]:
    low, high = bootstrap_interval(values.tolist()) if len(values) > 1 else (nan, nan)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / STUDY
