"""The density of a Hessian's eigenvalues, by stochastic Lanczos quadrature (Ghorbani, Krishnan & Xiao 2019).

For each of several random unit vectors v, m steps of Lanczos give a tridiagonal T with eigenvalues theta_i and
eigenvectors y_i. Then  v' f(H) v ~ sum_i y_i[0]^2 f(theta_i),  exactly for polynomials f up to degree 2m - 1, and the
mean over the v is the spectral density's.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsam.arguments import check_integer
from fastsam.sharpness.hessian import (
    GRADIENTS_PER_PRODUCT,
    HessianProduct,
    count_parameters,
    products_of,
    start_vector,
)
from fastsam.sharpness.objective import How, Mode, Objective, Progress
from fastsam.two_pass.module_state import Modules


@dataclass(frozen=True)
class Spectrum:
    """A spectral density as points with weights.

    Attributes:
        nodes: float64 on the CPU, shape [probes, steps]: where the density lies, eigenvalues approximately.
        weights: likewise: how much of it, at least 0; each row has the sum 1.
        parameters: n, the number of eigenvalues that the density stands for.
        products: Hessian-vector products over all samples that it took.
        gradients: what it cost, in gradients of all samples.
    """

    nodes: Tensor
    weights: Tensor
    parameters: int
    products: int
    gradients: float

    def density(self, at: Tensor | Sequence[float], width: float | None = None) -> Tensor:
        """Return the density, smoothed by a Gaussian, as a float64 tensor of the points' shape; its integral is 1.

        Args:
            at: points, of shape [points].
            width: standard deviation of the Gaussian, > 0. Default: a hundredth of the range of the nodes.

        Raises:
            ValueError: width is not above 0.
        """
        if width is None:
            width = max(float(self.nodes.max() - self.nodes.min()) / 100, 1e-12)
        if not width > 0:
            raise ValueError(f"width must be above 0, got {width}")
        points = torch.as_tensor(at, dtype=torch.float64)
        bells = torch.exp(-0.5 * ((points[:, None, None] - self.nodes) / width) ** 2) / (width * (2 * torch.pi) ** 0.5)
        return (bells * self.weights).sum(-1).mean(-1)

    def moment(self, power: int) -> float:
        """Return the estimate of trace(H^power) / n, whose error is that of the random vectors alone below 2 steps."""
        return float((self.weights * self.nodes**power).sum(-1).mean())


def spectrum(
    model: Modules,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    *,
    steps: int = 40,
    probes: int = 4,
    mode: Mode = "eval",
    seed: int = 0,
    sharded: bool | None = None,
    progress: Progress | None = None,
) -> Spectrum:
    """Estimate the density of the eigenvalues of the Hessian of the mean loss over a whole loader.

    It takes `steps` x `probes` Hessian-vector products and holds `steps` vectors of the size of the model, each made
    orthogonal to all before it.

    Args:
        model: as for `hessian_eigenvalues`.
        loss_fn: as there.
        loader: as there.
        steps: m of Lanczos, at least 1; no more than there are parameters are taken.
        probes: random vectors, at least 1.
        mode: as there.
        seed: of the vectors, and of the random numbers in every pass over the loader.
        sharded: as there.
        progress: called after every product with how many are done, and how many there are at most.

    Returns:
        The density as points with weights.

    Raises:
        ValueError: steps or probes below 1, a product is not finite, or what `sam_sharpness` refuses.

    Paper: Ghorbani, Krishnan & Xiao 2019 (https://arxiv.org/abs/1901.10159), Algorithm 1.
    """
    check_integer("steps", steps, 1)
    check_integer("probes", probes, 1)
    # the products know nothing of how many there will be
    how = How(mode, seed, sharded, None if progress is None else lambda done, _: progress(done, steps * probes))
    objective = Objective(model, loss_fn, loader, how)
    steps = min(steps, count_parameters(objective))
    with products_of(objective) as product:
        nodes = torch.zeros(probes, steps, dtype=torch.float64)
        weights = torch.zeros_like(nodes)
        for i in range(probes):
            tridiagonal = _tridiagonal(product, start_vector(objective, i), steps)
            theta, y = torch.linalg.eigh(tridiagonal)
            nodes[i, : len(theta)], weights[i, : len(theta)] = theta, y[0].square()
        return Spectrum(
            nodes, weights, count_parameters(objective), product.count, product.count * GRADIENTS_PER_PRODUCT
        )


def _tridiagonal(product: HessianProduct, v: Tensor, steps: int) -> Tensor:
    """Return Lanczos' tridiagonal matrix, float64 on the CPU; smaller where the vectors span all that v reaches."""
    basis = [v]
    diagonal: list[float] = []
    beside: list[float] = []
    largest = 0.0
    for step in range(steps):
        w = product(basis[-1])
        diagonal.append(float(basis[-1] @ w))
        largest = max(largest, float(w.norm()))
        # twice is enough to be orthogonal to the last bit but one
        vectors = torch.stack(basis)
        for _ in range(2):
            w = w - vectors.T @ (vectors @ w)
        length = float(w.norm())
        if step == steps - 1 or length <= torch.finfo(w.dtype).eps * 10 * largest:
            break
        beside.append(length)
        basis.append(w / length)
    size = len(diagonal)
    off = torch.tensor(beside[: size - 1], dtype=torch.float64)
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
