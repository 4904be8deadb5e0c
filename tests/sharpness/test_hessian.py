"""Eigenvalues and their density against exact Hessians."""

import sys

import pytest
import torch
import torch.nn.functional as F
from problems import batches, losses_of, mlp
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsam.sharpness import hessian_eigenvalues, power_iteration, spectrum


def exact_hessian(model, parts):
    """The Hessian of the mean loss over all rows, in the order of model.parameters()."""
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    names, params = zip(*model.named_parameters(), strict=True)
    sizes = [p.numel() for p in params]

    def loss(flat):
        tensors = {n: t.view_as(p) for n, t, p in zip(names, flat.split(sizes), params, strict=True)}
        return F.cross_entropy(functional_call(model, tensors, (x,)), y)

    flat = torch.cat([p.detach().reshape(-1) for p in params])
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, flat)


@pytest.fixture(scope="module")
def problem():
    model, parts = mlp(), [*batches(2), *batches(1, rows=5, seed=3)]
    return model, losses_of(model), parts, torch.linalg.eigvalsh(exact_hessian(model, parts)).flip(0)


@pytest.mark.parametrize("k", [1, 5, 20, 82, 83])
def test_the_largest_are_those_of_the_exact_hessian(problem, k):
    model, losses, parts, exact = problem
    found = hessian_eigenvalues(model, losses, parts, k, tol=1e-10)
    torch.testing.assert_close(torch.tensor(found.values, dtype=torch.float64), exact[:k], rtol=1e-9, atol=1e-12)
    assert found.residual < 1e-7
    assert (found.parameters, found.samples, found.largest) == (83, 29, found.values[0])
    assert found.gradients == 3 * found.products
    assert found.ratio == (pytest.approx(float(exact[0] / exact[4])) if k >= 5 else None)


@pytest.mark.parametrize("layers", ["batch norm", "convolution", "attention"])
def test_layers_that_mix_rows_pixels_or_tokens(layers):
    torch.manual_seed(0)
    if layers == "batch norm":
        model, parts = mlp(batchnorm=True), batches(1)
    elif layers == "convolution":
        model = nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(6, 3))
        model, parts = model.double(), batches(1)
    else:
        block = nn.TransformerEncoderLayer(3, 1, 4, 0.0, batch_first=True)
        model = nn.Sequential(nn.Unflatten(1, (2, 3)), block, nn.Flatten(), nn.Linear(6, 3)).double()
        parts = batches(1)
    mode = "train" if layers == "batch norm" else "eval"
    model.train(mode == "train")
    exact = torch.linalg.eigvalsh(exact_hessian(model, parts)).flip(0)
    found = hessian_eigenvalues(model, losses_of(model), parts, 3, tol=1e-9, mode=mode)
    torch.testing.assert_close(torch.tensor(found.values, dtype=torch.float64), exact[:3], rtol=1e-7, atol=1e-10)


def test_power_iteration_agrees_without_lanczos(problem):
    model, losses, parts, exact = problem
    found = power_iteration(model, losses, parts, tol=1e-9, max_products=1000)
    assert found.converged
    assert found.value == pytest.approx(float(exact[0]), rel=1e-6)
    cut_short = power_iteration(model, losses, parts, max_products=3)
    assert (cut_short.converged, cut_short.products) == (False, 3)
    assert cut_short.value < float(exact[0])
    assert cut_short.residual > 1e-2


class Diagonal(nn.Module):
    """Has the Hessian diag(values), over two tensors."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.tensor(values, dtype=torch.float64)
        half = len(values) // 2
        self.a, self.b = (nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (half, len(values) - half))

    def forward(self, x):
        w = torch.cat([self.a, self.b])
        return (self.values @ w.square() / 2).expand(len(x))


ROWS = [(torch.ones(3),), (torch.ones(5),)]


@pytest.mark.parametrize("n", [7, 40])
def test_a_large_negative_eigenvalue_is_not_the_largest(n):
    values = torch.linspace(-9, 2, n).tolist()
    model = Diagonal(values)
    found = hessian_eigenvalues(model, model, ROWS, 2, tol=1e-9)
    assert found.values == pytest.approx(values[::-1][:2], rel=1e-7)
    power = power_iteration(model, model, ROWS, tol=1e-3, max_products=1000)
    assert power.converged
    assert power.value == pytest.approx(2.0, rel=1e-3)


def test_a_loss_that_is_linear_in_the_weights_has_a_hessian_of_zeros():
    model = nn.Linear(4, 1)
    found = hessian_eigenvalues(model, lambda x: model(x).squeeze(1), [(torch.ones(3, 4),)], 2)
    assert found.values == (0.0, 0.0)
    assert found.residual == 0
    assert power_iteration(model, lambda x: model(x).squeeze(1), [(torch.ones(3, 4),)]).value == 0


def test_quadrature_has_the_moments_of_its_vectors(problem):
    """v'H^k v exactly for k < 2m, for each of the seeded vectors v."""
    model, losses, parts, _ = problem
    hessian = exact_hessian(model, parts)
    steps = 5
    found = spectrum(model, losses, parts, steps=steps, probes=3, seed=7)
    assert found.products == 15
    for i in range(3):
        v = torch.randn(83, generator=torch.Generator().manual_seed(7 + i), dtype=torch.float64)
        v /= v.norm()
        for k in range(2 * steps):
            expected = v @ torch.linalg.matrix_power(hessian, k) @ v
            torch.testing.assert_close((found.weights[i] * found.nodes[i] ** k).sum(), expected, rtol=1e-9, atol=1e-12)


def test_density_of_known_eigenvalues():
    """All eigenvalues are found where there are few, each with a quarter of the weight; the density has the area 1."""
    values = [1.0, 2.0, 5.0, 9.0]
    model = Diagonal(values)
    found = spectrum(model, model, ROWS, steps=10, probes=200)
    assert found.nodes.shape == (200, 4)
    torch.testing.assert_close(found.nodes.mean(0), torch.tensor(values, dtype=torch.float64))
    torch.testing.assert_close(found.weights.mean(0), torch.full((4,), 0.25, dtype=torch.float64), rtol=0.2, atol=0)
    at = torch.linspace(-2, 12, 2001, dtype=torch.float64)
    density = found.density(at, width=0.2)
    assert float(torch.trapezoid(density, at)) == pytest.approx(1, abs=1e-6)
    assert float(density[(at - 9).abs().argmin()]) == pytest.approx(0.25 / (0.2 * (2 * torch.pi) ** 0.5), rel=0.2)
    assert found.moment(1) == pytest.approx(17 / 4, rel=0.1)


def test_equal_eigenvalues_end_the_lanczos_steps():
    """All vectors are eigenvectors; the second Lanczos vector would be rounding."""
    model = Diagonal([3.0] * 6)
    found = spectrum(model, model, ROWS, steps=4, probes=2)
    assert found.products == 2
    torch.testing.assert_close(found.weights[:, 0], torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(found.nodes[:, 0], torch.full((2,), 3.0, dtype=torch.float64))


def test_single_precision_finds_the_same(problem):
    _, _, parts, exact = problem
    model = mlp(torch.float32)
    parts = [(x.float(), y) for x, y in parts]
    found = hessian_eigenvalues(model, losses_of(model), parts, 5)
    assert found.values == pytest.approx(exact[:5].tolist(), rel=1e-3)


def test_what_has_converged_is_returned_when_the_products_run_out(problem):
    model, losses, parts, exact = problem
    with pytest.warns(
        UserWarning, match=r"after \d+ products \d of 9 eigenvalues are known to 1e-12; raise max_products"
    ):
        found = hessian_eigenvalues(model, losses, parts, 9, tol=1e-12, max_products=40)
    assert 0 < len(found.values) < 9
    assert found.values[0] == pytest.approx(float(exact[0]), rel=1e-6)
    close = Diagonal(torch.linspace(1, 2, 200).tolist())
    with pytest.raises(
        RuntimeError, match=r"after \d+ products 0 of 1 eigenvalues are known to 1e-15; raise max_products"
    ):
        hessian_eigenvalues(close, close, ROWS, 1, tol=1e-15, max_products=20)


def test_without_scipy_it_says_what_to_install(problem, monkeypatch):
    model, losses, parts, _ = problem
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match=r"needs scipy; install it with: pip install 'fastsam-torch\[cli\]'"):
        hessian_eigenvalues(model, losses, parts)
