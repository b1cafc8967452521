"""Take a model's path to the logits apart: output projections, norms and the unembedding, each checked by a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lcc_lens.core.heads import Head, check_heads
from lcc_lens.models.architecture.layers import is_transposed
from lcc_lens.models.hooked.copied_weights import WeightLocation, copied_projection_names, copied_weights
from lcc_lens.models.hooked.hooked_transformer import is_hooked_transformer, logit_transform, plain_norm
from lcc_lens.models.hooked.hooks import HookedModel, resid_name, z_adders, z_name
from lcc_lens.models.hooked.offloading import device_of, require_in_memory
from lcc_lens.models.hooked.self_checks import (
    OTHER_OPERATIONS,
    check_tokens,
    is_close,
    run_with_activations,
    unsupported,
)

#: Rows of the unembedding multiplied at a time: the whole of a large one in float32 may not fit beside the model.
_VOCABULARY_BLOCK = 16_384
#: The names of both paths in error messages.
_TO_LOGITS, _TO_STREAM = "from the residual stream to the logits", "from head outputs to the residual stream"
_Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Unembedding:
    r"""A model's final norm and unembedding: $f(a \cdot (W_U\,\mathrm{norm}(x) + b_U))$ of a residual vector $x$.

    $a$ is the architecture's logit multiplier and $f$ its soft cap, if any; TransformerLens' adapter has both as one
    function of the logits (``transform``), whose slope at zero is $a$ (``multiplier``). All in float32.

    Example:
        >>> Unembedding.of(pair.pruned).logits(resid).argmax(-1)  # doctest: +SKIP
    """

    norm: Norm
    weight: Float[Tensor, "d_vocab d_model"]
    bias: Float[Tensor, " d_vocab"]
    transform: Callable[[Tensor], Tensor]
    multiplier: float

    @classmethod
    def of(cls, model: HookedModel) -> Unembedding:
        """Take the final norm and the unembedding from a hooked model.

        Raises:
            LensError: the logits computed from the last residual stream are not the model's.
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
                raise unsupported(_TO_LOGITS, f"an unembedding of shape {tuple(unembed.weight.shape)}")
        except AttributeError as error:
            raise unsupported(_TO_LOGITS, str(error)) from error
        return cls._checked(model, norm, unembed.weight.detach(), getattr(unembed, "bias", None), transform)

    @classmethod
    def _checked(
        cls, model: HookedModel, norm: nn.Module, weight: Tensor, bias: Tensor | None, transform: _Transform
    ) -> Unembedding:
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
        small = torch.tensor(1e-4, dtype=torch.float64)  # a soft cap is a straight line there
        norm_parts = Norm.of(norm, int(model.cfg.d_model), device_of(model))
        unembedding = cls(norm_parts, weight, bias.float(), transform, float(transform(small) / small))
        unembedding._check(model)
        return unembedding

    def logits(self, resid: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample d_vocab"]:
        """All logits of residual vectors, each normalised by itself (Eq. 6)."""
        return self.transform(self._products(self.norm(resid)) + self.bias)

    def logits_of(
        self, resid: Float[Tensor, "*example vector d_model"], tokens: Int[Tensor, "*example choice"]
    ) -> Float[Tensor, "*example vector choice"]:
        """The logits of each example's chosen tokens; the rest of the vocabulary is not computed."""
        rows = self.weight[tokens].float()
        return self.transform(self.norm(resid) @ rows.transpose(-1, -2) + self.bias[tokens][..., None, :])

    def project(self, normed: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample d_vocab"]:
        r"""$a W_U x$ of vectors that are normalised already; without bias and soft cap, so it is linear."""
        return self.multiplier * self._products(normed)

    def _products(self, normed: Tensor) -> Tensor:
        return torch.cat([normed @ block.float().T for block in self.weight.split(_VOCABULARY_BLOCK)], dim=-1)

    def direct(
        self,
        components: Float[Tensor, "component d_model"],
        at: Float[Tensor, "example d_model"],
        tokens: Int[Tensor, "example choice"],
    ) -> Float[Tensor, "example component choice"]:
        r"""The direct effect of residual-stream vectors on the logits of chosen tokens, with the norm's scale fixed.

        $a W_U[token]\,(g \odot Cx) / s$ with $s$ the scale at the actual stream. Linear, so effects add up: the soft
        cap is left out, and so are the bias and the norm's shift, which depend on no vector.

        Args:
            at: the actual residual stream before the final norm.
        """
        rows = self.weight[tokens].float()
        logits = self.norm.linear(components) @ rows.transpose(-1, -2)
        return self.multiplier * logits / self.norm.scale(at)[..., None]

    def _check(self, model: HookedModel) -> None:
        tokens, last = check_tokens(model), resid_name(int(model.cfg.n_layers) - 1)
        logits, activations = run_with_activations(model, tokens, [last])
        resid = activations[last].float()
        if not is_close(self.logits(resid), logits.float(), OTHER_OPERATIONS, model.cfg.dtype):
            raise unsupported(_TO_LOGITS, "logits other than the model's")
        frozen = self.norm.linear(resid) / self.norm.scale(resid) + self.norm.shift
        if not is_close(frozen, self.norm(resid), OTHER_OPERATIONS, model.cfg.dtype):
            raise unsupported(_TO_LOGITS, f"a final norm ({type(self.norm.module).__name__}) of an unknown kind")


@dataclass(frozen=True)
class OutputProjections:
    r"""How a model's heads write into its residual stream: $z \mapsto m\,g \odot C(z W_O[h]) / s$.

    In most architectures this is $z W_O[h]$. Granite multiplies by a constant $m$. Gemma 2 and OLMo 2 normalise the
    attention output before adding it; the scale $s$ of that norm depends on all heads of the layer. :meth:`output` sets
    it to 1 (the final norm removes most of it), and :meth:`scale` returns it.
    """

    projections: tuple[WeightLocation, ...]
    norms: tuple[Norm, ...] | None
    multiplier: float
    n_heads: int
    output_point: str = "attn.o.hook_out"

    @classmethod
    def of(cls, model: HookedModel) -> OutputProjections:
        """Take the output projections, and the norms after attention if any, from a hooked model.

        Raises:
            LensError: a change of a head's output changes the residual stream in another way.
        """
        bridge, d_model, device = cast("Any", model), int(model.cfg.d_model), device_of(model)
        if is_hooked_transformer(model):
            weights = copied_weights(model)
            copies = tuple(weights[name] for name in copied_projection_names(model, "z"))
            return cls(copies, None, 1.0, int(model.cfg.n_heads), "hook_attn_out")._checked(model)
        try:
            modules = tuple(block.attn.o.original_component for block in bridge.blocks)
            projections = tuple(WeightLocation(module, "weight", is_transposed(module)) for module in modules)
            # getattr() of a bridge falls through to transformers' module, which may call another norm by this name
            posts = [block._modules.get("ln1_post") for block in bridge.blocks]
        except AttributeError as error:
            raise unsupported(_TO_STREAM, str(error)) from error
        if any(posts):
            require_in_memory(bridge.original_model, "norms after attention")
        norms = tuple(Norm.of(post.original_component, d_model, device) for post in posts if post is not None)
        config = bridge.original_model.config.get_text_config()
        multiplier = float(getattr(config, "residual_multiplier", 1.0))
        return cls(projections, norms or None, multiplier, int(model.cfg.n_heads))._checked(model)

    def W_O(self, head: Head) -> Float[Tensor, "d_head d_model"]:
        """One head's rows of the output projection, in the weights' format."""
        (head,) = check_heads([head], len(self.projections), self.n_heads)
        projection = self.projections[head.layer]
        rows = projection.matrix(projection.value.detach()).T
        return rows.reshape(self.n_heads, -1, rows.shape[1])[head.head]

    def output(self, head: Head, z: Float[Tensor, "*sample d_head"]) -> Float[Tensor, "*sample d_model"]:
        """What head outputs add to the residual stream, in float32; not divided by the scale of a norm after attention.

        Raises:
            RequestError: the head is not in the model.
        """
        W_O = self.W_O(head).float()
        out = self.multiplier * (z.to(W_O) @ W_O)
        return out if self.norms is None else self.norms[head.layer].linear(out)

    def hook_name(self, layer: int) -> str:
        """The hook point of a layer's attention output, before any norm."""
        return f"blocks.{layer}.{self.output_point}"

    def scale(self, layer: int, attn_out: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample 1"]:
        """The scale by which a layer's attention output is divided; 1 if no norm follows it."""
        return torch.ones_like(attn_out[..., :1]) if self.norms is None else self.norms[layer].scale(attn_out)

    def _checked(self, model: HookedModel) -> OutputProjections:
        """Change the head outputs of the first layer with nonzero weights, and compare the change after it."""
        layer = next((i for i, projection in enumerate(self.projections) if bool(projection.value.any())), None)
        if layer is None:
            return self
        # If attention and MLP read the same residual stream, there is none between them
        mid, post = f"blocks.{layer}.hook_resid_mid", resid_name(layer)
        stream = mid if mid in model.hook_dict else post
        tokens, names = check_tokens(model), [z_name(layer), self.hook_name(layer), stream]
        _, before = run_with_activations(model, tokens, names)
        size = float(before[z_name(layer)].abs().max().clamp_min(1e-3))
        shape = (self.n_heads, before[z_name(layer)].shape[-1])
        step = 4 * size * torch.linspace(-1, 1, shape[0] * shape[1], device=tokens.device).reshape(shape)
        _, after = run_with_activations(model, tokens, names, z_adders({layer: step}))
        out_before, out_after = (activations[self.hook_name(layer)].float() for activations in (before, after))
        rows = torch.stack([step[head] @ self.W_O(Head(layer, head)).float() for head in range(self.n_heads)])
        if not is_close(out_after - out_before, rows.sum(0).expand_as(out_after), OTHER_OPERATIONS, model.cfg.dtype):
            raise unsupported(_TO_STREAM, f"a change other than z W_O in layer {layer}")
        if self.norms is not None:
            out_before, out_after = self.norms[layer](out_before), self.norms[layer](out_after)
        change = (after[stream] - before[stream]).float()
        if not is_close(change, self.multiplier * (out_after - out_before), OTHER_OPERATIONS, model.cfg.dtype):
            raise unsupported(_TO_STREAM, f"a change other than the attention output's in layer {layer}")
        return self


@dataclass(frozen=True)
class Norm:
    r"""The parts of a norm: $\mathrm{norm}(x) = g \odot Cx / s(x) + t$.

    $g$ is the gain, $t$ the shift, $C$ the identity (RMS) or the removal of the mean (LayerNorm), and $s(x)$ the scale,
    the only part that is not linear. All are measured on a float32 copy of the model's module, so that it does not
    matter how the module stores its gain (as $1 + w$, for instance).
    """

    module: nn.Module
    gain: Float[Tensor, " d_model"]
    shift: Float[Tensor, " d_model"]
    is_centred: bool

    @classmethod
    def of(cls, module: nn.Module, d_model: int, device: torch.device) -> Norm:
        """Measure a module's gain, shift and centring with vectors whose normalised form is known."""
        module = copy.deepcopy(module).float()
        # With mean zero RMS norm and LayerNorm agree; with large entries epsilon does not matter
        ripple = 1e3 * (1.0 - 2.0 * (torch.arange(d_model, device=device) % 2))
        if d_model % 2:
            ripple[-3:] = 1e3 * torch.tensor([1.0, 1.0, -2.0], device=device)
        with torch.no_grad():
            shift = module(torch.zeros_like(ripple))
            gain = (module(ripple) - shift) / ripple * ripple.square().mean().sqrt()
            constant = module(torch.ones_like(ripple)) - shift
        return cls(module, gain, shift, bool(constant.abs().max() < 1e-3 * gain.abs().max()))

    def __call__(self, x: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample d_model"]:
        """Normalise as the model does, in float32."""
        with torch.no_grad():
            return cast("Tensor", self.module(x.float()))

    def linear(self, x: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample d_model"]:
        r"""The linear part, $g \odot Cx$."""
        x = x.float()
        return self.gain * (x - x.mean(-1, keepdim=True) if self.is_centred else x)

    def scale(self, at: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample 1"]:
        r"""The scale $s$ of vectors, from the module's output: $|gCx|^2 / (gCx \cdot (norm(x) - t))$."""
        linear = self.linear(at)
        return linear.square().sum(-1, keepdim=True) / (linear * (self(at) - self.shift)).sum(-1, keepdim=True)
