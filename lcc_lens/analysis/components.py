"""Lost components: the directions in which pruning moved each head's output, and how far along them on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.core.showing import Shown


@dataclass(frozen=True, repr=False)
class LostComponents(Shown):
    r"""Differences of every head output along orthogonal directions, largest direction first.

    With the differences $\Delta = Z_{dense} - Z_{pruned} = U S V^T$ of one head (not centred: the mean is the
    signal), row $i$ of ``directions`` is $v_i$, ``singular_values`` holds $S_i$ and ``coefficients`` the mean
    coefficient $\alpha_i = \mathrm{mean}_n(S_i U_{n,i})$. Every $v_i$ is signed so that $\alpha_i \ge 0$.

    An MLP, which is one wide "head" per layer, has its first directions only. Then ``mean`` is the mean difference and
    ``energy`` the sum of all squared singular values, which the stored directions do not determine.

    Reference: RestoreLCC (arXiv 2510.21834), Eqs. 3 and 4.
    """

    made_by: ClassVar[str] = "scan.components"

    directions: Float[Tensor, "layer head component d_head"]
    singular_values: Float[Tensor, "layer head component"]
    coefficients: Float[Tensor, "layer head component"]
    n_samples: int
    mean: Float[Tensor, "layer head d_head"] | None = None
    energy: Float[Tensor, "layer head"] | None = None

    @property
    def d_head(self) -> int:
        """The width of a head, which is also the largest rank."""
        return self.directions.shape[-1]

    @property
    def n_held(self) -> int:
        """The number of stored directions: d_head, or fewer for an MLP."""
        return self.directions.shape[-2]

    @property
    def n_determined(self) -> int:
        """The number of directions that the samples determine; the others are arbitrary, with singular value 0."""
        return min(self.n_samples, self.d_head)

    @property
    def effective_rank(self) -> Float[Tensor, "layer head"]:
        r"""The effective number of directions of the difference, $\exp(-\sum_i p_i \ln p_i)$, $p_i = S_i^2/\sum S^2$.

        Between 1 (one direction) and d_head (equal singular values); 0 if nothing changed. Of the stored directions;
        for MLPs see :attr:`~lcc_lens.analysis.statistics.DifferenceStatistics.effective_rank`.

        Reference: Roy and Vetterli, "The effective rank" (2007), with energies for singular values.
        """
        return effective_rank(self.singular_values)

    def component(self, rank: int | None = None) -> Float[Tensor, "layer head d_head"]:
        r"""The lost component of rank $K$: $c = \sum_{i \le K} \alpha_i v_i$ (Eq. 4).

        Args:
            rank: the number of directions $K$; if not given, all of them, which is the mean difference.

        Raises:
            RequestError: ``rank`` is not within 1 and ``d_head``, or the number of stored directions.
        """
        if rank is None and self.mean is not None:
            return self.mean
        most = self.d_head if self.mean is None else self.n_held
        rank = most if rank is None else rank
        if not 1 <= rank <= most:
            limit = f"d_head = {most}" if self.mean is None else f"the {most} stored directions"
            raise RequestError(f"expected a rank between 1 and {limit}, got {rank}; choose another")
        return torch.einsum("lhk,lhkd->lhd", self.coefficients[..., :rank], self.directions[..., :rank, :])

    def in_random_basis(self, seed: int = 0) -> LostComponents:
        r"""The same mean difference over a random orthonormal basis per head: a control for the directions.

        ``singular_values`` hold the root of the difference's energy along each new direction, so that the total energy
        is unchanged; they are not in order.

        Raises:
            RequestError: not all directions are stored.
        """
        if self.mean is not None:
            raise RequestError(
                f"expected all {self.d_head} directions for a random basis, got the first {self.n_held}; use heads"
            )
        generator = torch.Generator().manual_seed(seed)
        *heads, _, d_head = self.directions.shape
        normal = torch.randn(*heads, d_head, d_head, dtype=torch.float64, generator=generator)
        basis = torch.linalg.qr(normal.to(self.directions.device)).Q
        along = torch.einsum("lhrd,lhkd->lhrk", basis, self.directions.double())
        energy = torch.einsum("lhrk,lhk->lhr", along.square(), self.singular_values.double().square())
        mean = torch.einsum("lhk,lhkd->lhd", self.coefficients.double(), self.directions.double())
        return components_along(basis, energy.sqrt(), mean, self.n_samples)

    def root_mean_square(self) -> Float[Tensor, "layer head"]:
        r"""The size of each head's difference per coordinate, $\sqrt{\sum_i S_i^2 / (N d_{head})}$."""
        energy = self.singular_values.double().square().sum(-1) if self.energy is None else self.energy.double()
        return (energy / (self.n_samples * self.d_head)).sqrt().float()

    def explained_share(self) -> Float[Tensor, "layer head component"]:
        r"""The fraction of the difference within the first $k$ directions, $\sum_{i\le k} S_i^2 / \sum_i S_i^2$."""
        if self.energy is None:
            return explained_share(self.singular_values)
        tiny = torch.finfo(self.energy.dtype).tiny
        return self.singular_values.square().cumsum(-1) / self.energy.clamp_min(tiny)[..., None]


def explained_share(singular_values: Float[Tensor, "*part component"]) -> Float[Tensor, "*part component"]:
    """The fraction of the squared difference within the first k directions; 0 if nothing changed."""
    energy = singular_values.square().cumsum(-1)
    return energy / energy[..., -1:].clamp_min(torch.finfo(energy.dtype).tiny)


def effective_rank(singular_values: Float[Tensor, "*part component"]) -> Float[Tensor, "*part"]:
    """The effective number of directions of the difference (see :attr:`LostComponents.effective_rank`)."""
    energy = singular_values.double().square()
    total = energy.sum(-1)
    share = energy / total.clamp_min(torch.finfo(torch.float64).tiny)[..., None]
    return torch.where(total > 0, torch.special.entr(share).sum(-1).exp(), 0.0).float()


def components_from_moments(
    total: Float[Tensor, "layer head d_head"],
    second_moment: Float[Tensor, "layer head d_head d_head"],
    n_samples: int,
) -> LostComponents:
    r"""Find the lost components from sums over the differences, without storing the differences.

    $\Delta^T \Delta = V S^2 V^T$, so an eigendecomposition of the second moment gives the SVD's $V$ and $S$ exactly,
    and $\alpha_i = v_i \cdot \bar{\delta}$ since $S_i U_{n,i} = \delta_n \cdot v_i$. Memory does not grow with N.

    Args:
        total: $\sum_n \delta_n$ per head.
        second_moment: $\sum_n \delta_n \delta_n^T$ per head.
        n_samples: N, the number of differences summed.

    Returns:
        All ``d_head`` components, in float32. With N < d_head the last ``d_head - N`` directions are arbitrary
        (their singular values and coefficients are zero).
    """
    moment = second_moment.double()
    eigenvalues, eigenvectors = torch.linalg.eigh(moment)
    directions = eigenvectors.flip(-1).transpose(-1, -2)
    mean = total.double() / max(n_samples, 1)
    return components_along(directions, eigenvalues.flip(-1).clamp_min(0).sqrt(), mean, n_samples)


def extract_lost_components(
    z_dense: Float[Tensor, "example layer head d_head"],
    z_pruned: Float[Tensor, "example layer head d_head"],
) -> LostComponents:
    r"""Find the directions in which pruning moved each head's output, from stacked activations.

    The same result as :func:`components_from_moments`, from all activations in memory: the SVD of the stacked
    differences, as in the paper (Eq. 3).

    Args:
        z_dense: head outputs (before the output projection) of the dense model, one row per example.
        z_pruned: the same of the pruned model on the same tokens.

    Example:
        >>> z_dense, z_pruned = torch.randn(100, 3, 5, 6), torch.randn(100, 3, 5, 6)
        >>> lost = extract_lost_components(z_dense, z_pruned)
        >>> bool(torch.allclose(lost.component(), (z_dense - z_pruned).mean(0), atol=1e-5))
        True
    """
    difference = (z_dense.double() - z_pruned.double()).permute(1, 2, 0, 3)
    _, singular_values, directions = torch.linalg.svd(difference, full_matrices=False)
    return components_along(directions, singular_values, difference.mean(-2), z_dense.shape[0])


def components_along(
    directions: Float[Tensor, "layer head component d_head"],
    singular_values: Float[Tensor, "layer head component"],
    mean: Float[Tensor, "layer head d_head"],
    n_samples: int,
) -> LostComponents:
    """Lost components from directions of any sign: each is signed along the mean difference, all in float32."""
    coefficients = torch.einsum("lhkd,lhd->lhk", directions, mean)
    sign = torch.where(coefficients < 0, -1.0, 1.0).to(directions)
    return LostComponents(
        directions=(directions * sign[..., None]).float().contiguous(),
        singular_values=singular_values.float().contiguous(),
        coefficients=(coefficients * sign).float().contiguous(),
        n_samples=n_samples,
    )
