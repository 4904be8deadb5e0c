"""The Triton kernels that restore and step: SGD, Adam and AdamW against torch's own steps and against float64."""

import pytest
import torch
from error_bounds import assert_as_exact
from exact_formulas import adam_step, sgd_step
from kernel_cases import DEVICE, DTYPES, LISTS, assert_same_bits, copies, kernels, reference, tensors

from fastsam.kernels.reference import AdamOptions, SGDOptions

if kernels is None:
    pytest.skip("triton is not installed", allow_module_level=True)
from fastsam.kernels import launch

SGD = {
    "plain": SGDOptions(0.1),
    "momentum": SGDOptions(0.1, momentum=0.9, weight_decay=0.01),
    "damped": SGDOptions(0.1, momentum=0.9, dampening=0.3, maximize=True),
    "nesterov": SGDOptions(0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
}
ADAM = {
    "adam": AdamOptions(0.1, weight_decay=0.01),
    "adamw": AdamOptions(0.1, weight_decay=0.1, decoupled=True),
    "beta1=0": AdamOptions(0.1, beta1=0.0, beta2=0.5, eps=1e-3, maximize=True),
    "amsgrad": AdamOptions(0.1, amsgrad=True),
}
SCALERS = pytest.mark.parametrize("scaler", [None, (8.0, 0.0), (8.0, 1.0), (None, 1.0)], ids=str)


def scalar(value):
    return None if value is None else torch.tensor(value, device=DEVICE)


def dense(ts):
    return [t for t in ts if t.stride() != (6, 2)]


@SCALERS
@pytest.mark.parametrize("options", SGD)
@pytest.mark.parametrize("dtypes", LISTS, ids=str)
def test_sgd(dtypes, options, scaler):
    o, (scale, found) = SGD[options], scaler or (None, None)
    weights, sources, grads, buffers = (tensors(dtypes, seed) for seed in range(4))
    before = [copies(part) for part in (weights, sources, grads, buffers)]
    momentum = buffers if o.momentum else [None] * len(weights)
    addresses = [w.data_ptr() for w in weights]
    kernels.restore_sgd_step_(
        weights, sources, grads, momentum, [o] * len(weights), grad_scale=scalar(scale), found_inf=scalar(found)
    )
    assert_same_bits(sources, before[1])
    assert addresses == [w.data_ptr() for w in weights]
    if found:
        assert_same_bits(weights, before[1])
        assert_same_bits(grads, before[2])
        assert_same_bits(buffers, before[3])
        return
    rows = list(zip(before[1], before[2], before[3] if o.momentum else momentum, strict=True))
    expected = [sgd_step(*row, o, scale) for row in rows]
    for found, own in zip((weights, grads, momentum), zip(*expected, strict=True), strict=True):
        if found[0] is not None:
            assert_as_exact(found, own)
    if scale is None:
        assert_same_bits(grads, before[2])


@SCALERS
@pytest.mark.parametrize("options", ADAM)
@pytest.mark.parametrize("dtypes", LISTS, ids=str)
def test_adam(dtypes, options, scaler):
    o, (scale, found) = ADAM[options], scaler or (None, None)
    weights, sources, grads, means = (tensors(dtypes, seed) for seed in range(4))
    squares = [t.abs_() for t in tensors(dtypes, 4)]
    largest = [torch.zeros_like(v) if o.amsgrad else None for v in squares]
    steps = [torch.tensor(float(7 * i), device=DEVICE) for i in range(len(weights))]
    before = [copies(part) for part in (weights, sources, grads, means, squares, steps)]
    addresses = [t.data_ptr() for t in weights + steps]
    kernels.restore_adam_step_(
        weights, sources, grads, means, squares, largest, steps, [o] * len(weights),
        grad_scale=scalar(scale), found_inf=scalar(found),
    )  # fmt: skip
    assert_same_bits(sources, before[1])
    assert addresses == [t.data_ptr() for t in weights + steps]
    if found:
        for now, then in zip((weights, grads, means, squares, steps), before[1:], strict=True):
            assert_same_bits(now, then)
        return
    assert [s.item() for s in steps] == [7.0 * i + 1 for i in range(len(weights))]
    rows = [(*row, 7 * i + 1) for i, row in enumerate(zip(*before[1:5], strict=True))]
    expected = [adam_step(*row, o, scale) for row in rows]
    for found, own in zip((weights, grads, means, squares), zip(*expected, strict=True), strict=True):
        assert_as_exact(found, own)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
def test_states_and_gradients_of_other_dtypes(optimizer, state_dtype):
    sizes = (63, 2048)
    for dtype in DTYPES:
        weights, sources = tensors([dtype], 0, sizes=sizes), tensors([dtype], 1, sizes=sizes)
        grads, means = tensors([state_dtype], 2, sizes=sizes), tensors([state_dtype], 3, sizes=sizes)
        squares = [t.abs_() for t in tensors([state_dtype], 4, sizes=sizes)]
        lists = [weights, sources, grads, means] + ([squares] if optimizer == "adam" else [])
        before = [copies(part) for part in lists]
        n = len(weights)
        if optimizer == "sgd":
            kernels.restore_sgd_step_(*lists, [SGD["nesterov"]] * n)
            expected = [sgd_step(*row, SGD["nesterov"]) for row in zip(*before[1:], strict=True)]
        else:
            steps = [torch.zeros((), device=DEVICE) for _ in weights]
            kernels.restore_adam_step_(*lists, [None] * n, steps, [ADAM["adam"]] * n)
            expected = [adam_step(*row, 1, ADAM["adam"]) for row in zip(*before[1:], strict=True)]
        for found, column in ((weights, 0), *zip(lists[3:], (2, 3), strict=False)):
            assert_as_exact(found, [own[column] for own in expected])


def test_groups_share_a_launch_and_keep_their_own_options(launches):
    weights, sources, grads, buffers = (tensors([torch.float32], seed, sizes=(63, 300)) for seed in range(4))
    weights, sources, grads, buffers = map(dense, (weights, sources, grads, buffers))
    options = [[SGD["momentum"], SGD["damped"], SGD["nesterov"]][i % 3] for i in range(len(weights))]
    lr = torch.tensor(0.3, device=DEVICE)
    options[-1] = options[-1]._replace(lr=lr)
    before = [copies(part) for part in (sources, grads, buffers)]
    kernels.restore_sgd_step_(weights, sources, grads, buffers, options)
    assert launches == ["_restore_sgd_step_kernel"]
    for i, row in enumerate(zip(*before, strict=True)):
        assert_as_exact(weights[i : i + 1], sgd_step(*row, options[i])[:1])


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lr_as_a_tensor_is_read_when_the_step_runs(dtype, lr_dtype):
    lr = torch.tensor(0.25, dtype=lr_dtype, device=DEVICE)
    weights, steps = [torch.ones(70, device=DEVICE, dtype=dtype)], [torch.zeros((), device=DEVICE)]
    grads, zeros = [torch.ones_like(weights[0])], [[torch.zeros_like(weights[0])] for _ in range(2)]
    for expected, value in ((0.75, 0.25), (0.25, 0.5)):
        lr.fill_(value)
        kernels.restore_sgd_step_(weights, weights, grads, [None], [SGDOptions(lr)])
        assert torch.equal(weights[0], torch.full_like(weights[0], expected))
    kernels.restore_adam_step_(weights, weights, grads, *zeros, [None], steps, [AdamOptions(lr, eps=0.0)])
    torch.testing.assert_close(weights[0], torch.full_like(weights[0], -0.25))


def test_the_step_counter_of_a_tensor_of_many_chunks_advances_once(monkeypatch):
    monkeypatch.setattr(launch, "_INTERPRETED_BLOCK_SIZE", 64)
    lists = [[t for t in tensors([torch.float32], seed, sizes=(0, 1, 1000)) if t.dim() < 4] for seed in range(3)]
    squares = [t.abs_() for t in lists[2]]
    weights, grads, means = lists
    steps = [torch.zeros((), device=DEVICE) for _ in weights]
    for i in range(3):
        skip = torch.tensor(float(i == 1), device=DEVICE)
        kernels.restore_adam_step_(
            weights, weights, grads, means, squares, [None] * len(weights), steps, [ADAM["adam"]] * len(weights),
            found_inf=skip,
        )  # fmt: skip
        assert {s.item() for s in steps} == {1.0 + (i == 2)}


def test_weights_that_were_not_perturbed_step_from_themselves():
    weights, grads = tensors([torch.float32]), tensors([torch.float32], 1)
    expected = copies(weights)
    kernels.restore_sgd_step_(weights, weights, grads, [None] * len(weights), [SGD["plain"]] * len(weights))
    reference.restore_sgd_step_(
        expected, expected, copies(grads), [None] * len(expected), [SGD["plain"]] * len(expected)
    )
    for w, t in zip(weights, expected, strict=True):
        torch.testing.assert_close(w, t)
