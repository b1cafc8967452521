"""Training objectives: response loss, language-model loss, distance from the dense model, or weighted sums."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.core.registry import nearest
from lcc_lens.data.batches import Batch, TokenSequence, batches
from lcc_lens.models.hooked.forward import forward
from lcc_lens.models.hooked.hooks import HookedModel, logits_at, z_readers
from lcc_lens.models.hooked.losses import token_kl_divergence, token_nll
from lcc_lens.models.hooked.offloading import device_of

#: Names of the losses, and the fields that hold their weights.
_FIELDS = {"response": "response", "distillation": "distillation", "heads": "heads", "lm": "text"}
#: Older names that are still accepted.
_ALIASES = {"text": "lm"}
_LARGEST_WEIGHT = 1e9


@dataclass(frozen=True)
class Outputs:
    """A model's logits and, by layer, head outputs at the counted tokens; empty if not requested."""

    logits: Float[Tensor, "token vocab"]
    z: dict[int, Float[Tensor, "counted zwidth"]]


class Source(ABC):
    """Computes a model's outputs in another way than by a whole forward pass."""

    model: HookedModel

    @abstractmethod
    def outputs(
        self, batch: Batch, mask: Bool[Tensor, "batch pos"], hooks: Sequence[Any], *, with_logits: bool, with_z: bool
    ) -> Outputs:
        """The outputs that :func:`run_model` returns."""


class Checkpointed(Source):
    """A model with gradient checkpointing: backward passes recompute every layer's activations."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model

    def outputs(
        self, batch: Batch, mask: Bool[Tensor, "batch pos"], hooks: Sequence[Any], *, with_logits: bool, with_z: bool
    ) -> Outputs:
        return run_model(self.model, batch, mask, hooks, with_logits=with_logits, with_z=with_z, checkpoint_layers=True)


@dataclass(frozen=True)
class Objective:
    r"""A weighted sum of losses, each per counted token.

    The response loss counts the response's tokens. Distillation and head outputs have a target at every token, so they
    also count the prompt's (``prompts``).

    Args:
        response: weight of the response's cross-entropy in nats (the paper's objective).
        distillation: weight of the Kullback-Leibler divergence in nats from the dense model's next-token distribution.
        temperature: flattens both distributions; the divergence is multiplied by its square, so that gradients keep
            their size (Hinton et al., arXiv 1503.02531).
        heads: weight of the squared distance from the dense model's head outputs (``hook_z``) relative to their squared
            size, $\lVert \tilde z_l - z_l \rVert^2 / \lVert z_l \rVert^2$ over all heads of a layer at a token,
            averaged over layers.
        prompts: whether distillation and head outputs count the prompts' tokens.
        text: weight of the language-model loss (``lm``), the cross-entropy in nats of all tokens, prompts included.
    """

    made_by: ClassVar[str] = "Objective.parse('text+distillation')"

    response: float = 1.0
    distillation: float = 0.0
    temperature: float = 1.0
    heads: float = 0.0
    prompts: bool = True
    text: float = 0.0

    def __post_init__(self) -> None:
        weights = tuple(self.weights.values())
        if not (all(weight >= 0 and math.isfinite(weight) for weight in weights) and sum(weights) > 0):
            raise RequestError(f"expected objective weights of at least 0, one above 0, got {weights}; change them")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise RequestError(f"expected a temperature above 0, got {self.temperature}; raise it")

    @classmethod
    def parse(cls, text: str, *, temperature: float = 1.0) -> Objective:
        """Read ``response``, ``lm``, ``distillation``, ``heads``, or several joined by ``+``, weighted (``3*heads``).

        The weights are scaled to a sum of 1. ``text`` is an older name of ``lm``.

        Raises:
            RequestError: another name, a name twice, or a weight that is no number from 0 to a thousand million.
        """
        weights: dict[str, float] = {}
        for part in text.split("+"):
            weight, _, name = part.strip().rpartition("*")
            name = _ALIASES.get(name, name)
            try:
                known = name in _FIELDS and name not in weights
                weights[name] = float(weight) if weight else 1.0
            except ValueError:
                known = False
            if not known or not 0 < weights[name] < _LARGEST_WEIGHT:
                names = ", ".join(_FIELDS)
                raise RequestError(
                    f"expected an objective ({names}, joined by +, as in response+3*heads), got {text!r}; "
                    f"{nearest(name, _FIELDS)}"
                )
        fractions = {name: weights.get(name, 0.0) / sum(weights.values()) for name in _FIELDS}
        return cls(
            fractions["response"], fractions["distillation"], temperature, fractions["heads"], text=fractions["lm"]
        )

    @property
    def weights(self) -> dict[str, float]:
        """The weights by name of the loss."""
        return {name: getattr(self, field) for name, field in _FIELDS.items()}

    @property
    def needs_teacher(self) -> bool:
        """Whether the dense model must run too."""
        return self.distillation > 0 or self.heads > 0

    def counts(self, sequences: Sequence[TokenSequence]) -> dict[str, int]:
        """The number of tokens that every loss with a weight counts in the sequences."""
        response = sum(len(sequence) - sequence.loss_from for sequence in sequences)
        whole = sum(len(sequence) - 1 for sequence in sequences)
        by_teacher = whole if self.prompts else response
        counts = {"response": response, "distillation": by_teacher, "heads": by_teacher, "lm": whole}
        return {name: counts[name] for name, weight in self.weights.items() if weight}

    def longest(self, sequences: Sequence[TokenSequence]) -> int:
        """The length of the longest row of these sequences."""
        return max(map(len, sequences))

    def batches(
        self, sequences: Sequence[TokenSequence], max_tokens: int, longest: int | None = None
    ) -> Sequence[Batch]:
        """Group sequences into batches of at most ``max_tokens`` padded tokens, in rows of at most ``longest``."""
        return batches(sequences, max_tokens=max_tokens, longest=longest)

    def loss(
        self,
        model: HookedModel | Source,
        batch: Batch,
        counts: Mapping[str, int],
        hooks: Sequence[Any] = (),
        teacher: HookedModel | Source | None = None,
    ) -> Tensor:
        """A batch's part of the objective over the sequences whose tokens ``counts`` gives (see :meth:`counts`)."""
        terms = self.terms(model, batch, hooks, teacher)
        return torch.stack([self.weights[name] * term / counts[name] for name, term in terms.items()]).sum()

    def terms(
        self,
        model: HookedModel | Source,
        batch: Batch,
        hooks: Sequence[Any] = (),
        teacher: HookedModel | Source | None = None,
    ) -> dict[str, Tensor]:
        """The unweighted losses with a weight, each summed over a batch's counted tokens, from one pass.

        Raises:
            RequestError: no dense model, or one with other heads.
        """
        if self.needs_teacher and teacher is None:
            raise RequestError("expected the dense model for distillation, got none; pass teacher")
        reads = {"with_logits": bool(self.response or self.distillation or self.text), "with_z": self.heads > 0}
        with_prompts = self.text > 0 or (self.needs_teacher and self.prompts)
        mask = batch.is_followed() if with_prompts else batch.is_target()
        outputs = _outputs(model, batch, mask, hooks, **reads)
        in_response = batch.is_target()[mask].to(outputs.logits.device)
        terms = {}
        if self.response or self.text:
            nll = token_nll(outputs.logits, batch.tokens[:, 1:][mask[:, :-1]].to(outputs.logits.device))
            terms = {"response": nll[in_response].sum()} if self.response else {}
            terms |= {"lm": nll.sum()} if self.text else {}
        if teacher is not None and self.needs_teacher:
            with torch.no_grad():
                dense = _outputs(teacher, batch, mask, (), **{**reads, "with_logits": self.distillation > 0})
            counted = slice(None) if self.prompts else in_response
            if self.distillation:
                logits = dense.logits.to(outputs.logits.device)
                terms["distillation"] = token_kl_divergence(logits, outputs.logits, self.temperature)[counted].sum()
            if self.heads:
                terms["heads"] = _relative_distance(dense.z, outputs.z)[counted].sum()
        return terms


def _outputs(model: HookedModel | Source, batch: Batch, mask: Tensor, hooks: Sequence[Any], **reads: bool) -> Outputs:
    if isinstance(model, Source):
        return model.outputs(batch, mask, hooks, **reads)
    return run_model(model, batch, mask, hooks, **reads)


def run_model(
    model: HookedModel,
    batch: Batch,
    mask: Bool[Tensor, "batch pos"],
    hooks: Sequence[Any],
    *,
    with_logits: bool,
    with_z: bool,
    checkpoint_layers: bool = False,
) -> Outputs:
    """Run a model over a batch.

    Args:
        mask: the counted positions, those before a counted token.
        with_logits: whether to compute logits, at the counted positions only.
        checkpoint_layers: see :func:`~lcc_lens.models.hooked.forward.forward`.
    """
    device = device_of(model)
    mask, z = mask.to(device), {}

    def keep(layer: int, outputs: Tensor) -> None:
        z[layer] = outputs[mask].flatten(1)

    readers = z_readers(range(int(model.cfg.n_layers)), keep) if with_z else []
    narrowed = logits_at(model, mask if with_logits else None)
    every = [*hooks, *readers, *narrowed]
    return Outputs(forward(model, batch.tokens.to(device), every, checkpoint_layers=checkpoint_layers)[0], z)


def _relative_distance(dense: dict[int, Tensor], z: dict[int, Tensor]) -> Float[Tensor, " token"]:
    """The mean over layers of the squared distance relative to the squared size, in float32."""
    if {layer: values.shape for layer, values in dense.items()} != {layer: values.shape for layer, values in z.items()}:
        raise RequestError("expected a model with the dense model's heads to match, got a sliced one; leave heads out")
    ratios = []
    for layer, values in z.items():
        target = dense[layer].to(values.device).float()
        size = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        ratios.append((values.float() - target).square().sum(-1) / size)
    return torch.stack(ratios).mean(0)
