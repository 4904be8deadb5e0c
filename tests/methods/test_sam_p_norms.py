"""SAM with the p-norms of Eq. 2: worked numbers, what defines the step, gradients of any scale and sparsity."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import batches, largest_difference, losses_of, mlp
from torch import nn

from fastsam import ESAM, MSAM, SAM

PS = [1, 1.001, 1.5, 2, 3, 10, 1e6, math.inf]


def perturbation(grads, p, rho=0.1, dtype=torch.float64, weights=None, **options):
    """eps for these gradients, at weights of zero, where it is read without rounding."""
    grads = [torch.as_tensor(g, dtype=dtype) for g in grads]
    weights = [torch.zeros_like(g) for g in grads] if weights is None else weights
    params = [nn.Parameter(w.clone()) for w in weights]
    opt = SAM(params, torch.optim.SGD, rho=rho, p=p, lr=0.1, stochastic_rounding=False, **options)
    for parameter, g in zip(params, grads, strict=True):
        parameter.grad = g.clone()
    opt.first_step()
    found = [parameter.detach() - w for parameter, w in zip(params, weights, strict=True)]
    opt.restore()
    return found, opt.last_grad_norm


def norm(tensors, p):
    flat = torch.cat([t.double().flatten() for t in tensors]).abs()
    top = flat.max()
    if math.isinf(p) or top == 0:
        return top.item()
    return (top * (flat / top).pow(p).sum() ** (1 / p)).item()


@pytest.mark.parametrize(
    ("p", "eps"),
    [
        (1.5, (0.03738361497358389, 0.08411313369056375)),
        (2, (0.05547001962252292, 0.08320502943378438)),
        (3.0, (0.07063840791276677, 0.08651402781442813)),
        (math.inf, (0.1, 0.1)),
        (1, (0.0, 0.1)),
    ],
)
@pytest.mark.parametrize("cut", [False, True], ids=["one tensor", "two tensors"])
def test_the_quadratics_worked_numbers(backend, p, eps, cut):
    """docs/algorithms.md#the-quadratic: g = (4, 6), rho = 0.1."""
    found, _ = perturbation([[4.0], [6.0]] if cut else [[4.0, 6.0]], p)
    torch.testing.assert_close(torch.cat(found), torch.tensor(eps, dtype=torch.float64), rtol=1e-10, atol=0)


def test_the_infinity_norms_gradient(backend):
    """docs/algorithms.md#the-quadratic."""
    a, b = torch.tensor([[3.0, 1.0], [1.0, 2.0]]).double(), torch.tensor([1.0, -1.0]).double()
    w = nn.Parameter(torch.tensor([1.0, 2.0]).double())
    opt = SAM([w], torch.optim.SGD, rho=0.1, p=math.inf, lr=0.1)
    opt.backward(lambda: w @ a @ w / 2 - b @ w)
    torch.testing.assert_close(w.grad, torch.tensor([4.4, 6.3]).double())


magnitudes = st.floats(-20, 20).map(lambda e: 10.0**e)


@settings(max_examples=150, deadline=None)
@given(
    # 2 has 1e-12 in its denominator, and tests of its own
    p=st.one_of(st.sampled_from([p for p in PS if p != 2]), st.floats(1.001, 50).filter(lambda p: p != 2)),
    scale=magnitudes,
    sparsity=st.sampled_from(["dense", "zeros", "one entry", "a dead tensor", "equal"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 10**6),
)
def test_it_has_length_rho_and_gains_rho_times_the_dual_norm(p, scale, sparsity, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (7, 1, 12)]
    if sparsity == "zeros":
        grads = [g * (torch.rand(g.shape, generator=generator) < 0.3) for g in grads]
        grads[0][3] = 1.0
    elif sparsity == "one entry":
        grads = [torch.zeros_like(g) for g in grads]
        grads[2][5] = -1.0
    elif sparsity == "a dead tensor":
        grads[1].zero_()
    elif sparsity == "equal":
        grads = [torch.ones_like(g) for g in grads]
    grads = [(g * scale).to(dtype) for g in grads]
    eps, grad_norm = perturbation(grads, p, rho=0.1, dtype=dtype)
    q = 1.0 if math.isinf(p) else math.inf if p == 1 else p / (p - 1)
    tight = 1e-9 if dtype is torch.float64 else 3e-5
    assert norm(eps, p) == pytest.approx(0.1, rel=tight)
    gain = sum((e.double() * g.double()).sum() for e, g in zip(eps, grads, strict=True)).item()
    assert gain == pytest.approx(0.1 * norm(grads, q), rel=tight)
    assert grad_norm.item() == pytest.approx(norm(grads, q), rel=tight)
    # of degree 0, and odd
    again, _ = perturbation([g * -4.0 for g in grads], p, rho=0.1, dtype=dtype)
    for e, other in zip(eps, again, strict=True):
        torch.testing.assert_close(e, -other, rtol=1e-5, atol=0)


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf])
def test_without_a_direction_nothing_is_perturbed(backend, p, fill):
    grads = [torch.zeros(3), torch.zeros(2)]
    grads[1][0] = fill
    found, grad_norm = perturbation(grads, p)
    assert not any(e.any() for e in found)
    assert torch.isfinite(grad_norm) == math.isfinite(fill)


def test_the_first_of_the_largest_entries_is_perturbed_for_p_1(backend):
    found, grad_norm = perturbation([[1.0, -3.0, 2.0], [3.0, -3.0]], 1, rho=0.5)
    assert [e.tolist() for e in found] == [[0.0, -0.5, 0.0], [0.0, 0.0]]
    assert grad_norm == 3
    channels_last = torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last)
    channels_last[1, 0, 1, 1] = channels_last[1, 2, 0, 0] = 2.0
    found, _ = perturbation([channels_last], 1, rho=0.5)
    assert found[0].nonzero().tolist() == [[1, 0, 1, 1]]


@pytest.mark.parametrize("p", [1, 1.5, 3, math.inf])
def test_asam_bounds_the_norm_of_eps_over_t(backend, p):
    """eps = T dual_p(T g), with T = |w|."""
    torch.manual_seed(0)
    weights = [torch.randn(5).double(), torch.randn(2, 3).double()]
    grads = [torch.randn_like(w) for w in weights]
    found, _ = perturbation(grads, p, weights=weights, adaptive=True)
    units = [e / w.abs() for e, w in zip(found, weights, strict=True)]
    assert norm(units, p) == pytest.approx(0.1, rel=1e-9)
    expected, _ = perturbation([w.abs() * g for w, g in zip(weights, grads, strict=True)], p)
    for unit, e in zip(units, expected, strict=True):
        torch.testing.assert_close(unit, e, rtol=1e-9, atol=1e-12)


def test_p_near_2_is_near_the_kernels_step(backend):
    torch.manual_seed(0)
    grads = [torch.randn(50).double(), torch.randn(3).double()]
    near, exact = perturbation(grads, 2 + 1e-9)[0], perturbation(grads, 2)[0]
    for a, b in zip(near, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_perturbed_from_float32_steps(backend, dtype):
    grads = [torch.randn(64, generator=torch.Generator().manual_seed(1))]
    found, _ = perturbation(grads, 3, dtype=dtype)
    exact, _ = perturbation([grads[0].to(dtype).double()], 3)
    torch.testing.assert_close(found[0], exact[0].to(dtype))


@pytest.mark.parametrize("p", [1, 3, math.inf])
def test_msam_perturbs_each_shard_by_the_norm(backend, p):
    """Shards that are copies of one another are SAM on one of them."""
    model, other = mlp(), mlp()
    x, y = batches(1, rows=6)[0]
    opt = MSAM(model.parameters(), torch.optim.SGD, rho=0.1, num_shards=2, p=p, lr=0.1)
    one = SAM(other.parameters(), torch.optim.SGD, rho=0.1, p=p, lr=0.1)
    opt.step(losses_of(model), torch.cat([x, x]), torch.cat([y, y]))
    one.step(losses_of(other), x, y)
    assert largest_difference(model, other) < 1e-13


@pytest.mark.parametrize(
    ("p", "error", "needle"),
    [
        (0.5, ValueError, "p must be at least 1, or math.inf, got 0.5"),
        (math.nan, ValueError, "p must be at least 1"),
        (-math.inf, ValueError, "p must be at least 1"),
        ("2", TypeError, "p must be a number, got '2'"),
        (True, TypeError, "p must be a number, got True"),
    ],
)
@pytest.mark.parametrize("cls", [SAM, MSAM])
def test_a_bad_p_is_named(cls, p, error, needle):
    options = {"num_shards": 2} if cls is MSAM else {}
    with pytest.raises(error, match=needle):
        cls(mlp().parameters(), torch.optim.SGD, p=p, lr=0.1, **options)


def test_other_methods_do_not_know_it():
    with pytest.raises(TypeError, match="p"):
        ESAM(mlp().parameters(), torch.optim.SGD, p=3, lr=0.1)
