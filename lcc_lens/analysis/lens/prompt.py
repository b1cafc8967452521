"""One prompt in the dense, the pruned and the restored model: next tokens, and what changed in each head."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.analysis.lens.readings import Reading, in_pruned_order, read_text
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import all_heads
from lcc_lens.core.ranges import Count, check_number, ranged
from lcc_lens.data.batches import special_prefix, token_ids
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.pair import Pair

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

#: Next tokens and heads that a printed comparison shows.
_SHOWN = 5


@runtime_checkable
class Applicable(Protocol):
    """A restoration or an injection: inside the block of ``applied_to``, a hooked model computes restored."""

    def applied_to(self, model: HookedModel) -> AbstractContextManager[HookedModel]:
        """Restore a hooked model inside the block."""
        ...


@dataclass(frozen=True)
class PromptComparison:
    """One prompt in several models.

    ``models`` are ``dense``, ``pruned`` and, with a restoration, ``restored``; the first axis of every tensor follows
    them. Heads are the pruned model's. ``norm`` is the length of each head's output, ``difference`` its distance from
    the dense head's at the same token (zero for the dense model itself); both are in units of activations.

    Attributes:
        prompt: the text.
        pieces: its tokens as text.
        models: the names of the models.
        probabilities: of the token after the prompt.
        norm: length of each head's output.
        difference: distance of each head's output from the dense head's.
        patterns: attention patterns; None where a model has no hook point for them.
    """

    made_by: ClassVar[str] = "compare_prompt(pair, prompt)"

    prompt: str
    pieces: tuple[str, ...]
    models: tuple[str, ...]
    probabilities: Float[Tensor, "model d_vocab"]
    norm: Float[Tensor, "model pos layer head"]
    difference: Float[Tensor, "model pos layer head"]
    patterns: Float[Tensor, "model layer head query key"] | None
    tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)

    def change(self, model: str = "pruned", *, position: int | None = None) -> Float[Tensor, "layer head"]:
        r"""Relative change of every head's output, $\sqrt{\sum_t |z - z_{dense}|^2 / \sum_t |z_{dense}|^2}$.

        Args:
            model: ``pruned`` or ``restored``.
            position: one token of the prompt instead of all of them; -1 is the last.

        Raises:
            RequestError: a model or a token that the comparison does not have.
        """
        place = self._place(model)
        n_tokens = len(self.pieces)
        if position is not None and not -n_tokens <= position < n_tokens:
            raise RequestError(f"expected a token from {-n_tokens} to {n_tokens - 1}, got {position}")
        chosen = slice(None) if position is None else [position]
        difference, dense = (x[chosen].square().sum(0) for x in (self.difference[place], self.norm[0]))
        return torch.where(dense > 0, difference / dense.clamp_min(torch.finfo(dense.dtype).tiny), 0.0).sqrt()

    def recovered(self) -> Float[Tensor, "layer head"]:
        r"""Recovered fraction of each head's squared difference, $1 - \sum|\delta_r|^2 / \sum|\delta_p|^2$.

        Negative where the restored head lies farther from the dense one than the pruned head; NaN where pruning changed
        nothing.

        Raises:
            RequestError: there is no restoration.
        """
        restored, pruned = (self.difference[self._place(m)].square().sum(0) for m in ("restored", "pruned"))
        return torch.where(pruned > 0, 1 - restored / pruned, torch.nan)

    def next_tokens(self, k: int = 10) -> pd.DataFrame:
        """Probabilities of the next token: the ``k`` likeliest of each model, sorted by the dense model.

        Returns:
            One row per token, with the columns ``token``, and one per model.

        Raises:
            RequestError: fewer than one token requested.
        """
        import pandas as pd

        rows = next_token_rows(dict(zip(self.models, self.probabilities, strict=True)), self.tokenizer, k)
        return pd.DataFrame(rows, columns=["token", *self.models])

    def table(self) -> pd.DataFrame:
        """One row per head: ``layer``, ``head``, its relative change in each model, over the prompt and at its end.

        Columns: ``pruned`` and ``restored`` (over all tokens), ``pruned_at_end`` and ``restored_at_end`` (at the last
        token, which predicts the next one), and ``recovered``, the fraction of the squared difference.
        """
        import pandas as pd

        heads = all_heads(*self.norm.shape[2:])
        columns = {"layer": [head.layer for head in heads], "head": [head.head for head in heads]}
        changed = self.models[1:]
        values = {name: self.change(name) for name in changed}
        values |= {f"{name}_at_end": self.change(name, position=-1) for name in changed}
        if "restored" in self.models:
            values["recovered"] = self.recovered()
        return pd.DataFrame({**columns, **{name: value.flatten().tolist() for name, value in values.items()}})

    def __repr__(self) -> str:
        tokens = self.next_tokens(_SHOWN).head(_SHOWN)
        lines = [f"PromptComparison of {self.prompt!r}: {len(self.pieces)} tokens in {', '.join(self.models)}"]
        lines += [f"  next   {'token':<14} " + "  ".join(f"{name:>9}" for name in self.models)]
        for row in tokens.to_dict("records"):
            lines.append(f"         {row['token']!r:<14} " + "  ".join(f"{row[name]:>9.1%}" for name in self.models))
        lines += [f"  heads  {'changed most':<14} " + "  ".join(f"{name:>9}" for name in self.models[1:])]
        for row in self._most_changed():
            cells = "  ".join(f"{row[name]:>9.1%}" for name in self.models[1:])
            lines.append(f"         {row['name']:<14} {cells}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        tokens = self.next_tokens(_SHOWN).head(_SHOWN)
        next_rows = [[repr(row["token"]), *(f"{row[m]:.1%}" for m in self.models)] for row in tokens.to_dict("records")]
        head_rows = [[row["name"], *(f"{row[m]:.1%}" for m in self.models[1:])] for row in self._most_changed()]
        return (
            f"<p><code>{escape(self.prompt)}</code>, {len(self.pieces)} tokens</p>"
            + _html_table(["next token", *self.models], next_rows)
            + _html_table(["head changed most", *self.models[1:]], head_rows)
        )

    def _most_changed(self) -> list[dict[str, Any]]:
        """The heads that pruning changed most on this prompt, with their changes."""
        table = self.table().sort_values("pruned", ascending=False, kind="stable").head(_SHOWN)
        return [{**row, "name": f"L{row['layer']:.0f}H{row['head']:.0f}"} for row in table.to_dict("records")]

    def _place(self, model: str) -> int:
        if model not in self.models:
            raise RequestError(f"expected a model of this comparison ({', '.join(self.models)}), got {model!r}")
        return self.models.index(model)


@ranged
def compare_prompt(
    pair: Pair, prompt: str, *, restoration: Applicable | None = None, patterns: bool = True
) -> PromptComparison:
    """Run one prompt through the dense, the pruned and the restored model and compare every head.

    Args:
        pair: the hooked models.
        prompt: the text.
        restoration: a restoration or an injection of the pruned model; without one, two models are compared.
        patterns: whether to keep attention patterns, ``n_layers * n_heads * n_tokens ** 2`` numbers per model.

    Raises:
        RequestError: an empty prompt, one that is longer than the model's context, or a restoration of other weights.

    Example:
        >>> seen = compare_prompt(pair, "The capital of France is", restoration=restoration)  # doctest: +SKIP
        >>> seen.next_tokens(5)  # doctest: +SKIP
        >>> seen.table().sort_values("pruned", ascending=False).head()  # doctest: +SKIP
    """
    restorations = {} if restoration is None else {"restored": restoration}
    return compare_tokens(pair, prompt_tokens(pair, prompt), prompt, restorations, patterns=patterns)


def compare_tokens(
    pair: Pair,
    tokens: Int[Tensor, " pos"],
    prompt: str,
    restorations: Mapping[str, Applicable | None],
    *,
    patterns: bool = True,
    cache: MutableMapping[str, Reading] | None = None,
) -> PromptComparison:
    """The same as :func:`compare_prompt` for a text that is encoded already.

    Args:
        pair: the hooked models.
        tokens: the text.
        prompt: what to call it.
        restorations: restorations of the pruned model by name; None stands for the pruned model as it is.
        patterns: see :func:`compare_prompt`.
        cache: readings of the dense and the pruned model: missing ones are made and stored there.
    """
    readings = {} if cache is None else cache
    if "dense" not in readings:
        readings["dense"] = in_pruned_order(pair, read_text(pair.dense, tokens, patterns=patterns))
    if "pruned" not in readings:
        readings["pruned"] = read_text(pair.pruned, tokens, patterns=patterns)
    found = {name: readings[name] for name in ("dense", "pruned")}
    for name, restoration in restorations.items():
        if restoration is None:
            found[name] = readings["pruned"]
            continue
        with restoration.applied_to(pair.pruned) as restored:
            found[name] = read_text(restored, tokens, patterns=patterns)
    kept = [reading.patterns for reading in found.values() if reading.patterns is not None]
    z = torch.stack([reading.z for reading in found.values()])
    return PromptComparison(
        prompt=prompt,
        pieces=tuple(str(pair.tokenizer.decode([token])) for token in tokens.tolist()),
        models=tuple(found),
        probabilities=torch.stack([reading.probabilities for reading in found.values()]),
        norm=z.norm(dim=-1),
        difference=(z - z[0]).norm(dim=-1),
        patterns=torch.stack(kept) if len(kept) == len(found) else None,
        tokenizer=pair.tokenizer,
    )


def prompt_tokens(pair: Pair, prompt: str) -> Int[Tensor, " pos"]:
    """Encode a prompt behind the tokens that the tokenizer begins every text with; nothing ends it.

    Raises:
        RequestError: it has no token, or more than the model's context.
    """
    ids = special_prefix(pair.tokenizer) + token_ids(pair.tokenizer, prompt)
    if not ids:
        raise RequestError("expected a prompt with at least one token, got none; write some text")
    if len(ids) > pair.context:
        raise RequestError(f"expected a prompt of at most {pair.context} tokens, got {len(ids)}; shorten it")
    return torch.tensor(ids)


def next_token_rows(
    probabilities: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, k: int
) -> list[dict[str, str | float]]:
    """The ``k`` likeliest tokens of every model, sorted by the first one: the token's text, and its probabilities.

    Raises:
        RequestError: fewer than one token requested.
    """
    check_number("k", k, Count)
    first = next(iter(probabilities.values()))
    likely = {int(token) for values in probabilities.values() for token in values.topk(min(k, len(first))).indices}
    order = sorted(likely, key=lambda token: (-float(first[token]), token))
    texts = [str(tokenizer.decode([token])) for token in order]
    return [
        {"token": text, **{name: float(values[token]) for name, values in probabilities.items()}}
        for text, token in zip(texts, order, strict=True)
    ]


def _html_table(columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
