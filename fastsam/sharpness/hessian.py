"""Eigenvalues of the Hessian of the mean loss, by products with vectors: H v = grad (grad L . v) (Pearlmutter 1994)."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsam.arguments import check_integer, check_number
from fastsam.sharpness.objective import How, Mode, Objective, Progress, count_batches, wide
from fastsam.two_pass.module_state import Modules

GRADIENTS_PER_PRODUCT = 3.0
"""A product is a gradient, and a backward through its forward and its backward, which costs as much as two more."""


@dataclass(frozen=True)
class HessianEigenvalues:
    """The largest eigenvalues of a Hessian, and how they were found.

    Attributes:
        values: k of them, the largest first, in units of the loss over the weights' squared.
        parameters: n, the number of rows of the Hessian.
        samples: over all ranks.
        products: Hessian-vector products over all samples that it took.
        tol: relative accuracy that was asked of ARPACK; 0 where the whole Hessian was built.
        residual: `|H u - lambda u| / |lambda|` of the first one, which bounds its relative error; 0 for a Hessian of
            zeros.
        gradients: what it cost, in gradients of all samples.
    """

    values: tuple[float, ...]
    parameters: int
    samples: int
    products: int
    tol: float
    residual: float
    gradients: float

    @property
    def largest(self) -> float:
        """lambda_1."""
        return self.values[0]

    @property
    def ratio(self) -> float | None:
        """lambda_1 / lambda_5 (Foret et al. 2020, section 4.2), or None where fewer than five are known."""
        return self.values[0] / self.values[4] if len(self.values) >= 5 and self.values[4] else None


@dataclass(frozen=True)
class PowerIteration:
    """The largest eigenvalue as power iteration finds it.

    Attributes:
        value: lambda_1, the Rayleigh quotient of the last vector; a lower bound where it has not converged.
        products: Hessian-vector products over all samples that it took.
        residual: `|H v - lambda v| / |lambda|` of the last vector.
        converged: whether that is within the tolerance.
    """

    value: float
    products: int
    residual: float
    converged: bool


def hessian_eigenvalues(
    model: Modules,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    k: int = 5,
    *,
    tol: float = 1e-3,
    max_products: int = 1000,
    mode: Mode = "eval",
    seed: int = 0,
    sharded: bool | None = None,
    progress: Progress | None = None,
) -> HessianEigenvalues:
    """Find the k largest eigenvalues of the Hessian of the mean loss over a whole loader.

    Lanczos iterations with restarts (scipy's eigsh, that is ARPACK) on Hessian-vector products summed over all batches,
    from a seeded start. Where k is nearly the number of parameters the whole Hessian is built and diagonalised. The
    model is left as it was, to the last bit. Attention is computed by its plain formula meanwhile, since fused kernels
    have no second derivative; neither have models made by torch.compile.

    Args:
        model: as for `sam_sharpness`; the Hessian is that with respect to its parameters with requires_grad=True.
        loss_fn: as for `sam_sharpness`: returns per-sample losses of shape [n].
        loader: as for `sam_sharpness`. The batch size decides the memory, not the result.
        k: how many, from 1 to the number of parameters. Default 5, which gives lambda_1 / lambda_5.
        tol: relative accuracy of the eigenvalues at which ARPACK stops.
        max_products: about how many products to spend, each about 3 gradients of all samples; the eigenvalues that have
            converged by then are returned, with a warning.
        mode: "eval" or "train", as for `sam_sharpness`.
        seed: of the start vector, and of the random numbers in every pass over the loader.
        sharded: as for `sam_sharpness`; every rank gets the same eigenvalues.
        progress: called after every product with how many are done, and None.

    Returns:
        The eigenvalues, with what they cost.

    Raises:
        ImportError: scipy is not installed.
        ValueError: k is out of range, a product is not finite, or what `sam_sharpness` refuses.
        RuntimeError: no eigenvalue has converged.

    Papers: Foret et al. 2020 (https://arxiv.org/abs/2010.01412), section 4.2; Ghorbani et al. 2019
    (https://arxiv.org/abs/1901.10159).
    """
    linalg = _scipy()
    objective = Objective(model, loss_fn, loader, How(mode, seed, sharded, progress))
    n = count_parameters(objective)
    check_integer("k", k)
    check_integer("max_products", max_products, 1)
    check_number("tol", tol, lambda number: number >= 0, ">= 0")
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to {n}, the number of parameters, got {k}")
    subspace = max(2 * k + 1, 20)
    with products_of(objective) as product:
        if n <= subspace:
            values, vectors = np.linalg.eigh(_whole_hessian(product, n))
            used_tol = 0.0
        else:
            values, vectors = _lanczos(linalg, product, n, k, subspace, tol, max_products)
            used_tol = tol
        order = np.argsort(values)[::-1][:k]
        top, values = vectors[:, order[0]], values[order]
        residual = float(np.linalg.norm(product.of_array(top) - values[0] * top))
        return HessianEigenvalues(
            values=tuple(map(float, values)),
            parameters=n,
            samples=int(objective.all_samples()),
            products=product.count,
            tol=used_tol,
            residual=residual / abs(float(values[0])) if values[0] else residual,
            gradients=product.count * GRADIENTS_PER_PRODUCT,
        )


def power_iteration(
    model: Modules,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    *,
    tol: float = 1e-2,
    max_products: int = 200,
    mode: Mode = "eval",
    seed: int = 0,
    sharded: bool | None = None,
    progress: Progress | None = None,
) -> PowerIteration:
    """Find the largest eigenvalue of the Hessian by power iteration, to check `hessian_eigenvalues` by.

    It shares the products with that, and nothing else. Where the eigenvalue of the largest magnitude is negative, a
    second iteration on `H - lambda_min` finds the largest one.

    Args:
        model: as for `hessian_eigenvalues`.
        loss_fn: as there.
        loader: as there.
        tol: residual at which it stops; the value's own error is about its square. Near neighbours of the eigenvalue
            make it slow.
        max_products: after which it stops in any case.
        mode: as there.
        seed: as there.
        sharded: as there.
        progress: called after every product with how many are done, and None.

    Raises:
        ValueError: a product is not finite, or what `sam_sharpness` refuses.
    """
    check_integer("max_products", max_products, 1)
    check_number("tol", tol, lambda number: number >= 0, ">= 0")
    objective = Objective(model, loss_fn, loader, How(mode, seed, sharded, progress))
    with products_of(objective) as product:
        found = _iterate(product, start_vector(objective), 0.0, tol, max_products)
        if found.value < 0 and found.converged:
            smallest = found.value
            found = _iterate(product, start_vector(objective), smallest, tol, max_products)
        return found


def _iterate(product: "HessianProduct", v: Tensor, shift: float, tol: float, max_products: int) -> PowerIteration:
    value, residual = math.nan, math.inf
    while product.count < max_products and not residual <= tol:
        moved = product(v) - shift * v
        length, of_shifted = float(moved.norm()), float(v @ moved)
        value = of_shifted + shift
        if length == 0:
            return PowerIteration(value, product.count, 0.0, True)
        residual = float((moved - of_shifted * v).norm()) / abs(value) if value else math.inf
        v = moved / length
    return PowerIteration(value, product.count, residual, residual <= tol)


class HessianProduct:
    """Products of the mean loss's Hessian with vectors, all parameters in one flat vector; counts them."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.count = objective, 0
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in objective.params) else torch.float32
        self._sizes = [p.numel() for p in objective.params]
        # The gradient of a loader of one batch, with its graph, serves all products.
        self._keeps = count_batches(objective.loader) == 1
        self._kept: list[Tensor] | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """Return H v.

        Args:
            v: of shape [n], on the first parameter's device.

        Raises:
            ValueError: it is not finite.
        """
        params = self.objective.params
        parts = [x.view_as(p).to(p) for x, p in zip(v.split(self._sizes), params, strict=True)]
        sums = [torch.zeros_like(p, dtype=wide(p)) for p in params]
        for grads in self._gradients():
            dot = sum((g * x).sum().to(self.objective.device) for g, x in zip(grads, parts, strict=True))
            # the gradient of a loss that is linear in the weights is a constant
            if not dot.requires_grad:
                continue
            terms = torch.autograd.grad(
                dot, params, retain_graph=self._keeps, allow_unused=True, materialize_grads=True
            )
            torch._foreach_add_(sums, [t.to(s.dtype) for t, s in zip(terms, sums, strict=True)])
        flat = torch.cat([s.reshape(-1).to(self.objective.device, self.dtype) for s in sums])
        self.count += 1
        self.objective.report(self.count, None)
        result = self.objective.total(flat) / self.objective.all_samples()
        if not torch.isfinite(result).all():
            raise ValueError(
                "a Hessian-vector product is not finite; look whether the loss over the loader is, and measure models "
                "in 16 bits after .float()"
            )
        return result

    def of_array(self, v: Any) -> Any:
        """Return H v as a NumPy array, of a NumPy array of shape [n] or [n, 1]."""
        tensor = torch.from_numpy(np.ascontiguousarray(v).reshape(-1)).to(self.objective.device, self.dtype)
        return self(tensor).cpu().numpy()

    def _gradients(self) -> Iterator[list[Tensor]]:
        if self._kept is not None:
            yield self._kept
            return
        for batch in self.objective.batches():
            grads = self.objective.gradient_of(self.objective.losses(batch), create_graph=True)
            if self._keeps:
                self._kept = grads
            yield grads


@contextmanager
def products_of(objective: Objective) -> Iterator[HessianProduct]:
    """Context that gives products with the Hessian; at its end the model is what it was.

    Raises:
        ValueError: a parameter is complex.
    """
    if any(p.is_complex() for p in objective.params):
        raise ValueError("a parameter is complex; Hessians are computed of real parameters alone")
    # fused attention has no second derivative
    with objective.measuring(), sdpa_kernel(SDPBackend.MATH):
        yield HessianProduct(objective)


def count_parameters(objective: Objective) -> int:
    """Return n, the number of entries of all parameters."""
    return sum(p.numel() for p in objective.params)


def start_vector(objective: Objective, number: int = 0) -> Tensor:
    """Return a seeded random vector of length 1, shape [n], the same on every device and rank.

    Args:
        objective: whose parameters it fits.
        number: another one for every number.
    """
    generator = torch.Generator().manual_seed(objective.how.seed + number)
    v = torch.randn(count_parameters(objective), generator=generator, dtype=torch.float64)
    return (v / v.norm()).to(objective.device, HessianProduct(objective).dtype)


def _whole_hessian(product: HessianProduct, n: int) -> Any:
    columns = torch.eye(n, dtype=product.dtype, device=product.objective.device)
    hessian = torch.stack([product(column) for column in columns]).double().cpu().numpy()
    return (hessian + hessian.T) / 2


def _lanczos(
    linalg: Any, product: HessianProduct, n: int, k: int, subspace: int, tol: float, max_products: int
) -> tuple[Any, Any]:
    start = start_vector(product.objective).cpu().numpy()
    operator = linalg.LinearOperator((n, n), matvec=product.of_array, dtype=start.dtype)
    # a restart takes the products that fill the subspace again
    restarts = max(1, (max_products - subspace) // (subspace - k))
    try:
        return linalg.eigsh(operator, k, which="LA", ncv=subspace, tol=tol, maxiter=restarts, v0=start)
    except linalg.ArpackNoConvergence as error:
        found = len(error.eigenvalues)
        more = (
            f"after {product.count} products {found} of {k} eigenvalues are known to {tol:g}; raise max_products or tol"
        )
        if not found:
            raise RuntimeError(more) from error
        warnings.warn(more, stacklevel=3)
        return error.eigenvalues, error.eigenvectors


def _scipy() -> Any:
    try:
        import scipy.sparse.linalg as linalg
    except ImportError as error:
        raise ImportError(
            "hessian_eigenvalues needs scipy; install it with: pip install 'fastsam-torch[cli]'"
        ) from error
    return linalg
