"""Linear probes on contrastive pairs for all heads at once, solved to convergence by Newton's method."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from lcc_lens.analysis.probes.published import LinearProbe
from lcc_lens.core.errors import LensError, RequestError

#: Penalty on the squared weights of standardised features, per training example: 1 % of a feature's variance. Without
#: a penalty, separable examples have no finite minimum.
RIDGE = 1e-2
#: Maximum number of elements in the activations of one chunk of heads, for the CPU's cache.
_CHUNK = 1 << 21


class PairActivations(NamedTuple):
    """A layer's activations of contrastive pairs: the question, and the right and wrong answers."""

    question: Float[Tensor, "head pair d_head"]
    right: Float[Tensor, "head pair d_head"]
    wrong: Float[Tensor, "head pair d_head"]

    def take(self, pairs: Int[Tensor, " chosen"]) -> PairActivations:
        """These pairs only."""
        return PairActivations(*(z[:, pairs.to(z.device)] for z in self))

    def heads(self, chosen: slice | Tensor) -> PairActivations:
        """These heads only."""
        return PairActivations(*(z[chosen] for z in self))

    def to(self, target: Tensor) -> PairActivations:
        """Cast and move to a tensor's format and device."""
        return PairActivations(*(z.to(target) for z in self))

    def examples(self) -> tuple[Float[Tensor, "head example feature"], Bool[Tensor, " example"]]:
        """Rows $[q ; r^+]$ labelled true, then rows $[q ; r^-]$ labelled false."""
        halves = [torch.cat([self.question, answer], dim=-1) for answer in (self.right, self.wrong)]
        n_pairs = self.question.shape[1]
        return torch.cat(halves, dim=1), torch.arange(2 * n_pairs, device=self.question.device) < n_pairs


def correct_fraction(probe: LinearProbe, pairs: PairActivations) -> Float[Tensor, "head pair"]:
    """How many of a pair's two halves each head's probe labels correctly: 0, 1/2 or 1 (probability 0.5 counts as 1)."""
    d_head = pairs.question.shape[-1]
    on_question, on_answer = probe.weight[:, :d_head, None], probe.weight[:, d_head:, None]
    shared = (pairs.question @ on_question)[..., 0] + probe.bias[:, None]
    right, wrong = (shared + (answer @ on_answer)[..., 0] for answer in (pairs.right, pairs.wrong))
    return ((right >= 0).to(shared) + (wrong < 0).to(shared)) / 2


def fit_pair_probes(
    pairs: PairActivations, *, ridge: float = RIDGE, tol: float = 1e-5, max_steps: int = 50
) -> LinearProbe:
    r"""Find the minimum of the penalised cross-entropy of every head's probe.

    With $x^\pm = [q ; r^\pm]$ standardised over the examples (a scale per feature, undone in the result) and $N$ pairs,

    $$\min_{w, b} \frac{1}{2N} \sum_n \log(1 + e^{-(w \cdot x_n^+ + b)}) + \log(1 + e^{w \cdot x_n^- + b})
      + \frac{\rho}{2} |w|^2$$

    by damped Newton steps from zero on many heads at once. Both halves of a pair share $q$, so three quarters of the
    Hessian need one row per pair instead of two. The minimum is unique: no seed, no learning rate. A constant added
    to all of a head's $q$ moves $b$ and nothing else. The same as scikit-learn's ``LogisticRegression`` with
    $C = 1 / (2 N \rho)$ on the standardised features.

    Args:
        ridge: $\rho$; larger where pairs are few and features many.
        tol: stop when the gradient's norm is below this fraction of its norm at zero.
        max_steps: maximum number of Newton steps; heads that do not reach ``tol`` in float32 are solved in float64.

    Raises:
        RequestError: ``ridge`` is not positive.
        LensError: the solver does not converge for a head.
    """
    if not ridge > 0:
        raise RequestError(f"expected a ridge above 0, got {ridge}; separable pairs have no minimum without one")
    n_heads = pairs.question.shape[0]
    per_head = sum(z[0].numel() for z in pairs)
    size = max(1, _CHUNK // max(per_head, 1))
    fitted = [
        _fit_chunk(pairs.heads(slice(first, first + size)), ridge, tol, max_steps) for first in range(0, n_heads, size)
    ]
    return LinearProbe(torch.cat([probe.weight for probe in fitted]), torch.cat([probe.bias for probe in fitted]))


def _fit_chunk(pairs: PairActivations, ridge: float, tol: float, max_steps: int) -> LinearProbe:
    problem = _Newton(pairs, ridge)
    theta, converged = problem.solve(tol, max_steps)
    probe = problem.unstandardised(theta)
    if bool(converged.all()):
        return probe
    if pairs.question.dtype == torch.float64:
        raise LensError(
            f"expected probes that converge within {max_steps} steps, got {int((~converged).sum())} of "
            f"{len(converged)} heads that do not; raise the ridge or check the activations"
        )
    # On the CPU: not every device has float64
    hard = pairs.heads(~converged).to(torch.empty(0, dtype=torch.float64))
    again = _fit_chunk(hard, ridge, tol, max_steps)
    probe.weight[~converged], probe.bias[~converged] = again.weight.to(probe.weight), again.bias.to(probe.bias)
    return probe


class _Newton:
    r"""The penalised cross-entropy of a chunk of heads; $\theta = [w_q ; b ; w_r]$, logits right halves first."""

    def __init__(self, pairs: PairActivations, ridge: float) -> None:
        n_heads, self.n, self.d = pairs.question.shape
        new = pairs.question.new_empty
        self.question, self.answers = new(n_heads, self.n, self.d + 1), new(n_heads, 2 * self.n, self.d)
        self.mean_q, self.inverse_q = _standardise([pairs.question], self.question[..., : self.d])
        self.question[..., self.d] = 1
        self.mean_r, self.inverse_r = _standardise([pairs.right, pairs.wrong], self.answers)
        self.label = torch.cat([new(self.n).fill_(1), new(self.n).fill_(0)])
        self.penalty = new(2 * self.d + 1).fill_(2 * self.n * ridge)
        self.penalty[self.d] = 0
        self.curvature = new(n_heads, 2 * self.d + 1, 2 * self.d + 1)

    def solve(self, tol: float, max_steps: int) -> tuple[Float[Tensor, "head weight"], Bool[Tensor, " head"]]:
        """Step until every head's gradient is small; also returns which heads converged."""
        theta = self.question.new_zeros(self.question.shape[0], 2 * self.d + 1)
        logits = self.logits(theta)
        gradient = self.gradient(theta, logits)
        # With the lower bound, heads with nothing to learn converge: their first gradient is a rounding error
        small = tol * gradient.norm(dim=-1).clamp_min(2 * self.n / 100)
        for _ in range(max_steps):
            converged = gradient.norm(dim=-1) <= small
            if bool(converged.all()):
                break
            factor, _ = torch.linalg.cholesky_ex(self.hessian(logits))
            step = -torch.cholesky_solve(gradient[..., None], factor)[..., 0]
            theta, logits = self.descend(theta, logits, step)
            gradient = self.gradient(theta, logits)
        return theta, gradient.norm(dim=-1) <= small

    def logits(self, theta: Float[Tensor, "head weight"]) -> Float[Tensor, "head example"]:
        shared = torch.bmm(self.question, theta[:, : self.d + 1, None])[..., 0]
        return torch.bmm(self.answers, theta[:, self.d + 1 :, None])[..., 0] + torch.cat([shared, shared], dim=1)

    def value(
        self, theta: Float[Tensor, "head weight"], logits: Float[Tensor, "head example"]
    ) -> Float[Tensor, " head"]:
        return softplus(logits * (1 - 2 * self.label)).sum(-1) + (theta.square() * self.penalty).sum(-1) / 2

    def gradient(
        self, theta: Float[Tensor, "head weight"], logits: Float[Tensor, "head example"]
    ) -> Float[Tensor, "head weight"]:
        residual = torch.sigmoid(logits) - self.label
        by_pair = residual[:, : self.n] + residual[:, self.n :]
        data = [torch.bmm(by_pair[:, None], self.question)[:, 0], torch.bmm(residual[:, None], self.answers)[:, 0]]
        return torch.cat(data, dim=-1) + self.penalty * theta

    def hessian(self, logits: Float[Tensor, "head example"]) -> Float[Tensor, "head weight weight"]:
        probability = torch.sigmoid(logits)
        curvature = (probability * (1 - probability))[..., None]
        weighted = curvature * self.answers
        mixed = self.question.mT @ (weighted[:, : self.n] + weighted[:, self.n :])
        both = (curvature[:, : self.n] + curvature[:, self.n :]) * self.question
        first, result = self.d + 1, self.curvature  # in place: allocating it takes as long as the products
        result[:, :first, :first] = self.question.mT @ both
        result[:, :first, first:] = mixed
        result[:, first:, :first] = mixed.mT
        result[:, first:, first:] = self.answers.mT @ weighted
        result.diagonal(dim1=-2, dim2=-1).add_(self.penalty)
        return result

    def descend(
        self, theta: Float[Tensor, "head weight"], logits: Float[Tensor, "head example"], step: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take the step, halved while a head's loss would rise; as logits are linear, halving needs no product."""
        along, before = self.logits(step), self.value(theta, logits)
        slack = 16 * torch.finfo(before.dtype).eps * before
        length = torch.ones_like(before)
        for _ in range(20):
            rises = self.value(theta + length[:, None] * step, logits + length[:, None] * along) > before + slack
            if not bool(rises.any()):
                break
            length = torch.where(rises, length / 2, length)
        theta = theta + length[:, None] * step
        return theta, self.logits(theta)  # computed again, so that rounding errors do not add up

    def unstandardised(self, theta: Float[Tensor, "head weight"]) -> LinearProbe:
        """The same probe for features that are not standardised."""
        weight = torch.cat([theta[:, : self.d] * self.inverse_q, theta[:, self.d + 1 :] * self.inverse_r], dim=-1)
        bias = theta[:, self.d] - (weight * torch.cat([self.mean_q, self.mean_r], dim=-1)).sum(-1)
        return LinearProbe(weight, bias)


def _standardise(
    parts: list[Float[Tensor, "head pair d_head"]], out: Float[Tensor, "head example d_head"]
) -> tuple[Float[Tensor, "head d_head"], Float[Tensor, "head d_head"]]:
    """Stack the parts with mean 0 and variance 1; returns the mean and the inverse standard deviation.

    Features that differ by rounding errors only become 0.
    """
    mean = torch.stack([part.mean(1) for part in parts]).mean(0)
    rows = out.split(parts[0].shape[1], dim=1)
    for part, row in zip(parts, rows, strict=True):
        torch.sub(part, mean[:, None], out=row)
    spread = out.square().mean(1).sqrt()
    floor = 16 * torch.finfo(out.dtype).eps * (mean.abs() + spread)
    inverse = torch.where(spread > floor, 1 / spread.clamp_min(torch.finfo(out.dtype).tiny), torch.zeros_like(spread))
    out.mul_(inverse[:, None])
    return mean, inverse
