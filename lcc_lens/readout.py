"""The way from a residual stream to logits: the final norm, the unembedding and what follows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lcc_lens.hooked_transformer import is_hooked_transformer, logit_transform, plain_norm
from lcc_lens.hooks import HookedModel, resid_name
from lcc_lens.models import device_of
from lcc_lens.norm import Norm
from lcc_lens.wiring import is_close, probe_tokens, run_keeping, unknown_way

#: Rows of the vocabulary that are multiplied at once: a large one in float32 need not fit beside the model.
_VOCABULARY_BLOCK = 16_384
_Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Readout:
    r"""A model's own way from a residual vector to logits: $f(a \cdot (W_U\,\mathrm{norm}(x) + b_U))$.

    $a$ is the architecture's logit multiplier and $f$ its soft cap, if any; TransformerLens' adapter has both as one
    function of the logits (``transform``), whose slope at zero is $a$ (``multiplier``). All in float32.

    Example:
        >>> readout = Readout.of(pair.pruned)  # doctest: +SKIP
        >>> readout.logits(resid).argmax(-1)  # doctest: +SKIP
    """

    norm: Norm
    weight: Float[Tensor, "d_vocab d_model"]
    bias: Float[Tensor, " d_vocab"]
    transform: Callable[[Tensor], Tensor]
    multiplier: float

    @classmethod
    def of(cls, model: HookedModel) -> Readout:
        """Take the final norm, the unembedding and what follows it from a hooked model, and check them.

        Raises:
            LensError: the logits computed from the last residual stream are not the model's own.
        """
        bridge, d_model = cast("Any", model), int(model.cfg.d_model)
        if is_hooked_transformer(model):
            norm, transform = plain_norm(bridge.ln_final, bridge.cfg.eps), logit_transform(model)
            weight, bias = bridge.unembed.W_U.detach().T, bridge.unembed.b_U
            return cls._checked(model, norm, weight, bias, transform)
        try:
            norm, unembed = bridge.ln_final.original_component, bridge.unembed.original_component
            transform = bridge.adapter.apply_output_logits_transform
            if tuple(unembed.weight.shape[1:]) != (d_model,):
                raise unknown_way("to the logits", f"an unembedding of shape {tuple(unembed.weight.shape)}")
        except AttributeError as error:
            raise unknown_way("to the logits", str(error)) from error
        return cls._checked(model, norm, unembed.weight.detach(), getattr(unembed, "bias", None), transform)

    @classmethod
    def _checked(
        cls, model: HookedModel, norm: nn.Module, weight: Tensor, bias: Tensor | None, transform: _Transform
    ) -> Readout:
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
        small = torch.tensor(1e-4, dtype=torch.float64)  # a soft cap is a straight line there
        norm_parts = Norm.of(norm, int(model.cfg.d_model), device_of(model))
        readout = cls(norm_parts, weight, bias.float(), transform, float(transform(small) / small))
        readout._check(model)
        return readout

    def logits(self, resid: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample d_vocab"]:
        """All logits of residual vectors, each normalised by itself (Eq. 6)."""
        normed = self.norm(resid)
        blocks = [normed @ block.float().T for block in self.weight.split(_VOCABULARY_BLOCK)]
        return self.transform(torch.cat(blocks, dim=-1) + self.bias)

    def logits_of(
        self, resid: Float[Tensor, "*example vector d_model"], tokens: Int[Tensor, "*example choice"]
    ) -> Float[Tensor, "*example vector choice"]:
        """The logits of chosen tokens only, every example's own; the rest of the vocabulary is not computed."""
        rows = self.weight[tokens].float()
        return self.transform(self.norm(resid) @ rows.transpose(-1, -2) + self.bias[tokens][..., None, :])

    def project(self, normed: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample d_vocab"]:
        r"""$a W_U x$ of vectors that are normalised already: no norm, no bias, no soft cap, hence linear."""
        blocks = [normed @ block.float().T for block in self.weight.split(_VOCABULARY_BLOCK)]
        return self.multiplier * torch.cat(blocks, dim=-1)

    def direct(
        self,
        components: Float[Tensor, "component d_model"],
        at: Float[Tensor, "example d_model"],
        tokens: Int[Tensor, "example choice"],
    ) -> Float[Tensor, "example component choice"]:
        r"""What components of a residual stream add to the logits of chosen tokens, the norm's scale held fixed.

        $a W_U[token]\,(g \odot Cx) / s$ with $s$ the scale at the actual stream. Linear, so that components add up: the
        soft cap, which comes after, is left out, and so are the bias and the norm's shift, which no component makes.

        Args:
            components: vectors in the residual stream.
            at: the actual residual stream before the final norm.
            tokens: every example's tokens.
        """
        rows = self.weight[tokens].float()
        return (
            self.multiplier * (self.norm.linear(components) @ rows.transpose(-1, -2)) / self.norm.scale(at)[..., None]
        )

    def _check(self, model: HookedModel) -> None:
        tokens, last = probe_tokens(model), resid_name(int(model.cfg.n_layers) - 1)
        run, seen = run_keeping(model, tokens, [last])
        resid, expected = seen[last].float(), run.float()
        got = self.logits(resid)
        if got.shape != expected.shape or not is_close(got, expected, model):
            raise unknown_way("to the logits", "other logits than the model's own")
        frozen = self.norm.linear(resid) / self.norm.scale(resid) + self.norm.shift
        if not is_close(frozen, self.norm(resid), model):
            raise unknown_way("to the logits", f"a final norm ({type(self.norm.module).__name__}) of another kind")
