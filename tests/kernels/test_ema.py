"""Moving averages, the kernel and its reference, against float64."""

import pytest
import torch
from error_bounds import assert_as_exact
from exact_formulas import moving_average
from kernel_cases import DEVICE, DTYPES, LISTS, assert_same_bits, copies, kernels, reference, tensors
from test_kernel_launches import Operations

from fastsam.kernels import reference_common


@pytest.fixture(params=["torch", "triton"])
def ema_(request):
    """The launcher under test."""
    if request.param == "triton" and kernels is None:
        pytest.skip("triton is not installed")
    return (kernels if request.param == "triton" else reference).ema_


def moved(averages, values, decay):
    return [moving_average(v, w, decay) for v, w in zip(averages, values, strict=True)]


@pytest.mark.parametrize("decay", [0.9998, 0.9, 0.3])
@pytest.mark.parametrize("dtypes", LISTS, ids=str)
def test_lists_of_tensors(ema_, dtypes, decay):
    averages, values = tensors(dtypes, 0), tensors(dtypes, 1)
    kept = copies(values)
    expected = moved(averages, values, decay)
    ema_(averages, values, decay)
    assert_as_exact(averages, expected)
    assert_same_bits(values, kept)


@pytest.mark.parametrize("value", DTYPES)
@pytest.mark.parametrize("average", [torch.float32, torch.bfloat16])
def test_averages_of_another_dtype(ema_, average, value):
    averages, values = tensors([average], 0), tensors([value], 1)
    expected = moved(averages, values, 0.99)
    ema_(averages, values, 0.99)
    assert_as_exact(averages, expected)


@pytest.mark.parametrize("dtypes", LISTS, ids=str)
@pytest.mark.parametrize("decay", [0.9998, 0.5, 0.1])
def test_what_is_equal_stays(ema_, dtypes, decay):
    averages = tensors(dtypes)
    values = copies(averages)
    ema_(averages, values, decay)
    assert_same_bits(averages, values)


@pytest.mark.parametrize("dtypes", LISTS, ids=str)
@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_skipped_step_leaves_averages_alone(ema_, dtypes, reads, found, monkeypatch):
    monkeypatch.setattr(reference_common, "READ_SCALARS", reads)
    averages, values = tensors(dtypes, 0), tensors(dtypes, 1)
    wanted = copies(averages)
    if found:
        for w in values:
            w.fill_(torch.inf)
    else:
        ema_(wanted, values, 0.9)
    ema_(averages, values, 0.9, torch.tensor(found, device=DEVICE))
    assert_same_bits(averages, wanted)


@pytest.mark.parametrize("dtypes", LISTS, ids=str)
def test_decay_of_0_and_1(ema_, dtypes):
    averages, values = tensors(dtypes, 0), tensors(dtypes, 1)
    kept = copies(averages)
    ema_(averages, values, 1.0)
    assert_same_bits(averages, kept)
    ema_(averages, values, 0.0)
    assert_same_bits(averages, values)


def test_worked_numbers(ema_):
    """docs/algorithms.md#moving-average: decay = .9 and five weights."""
    weights = [[1.0, 1.0], [0.9, 1.2], [0.85, 1.15], [0.95, 1.05], [0.75, 1.05]]
    expected = [[1.0, 1.0], [0.99, 1.02], [0.976, 1.033], [0.9734, 1.0347], [0.95106, 1.03623]]
    average = torch.tensor(weights[0], dtype=torch.float64, device=DEVICE)
    for weight, value in zip(weights, expected, strict=True):
        ema_([average], [torch.tensor(weight, dtype=torch.float64, device=DEVICE)], 0.9)
        torch.testing.assert_close(average.cpu(), torch.tensor(value, dtype=torch.float64), rtol=0, atol=1e-12)


def test_different_layouts(ema_):
    """Sides that do not lie in memory alike, and nothing at all."""
    average, value = torch.zeros(6, 4, device=DEVICE), torch.ones(4, 6, device=DEVICE).t()
    ema_([average], [value], 0.75)
    assert (average == 0.25).all()
    ema_([], [], 0.5)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_bad_decay(ema_, decay):
    with pytest.raises(ValueError, match=f"decay must be from 0 to 1, got {decay}"):
        ema_([], [], decay)


@pytest.mark.skipif(kernels is None, reason="triton is not installed")
@pytest.mark.parametrize(("dtypes", "count"), [([torch.float32], 1), ([torch.float32, torch.bfloat16], 2)])
def test_one_launch_for_each_dtype(launches, dtypes, count):
    lists = [[t for t in tensors(dtypes, seed) if t.stride() != (6, 2)] for seed in (0, 1)]
    kernels.ema_(*lists, 0.9)  # uploads its tables once
    del launches[:]
    with Operations() as operations:
        kernels.ema_(*lists, 0.9)
    assert launches == ["_ema_kernel"] * count
    assert operations.names <= {"detach"}
