"""The tokens that a vector in a head's output promotes and suppresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.lens.answers import Streams
from lcc_lens.analysis.lens.checks import checked_vector
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.core.ranges import ranged
from lcc_lens.core.showing import Shown
from lcc_lens.models.hooked.direct_path import OutputProjections, Unembedding
from lcc_lens.models.hooked.hooks import HookedModel

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

Side = Literal["promoted", "suppressed"]


@dataclass(frozen=True)
class TokenScore:
    """A token that a vector promotes or suppresses, and by how much in logits."""

    side: Side
    token: int
    text: str
    logit: float


@dataclass(frozen=True, repr=False)
class PromotedTokens(Shown):
    """The tokens that a vector in a head's output promotes and suppresses most; ``reading`` names the method."""

    made_by: ClassVar[str] = "promoted_tokens(model, tokenizer, head, vector)"

    head: Head
    reading: Literal["alone", "direct"]
    tokens: tuple[TokenScore, ...]

    def _facts(self) -> dict[str, Any]:
        sides = ("promoted", "suppressed")
        listed = {side: [f"{t.text!r} {t.logit:+.2f}" for t in self.tokens if t.side == side] for side in sides}
        return {"head": self.head, "reading": self.reading, **listed}

    def table(self) -> pd.DataFrame:
        """One row per token, the strongest of each side first: side, token, text, logit."""
        import pandas as pd

        return pd.DataFrame([vars(token) for token in self.tokens])


@dataclass(frozen=True)
class TokenReader:
    """Converts vectors in head outputs to logits; built and checked once for any number of vectors."""

    projections: OutputProjections
    unembedding: Unembedding

    @classmethod
    def of(cls, model: HookedModel) -> TokenReader:
        """Take the output projections, norms and unembedding from a hooked model."""
        return cls(OutputProjections.of(model), Unembedding.of(model))

    def logits(self, written: Float[Tensor, "*vector d_model"]) -> Float[Tensor, "*vector d_vocab"]:
        """Logits of vectors in the residual stream, without a context (see :func:`promoted_tokens`); 0 for zeros."""
        return self.unembedding.project(self.unembedding.norm(written) - self.unembedding.norm.shift)

    def logits_at(
        self, written: Float[Tensor, "*vector d_model"], layer: int, at: Streams
    ) -> Float[Tensor, "*vector d_vocab"]:
        """Mean change of every logit by vectors of a layer's heads at actual residual streams."""
        norm = self.unembedding.norm
        scale = norm.scale(at.resid) * at.attention_scale[:, layer, None]
        return self.unembedding.project(norm.linear(written) * (1 / scale).mean())


@ranged
def promoted_tokens(
    model: HookedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: Head,
    z_vector: Float[Tensor, " d_head"],
    *,
    k: int = 10,
    at: Streams | None = None,
) -> PromotedTokens:
    r"""The tokens that a vector in a head's output promotes and suppresses most.

    There are two readings. **Alone** (without ``at``): $W_U(\mathrm{norm}(v W_O[h]) - \mathrm{norm}(0))$, Eq. 6 of the
    vector itself, which shows its direction; the norm scales every vector to the same length. **Direct** (with ``at``):
    the norm's scale is that of actual residual streams, averaged over them, which shows how adding the vector changes
    the logits. Both leave out what does not depend on the vector (the unembedding's bias and the norm's shift, which
    would rank frequent tokens first) and the soft cap, which changes no order.

    Args:
        model: the hooked model with W_O and the unembedding.
        tokenizer: its tokenizer.
        head: the head whose output space the vector is in.
        z_vector: for instance a row of ``scan.components.component(1)[head]``.
        k: tokens per side.
        at: residual streams from :func:`answer_streams`.

    Raises:
        RequestError: the head is not in the model, k is out of range, or W_O maps the vector to zero.

    Example:
        >>> said = promoted_tokens(pair.pruned, pair.tokenizer, Head(0, 4), lost[0, 4])  # doctest: +SKIP
        >>> said.table().query("side == 'promoted'")  # doctest: +SKIP

    Reference: RestoreLCC (arXiv 2510.21834), Eq. 6.
    """
    # TransformerLens' logit_readout includes bias and soft cap.
    d_vocab = int(model.cfg.d_vocab)
    if not 1 <= k <= d_vocab:
        raise RequestError(f"expected between 1 and {d_vocab} tokens, got k = {k}; choose another k")
    z_vector = checked_vector(model, z_vector)
    reader = TokenReader.of(model)
    written = reader.projections.output(head, z_vector)
    if not bool(written.any()):
        raise RequestError(
            f"expected a vector that {head}'s output projection uses, got one that it maps to zero; choose another"
        )
    logits = (reader.logits(written) if at is None else reader.logits_at(written, head.layer, at)).cpu()
    highest, lowest = logits.topk(k).indices.tolist(), logits.topk(k, largest=False).indices.tolist()
    sides: dict[Side, list[int]] = {"promoted": highest, "suppressed": lowest}
    tokens = [
        TokenScore(side, index, str(tokenizer.decode([index])), float(logits[index]))
        for side, indices in sides.items()
        for index in indices
    ]
    return PromotedTokens(head, "alone" if at is None else "direct", tuple(tokens))
