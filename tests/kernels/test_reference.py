"""The reference implementations against a float64 truth."""

import exact_formulas
import numpy as np
import pytest
import torch
from error_bounds import assert_as_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import reference

from fastsam.kernels import philox, reference_common, reference_norm, reference_perturb
from fastsam.kernels.philox import Draw
from fastsam.kernels.reference import AdamOptions, SGDOptions
from fastsam.kernels.tensor_list import Backup, in_memory_order, is_dense, same_layout

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["scalars read", "scalars on device"])
def read_scalars(request, monkeypatch):
    monkeypatch.setattr(reference_common, "READ_SCALARS", request.param)


def tensors(dtypes, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    made = []
    for dtype in dtypes:
        made += [randn(n).to(dtype) for n in (0, 1, 63, 4096, 65537)]
        made += [randn(()).to(dtype), randn(6, 4, 3, 3).to(dtype).to(memory_format=torch.channels_last)]
        made += [randn(101).to(dtype)[1:], randn(7, 9).to(dtype).t(), randn(8, 6).to(dtype)[:, ::2]]
    return made


def copies(ts):
    """Copies with the same strides, gaps included."""
    made = []
    for t in ts:
        c = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
        made.append(c.copy_(t))
    return made


def philox_by_numpy(element, index, step, seed):
    c = [element // 4 & 0xFFFFFFFF, index, step, element // 4 >> 32]
    k = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[element % 4]


def test_philox_known_answer():
    # the first known-answer vector of the Random123 distribution
    for step in (0, 63, 64, 2**31, 2**32 - 1, 2**32 + 5):
        assert philox.first_words(5, step, 9) == [philox.words(1, i, step, 9).item() for i in range(5)]
    assert philox.words(4, 0, 0, 0).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_philox_words_are_those_of_its_definition(n, index, step, seed):
    assert philox.words(n, index, step, seed).tolist() == [philox_by_numpy(e, index, step, seed) for e in range(n)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 70), st.integers(0, 9) | st.integers(2**34 - 80, 2**34 + 9) | st.integers(0, 2**40))
def test_philox_words_start_anywhere(n, start):
    found = philox.words(n, 3, 4, 5, start=start)
    assert found.tolist() == [philox_by_numpy(e, 3, 4, 5) for e in range(start, start + n)]


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtypes", [[d] for d in DTYPES] + [DTYPES])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_norm(dtypes, adaptive, scale):
    if scale != 1 and torch.float16 in dtypes:
        dtypes = [d for d in dtypes if d != torch.float16] or [torch.float32]
    grads, weights = tensors(dtypes, scale=scale), tensors(dtypes, seed=1)
    etas = [[None, 0.0, 0.5][i % 3] for i in range(len(grads))] if adaptive else None
    truth = 0.0
    for i, (g, w) in enumerate(zip(grads, weights, strict=True)):
        t = w.double().abs() + etas[i] if etas and etas[i] is not None else 1.0
        truth += np.longdouble(((t * g.double() / scale) ** 2).sum().item())
    before = copies(weights)
    norm = reference.norm(grads, weights, etas)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(float(np.sqrt(truth)) * scale, rel=1e-13)
    assert all(map(torch.equal, weights, before))


def test_norm_allocates_one_piece_however_many_there_are():
    grads = [torch.ones(5 * reference_norm.PIECE + 1), torch.ones(3, 5).t()]
    # Without acc_events some releases of torch warn that a second cycle would forget the first.
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        found = reference.norm(grads)
    assert found.item() == pytest.approx((5 * reference_norm.PIECE + 16) ** 0.5, rel=1e-15)
    piece = 8 * reference_norm.PIECE * torch.get_num_threads()
    assert piece <= sum(max(event.self_cpu_memory_usage, 0) for event in profile.events()) < piece + 1000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_entries_are_found(dtype, bad):
    grads = tensors([torch.float32, dtype])
    assert reference.found_nonfinite(grads).item() == 0.0
    before = copies(grads)
    reference.found_nonfinite(grads)
    assert all(map(torch.equal, grads, before))
    grads[-1][3, 1] = bad
    assert reference.found_nonfinite(grads).item() == 1.0
    assert not torch.isfinite(reference.norm(grads))


@pytest.mark.usefixtures("read_scalars")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_overflows_is_no_finding(dtype):
    large = torch.finfo(dtype).max
    assert reference.found_nonfinite([torch.full((100,), large, dtype=dtype)]).item() == 0.0
    assert reference.found_nonfinite([torch.tensor([large, large, float("inf")], dtype=dtype)]).item() == 1.0


@pytest.mark.usefixtures("read_scalars")
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtypes", [[d] for d in DTYPES] + [DTYPES])
def test_perturb_and_restore(dtypes, adaptive):
    weights, grads = tensors(dtypes), tensors(dtypes, seed=1)
    etas = [[None, 0.0, 0.5][i % 3] for i in range(len(grads))] if adaptive else None
    rho = [[0.5, -0.25, 0.0][i % 3] for i in range(len(grads))]
    before, addresses = copies(weights), [w.data_ptr() for w in weights]
    norm = reference.norm(grads, weights, etas)
    backup = Backup(weights)
    for t in backup.tensors:
        t.fill_(float("nan"))
    reference.perturb_(weights, grads, backup, norm, rho, etas)
    rows = zip(before, grads, rho, etas or [None] * len(rho), strict=True)
    assert_as_exact(weights, [exact_formulas.perturbed(*row, norm) for row in rows])
    assert all(map(torch.equal, backup.tensors, before))
    reference.restore_(backup)
    assert all(map(torch.equal, weights, before))
    for w in weights:
        w.fill_(3)
    reference.restore_(backup)  # a second time does nothing
    assert all((w == 3).all() for w in weights)
    assert addresses == [w.data_ptr() for w in weights]


@pytest.mark.usefixtures("read_scalars")
@pytest.mark.parametrize("norm", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("adaptive", [None, 0.0])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_useless_norm_leaves_weights_alone(norm, adaptive, stochastic):
    weights, grads = tensors(DTYPES), tensors(DTYPES, seed=1)
    for g in grads:
        g.fill_(0 if norm == 0 else norm)
    before = copies(weights)
    etas = [adaptive] * len(weights)
    draw = Draw(0, 0, tuple(range(len(weights)))) if stochastic else None
    reference.perturb_(
        weights, grads, Backup(weights), torch.tensor(norm, dtype=torch.float64), [1.0] * len(weights), etas, draw
    )
    assert all(map(torch.equal, weights, before))


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e4, 3e-6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_goes_to_a_neighbour_with_the_right_probability(dtype, magnitude):
    value = torch.tensor(magnitude * 1.2345, dtype=torch.float32)
    weights = [torch.zeros(40_000, dtype=dtype)]
    grads = [torch.full((40_000,), 1.0, dtype=dtype)]
    rho = value.item() * 200.0
    norm = torch.tensor(200.0, dtype=torch.float64)
    reference.perturb_(weights, grads, Backup(weights), norm, [rho], None, Draw(1, 2, (3,)), e0=0.0)
    nearest = value.to(dtype)
    other = torch.nextafter(nearest, torch.tensor(float("inf") if nearest.float() < value else 0.0).to(dtype))
    low, high = sorted((nearest.double().item(), other.double().item()))
    assert set(weights[0].double().unique().tolist()) <= {low, high}
    share = (weights[0].double() == high).double().mean().item()
    expected = (value.double().item() - low) / (high - low)
    assert share == pytest.approx(expected, abs=4 * (0.25 / 40_000) ** 0.5)


def test_stochastic_rounding_keeps_what_is_representable():
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        rounded = reference_perturb.round_stochastically(every.float(), dtype, torch.full((2**16,), 0xFFFF)).to(dtype)
        assert torch.equal(rounded.view(torch.int16)[~every.isnan()], every.view(torch.int16)[~every.isnan()])
        assert rounded[every.isnan()].isnan().all()


def test_random_words_follow_memory_order():
    flat = torch.zeros(2 * 3 * 4 * 5, dtype=torch.bfloat16)
    contiguous, strided = flat.clone().view(2, 3, 4, 5), flat.clone().view(2, 4, 5, 3).permute(0, 3, 1, 2)
    for w in (contiguous, strided):
        norm = torch.tensor(1.0, dtype=torch.float64)
        reference.perturb_([w], [torch.ones_like(w)], Backup([w]), norm, [1.001], None, Draw(0, 0, (0,)))
    assert torch.equal(in_memory_order(contiguous), in_memory_order(strided))
    assert not torch.equal(contiguous, strided)


@pytest.mark.parametrize("dtypes", [[d] for d in DTYPES] + [DTYPES])
@pytest.mark.parametrize("skip", [None, False, True])
@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize(
    "o",
    [
        SGDOptions(0.1),
        SGDOptions(0.1, 0.9, 0.0, 0.01, True, False),
        SGDOptions(torch.tensor(0.1), 0.9, 0.3, 0.01, False, True),
    ],
)
def test_restore_and_sgd_step(o, perturbed, skip, dtypes):
    truth, grads, buffers = tensors(dtypes), tensors(dtypes, seed=1), tensors(dtypes, seed=2)
    sources = copies(truth)
    weights = copies(truth)
    if perturbed:
        for w in weights:
            w.fill_(float("nan"))
    before_m = copies(buffers)
    scale = None if skip is None else torch.tensor(4.0)
    found = None if skip is None else torch.tensor(float(skip))
    given = [g * 4 if scale is not None else g for g in copies(grads)]
    args = (weights, sources if perturbed else weights, given, buffers if o.momentum else [None] * len(weights))
    reference.restore_sgd_step_(*args, [o] * len(weights), grad_scale=scale, found_inf=found)
    if skip:
        assert all(map(torch.equal, weights + buffers, truth + before_m))
        return
    rows = zip(truth, grads, before_m if o.momentum else [None] * len(truth), strict=True)
    expected = [exact_formulas.sgd_step(*row, o) for row in rows]
    assert_as_exact(weights, [own[0] for own in expected])
    if o.momentum:
        assert_as_exact(buffers, [own[2] for own in expected])
    assert all(map(torch.equal, given, grads))  # a scale that is a power of two is taken back exactly


@pytest.mark.parametrize("dtypes", [[d] for d in DTYPES] + [DTYPES])
@pytest.mark.parametrize("skip", [None, False, True])
@pytest.mark.parametrize("o", [
    AdamOptions(0.01),
    AdamOptions(0.01, weight_decay=0.1, decoupled=True, maximize=True),
    AdamOptions(torch.tensor(0.01), weight_decay=0.1, amsgrad=True),
])  # fmt: skip
def test_restore_and_adam_step(o, skip, dtypes):
    truth, grads, m = tensors(dtypes), tensors(dtypes, seed=1), tensors(dtypes, seed=2)
    v = [t.abs() for t in tensors(dtypes, seed=3)]
    sources, weights = copies(truth), copies(truth)
    for w in weights:
        w.fill_(float("nan"))
    m0, v0 = copies(m), copies(v)
    largest = copies(v) if o.amsgrad else [None] * len(v)
    steps = [torch.tensor(3.0) for _ in weights]
    found = None if skip is None else torch.tensor(float(skip))
    reference.restore_adam_step_(weights, sources, grads, m, v, largest, steps, [o] * len(weights), found_inf=found)
    assert all(s.item() == (3 if skip else 4) for s in steps)
    if skip:
        assert all(map(torch.equal, weights + m + v, truth + m0 + v0))
        return
    rows = zip(truth, grads, m0, v0, v0 if o.amsgrad else largest, strict=True)
    expected = [exact_formulas.adam_step(*row[:4], 4, o, largest=row[4]) for row in rows]
    assert_as_exact(weights + m + v, [own[i] for i in (0, 2, 3) for own in expected])


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.zeros(3, 4), True),
        (torch.zeros(3, 4).t(), True),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.zeros(()), True),
        (torch.zeros(0), True),
        (torch.zeros(1, 5)[:, 2:], True),
        (torch.zeros(3, 4)[:, ::2], False),
        (torch.zeros(3, 1).expand(3, 4), False),
        (torch.zeros(4, 4)[:2, :2], False),
    ],
)
def test_what_is_dense(tensor, dense):
    assert is_dense(tensor) is dense
    assert same_layout([tensor, torch.empty_strided(tensor.shape, tensor.stride())]) in (True, dense)
