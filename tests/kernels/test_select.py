"""Selection of the rows whose loss rose most, the reference and the kernel, against NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import kernels, reference
from torch.utils._python_dispatch import TorchDispatchMode

if kernels is None:  # there is only the reference
    select = None
else:
    from fastsam.kernels import select

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INF, NAN = float("inf"), float("nan")
MOST_ROWS = 65536
# the program in its usual shape, and one of a few lanes, which takes its blocks in turn
SHAPES = {"usual": ((256, 2048), 65536), "loops": ((), 64)}


@pytest.fixture(params=["torch", "triton"])
def chosen(request):
    """The launcher under test; takes tensors of the CPU and returns one."""
    if request.param == "torch":
        return reference.select_largest_increase
    return by_kernel


def by_kernel(after, before, k, shape="usual"):
    if select is None:
        pytest.skip("triton is not installed")
    device = "cpu" if kernels.INTERPRETED else "cuda"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "_BLOCK_SIZES", SHAPES[shape][0])
        patch.setattr(select, "_BYTES_IN_REGISTERS", SHAPES[shape][1])
        return kernels.select_largest_increase(after.to(device), before.to(device), k).cpu()


def by_numpy(after, before, k):
    """Sort by (is NaN, -delta, row)."""
    wide = torch.promote_types(after.dtype, torch.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        delta = after.to(wide).numpy() - before.to(wide).numpy()
    nan = np.isnan(delta)
    order = np.lexsort((np.arange(len(delta)), np.where(nan, 0, -delta), nan))
    return np.sort(order[:k])


def check(choose, after, before, k, **kwargs):
    rows = choose(after, before, k, **kwargs)
    assert rows.dtype == torch.int64
    np.testing.assert_array_equal(rows.numpy(), by_numpy(after, before, k))


def losses(n, dtype, seed=0, coarse=False):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n, generator=generator, dtype=torch.float64) * 4
    return (values.mul(4).round().div(4) if coarse else values).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 256, 257, 1000, 2048, 4096, 4097])
def test_sizes(chosen, n, dtype):
    for k in sorted({1, max(1, n // 3), n}):
        check(chosen, losses(n, dtype, 1), losses(n, dtype, 2), k)
    check(chosen, losses(n, dtype, 1, coarse=True), losses(n, dtype, 2, coarse=True), (n + 1) // 2)


@pytest.mark.parametrize(("n", "dtype"), [(8193, DTYPES[0]), (16385, DTYPES[1]), *((MOST_ROWS, d) for d in DTYPES)])
def test_large_sizes(chosen, n, dtype):
    check(chosen, losses(n, dtype, 1), losses(n, dtype, 2), n // 2)
    check(chosen, losses(n, dtype, 1, coarse=True), losses(n, dtype, 2, coarse=True), n // 3)
    if dtype == torch.float32:
        for k in (1, n - 1, n):
            check(chosen, losses(n, dtype, 1), losses(n, dtype, 2), k)


TINY = 2.0**-1074  # float64's smallest; 16-bit dtypes have 2^-24 and 2^-133
SPECIAL = {
    "all equal": ([3.0] * 12, [1.0] * 12),
    "all zero": ([0.0, -0.0, 1.0, -0.0, 0.0, -1.0] * 2, [0.0, -0.0, 1.0, 0.0, -0.0, -1.0] * 2),
    # -0 - 0 is the only -0 among differences
    "a zero is a zero": ([-0.0, 0.0, -0.0, -0.0, 1.0, -1.0] * 2, [0.0, 0.0, -0.0, 0.0, 0.0, 0.0] * 2),
    "all NaN": ([NAN] * 12, [0.0] * 12),
    "some NaN": ([NAN, 1.0, -1.0, NAN, -NAN, 2.0] * 2, [0.0, 0.0, 0.0, NAN, 0.0, 0.0] * 2),
    "inf": ([INF, -INF, INF, -INF, 1.0, NAN] * 2, [0.0, 0.0, INF, -INF, -INF, 1.0] * 2),
    "only -inf and NaN": ([-INF, NAN, -INF, -NAN, 0.0, INF] * 2, [1.0, 0.0, 0.0, 1.0, INF, INF] * 2),
    "inf by overflow": ([3e38, -3e38, 6e4, 1e308, -1e308, 0.0] * 2, [-3e38, 3e38, -6e4, -1e308, 1e308, 0.0] * 2),
    "subnormal": (
        [TINY, 2 * TINY, -TINY, 2.0**-149, 2.0**-133, 0.0, -(2.0**-149), 3 * TINY, 2.0**-24, 2.0**-148, 0.0, TINY],
        [0.0, TINY, 0.0, 0.0, 0.0, 0.0, 0.0, TINY, 0.0, 2.0**-149, TINY, 0.0],
    ),
    "neighbours": ([1 + i * 2.0**-52 for i in range(6)] + [1 + i * 2.0**-23 for i in range(6)], [1.0] * 12),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SPECIAL)
def test_special_values(chosen, case, dtype):
    after, before = (torch.tensor(values, dtype=torch.float64).to(dtype) for values in SPECIAL[case])
    for k in (1, 3, 5, 7, 10, 12):
        check(chosen, after, before, k)
    check(chosen, before, after, 6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], ids=hex)
def test_any_kind_of_nan_comes_last(bits, shape):
    after = torch.tensor([1.0, 0.0, -INF, 0.0, 2.0])
    after.view(torch.int32)[1] = bits - 2**32 if bits >= 2**31 else bits
    for choose, kwargs in ((reference.select_largest_increase, {}), (by_kernel, {"shape": shape})):
        assert choose(after, torch.zeros(5), 4, **kwargs).tolist() == [0, 2, 3, 4]


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(DTYPES), st.sampled_from(["reference", *SHAPES]))
def test_arrays_with_many_ties(data, dtype, implementation):
    value = st.sampled_from([0.0, -0.0, 0.25, -0.25, 1.0, -1.0, 6e4, -6e4, 6e-8, 1e-40, INF, -INF, NAN])
    pairs = data.draw(st.lists(st.tuples(value, value), min_size=1, max_size=50))
    k = data.draw(st.integers(1, len(pairs)))
    after, before = torch.tensor(pairs, dtype=torch.float64).to(dtype).unbind(1)
    if implementation == "reference":
        check(reference.select_largest_increase, after, before, k)
    else:
        check(by_kernel, after, before, k, shape=implementation)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(["reference", *SHAPES]), st.sampled_from([(32, torch.float32), (64, torch.float64)]))
def test_arrays_of_any_numbers(data, implementation, kind):
    width, dtype = kind
    value = st.floats(width=width)
    pairs = data.draw(st.lists(st.tuples(value, value), min_size=1, max_size=50))
    k = data.draw(st.integers(1, len(pairs)))
    after, before = torch.tensor(pairs, dtype=dtype).unbind(1)
    if implementation == "reference":
        check(reference.select_largest_increase, after, before, k)
    else:
        check(by_kernel, after, before, k, shape=implementation)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(["reference", *SHAPES]))
def test_chosen_rows_rose_most(data, implementation):
    """docs/algorithms.md#invariant-20 and docs/algorithms.md#invariant-21."""
    value = st.floats(-100, 100)
    pairs = data.draw(st.lists(st.tuples(value, value), min_size=1, max_size=50))
    k = data.draw(st.integers(1, len(pairs)))
    after, before = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    if implementation == "reference":
        rows = reference.select_largest_increase(after, before, k)
    else:
        rows = by_kernel(after, before, k, shape=implementation)
    assert rows.shape == (k,)
    assert (rows.diff() > 0).all()
    delta = after - before
    rest = torch.ones(len(delta), dtype=torch.bool)
    rest[rows] = False
    assert delta[rows].mean() >= delta.mean() - 1e-12
    if k < len(delta):
        assert delta[rows].min() >= delta[rest].max()
        assert delta.mean() >= delta[rest].mean() - 1e-12
        # of rows that rose as much as the last one chosen, the lowest are
        equal = (delta == delta[rows].min()).nonzero().flatten()
        taken = equal[torch.isin(equal, rows)]
        assert torch.equal(taken, equal[: len(taken)])


def test_worked_numbers(chosen):
    """docs/algorithms.md#logistic-regression, and the same rows the other way round."""
    before = torch.tensor([0.744396660073571, 0.5130152523999526, 0.49324894599745484], dtype=torch.float64)
    after = torch.tensor([0.8222162759289219, 0.5483364408885346, 0.4987684664123097], dtype=torch.float64)
    assert [chosen(after, before, k).tolist() for k in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]
    assert [chosen(after.flip(0), before.flip(0), k).tolist() for k in (1, 2, 3)] == [[2], [1, 2], [0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 37])
def test_strides_and_gradients(chosen, n, dtype):
    base = losses(6 * n + 1, dtype)
    views = [
        base[1 : n + 1],
        base[: 3 * n : 3],
        base[: 2 * n].view(n, 2)[:, 1],
        base[0].expand(n),
        base[:n].clone().requires_grad_(),
    ]
    kept = base.clone()
    for after, before in zip(views, views[2:] + views[:2], strict=True):
        rows = chosen(after, before, (n + 1) // 2)
        assert not rows.requires_grad
        np.testing.assert_array_equal(rows, by_numpy(after.detach(), before.detach(), (n + 1) // 2))
    assert torch.equal(base, kept)


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(chosen):
    with _Calls() as calls:
        chosen(losses(300, torch.float32, 1), losses(300, torch.float32, 2), 100)
    assert calls.seen
    assert torch.ops.aten._local_scalar_dense.default not in calls.seen


def test_reference_has_static_shapes():
    vector = torch.empty(100, device="meta")
    assert reference.select_largest_increase(vector, vector, 7).shape == (7,)


@pytest.mark.parametrize("n", [1, 256, 257, 2049, MOST_ROWS])
@pytest.mark.skipif(select is None, reason="triton is not installed")
def test_one_launch_of_one_program(n, monkeypatch):
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(select, "_select_kernel", Kernel())
    by_kernel(torch.zeros(2 * n)[::2], torch.zeros(n), n)
    assert grids == [(1,)]


@pytest.mark.skipif(select is None, reason="triton is not installed")
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_kernels_serve_all_sizes(dtype):
    shapes = {tuple(select.shape_of(n, dtype).items()) for n in range(1, MOST_ROWS + 1)}
    assert len(shapes) == 4


ZEROS = torch.zeros(5)
BAD = [
    (ZEROS, ZEROS, 0, "k must be an integer from 1 to the number of losses, 5, got 0"),
    (ZEROS, ZEROS, -1, "got -1"),
    (ZEROS, ZEROS, 6, "got 6"),
    (ZEROS, ZEROS, 2.0, r"got 2\.0"),
    (ZEROS, ZEROS, torch.tensor(2), r"got tensor\(2\)"),
    (torch.zeros(0), torch.zeros(0), 1, "number of losses, 0, got 1"),
    (ZEROS, torch.zeros(4), 1, r"two vectors of one length, got shapes \(5,\) and \(4,\)"),
    (ZEROS.view(5, 1), ZEROS.view(5, 1), 1, r"got shapes \(5, 1\) and \(5, 1\)"),
    (torch.zeros(()), torch.zeros(()), 1, r"got shapes \(\) and \(\)"),
    (ZEROS, ZEROS.double(), 1, r"got torch\.float32 and torch\.float64; convert"),
    (ZEROS.int(), ZEROS.int(), 1, r"got torch\.int32 and torch\.int32"),
    (ZEROS, ZEROS.to("meta"), 1, "on one device, got cpu and meta"),
]


@pytest.mark.parametrize(("after", "before", "k", "message"), BAD)
@pytest.mark.parametrize("implementation", [reference, kernels], ids=["torch", "triton"])
def test_bad_arguments(implementation, after, before, k, message):
    if implementation is None:
        pytest.skip("triton is not installed")
    with pytest.raises(ValueError, match=message):
        implementation.select_largest_increase(after, before, k)


def test_more_rows_than_a_program_takes():
    rows = torch.zeros(MOST_ROWS + 1)
    assert reference.select_largest_increase(rows, rows, 2).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"at most 65536 losses, got 65537; split the batch"):
        by_kernel(rows, rows, 2)
