"""The rule of exactness: no luck of a processor breaks it, nor a GPU's fast exp and division, and it has teeth."""

import math

import pytest
import torch
from error_bounds import Bounded, assert_as_exact, share_of_bound
from exact_formulas import adam_step, moving_average, perturbed, scaled_norm, sgd_step
from interpreter import plant_errors, plant_fault
from kernel_cases import DEVICE, LISTS, copies, kernels, reference, tensors
from test_trajectory_loss import bounded, check, classes_of, randn

from fastsam.kernels.reference import AdamOptions, Past, SGDOptions
from fastsam.kernels.tensor_list import Backup

F64, F32, F16, BF16, INT8 = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8
SHAPES = (63, 4096)


@pytest.fixture(params=["torch", "triton"])
def launchers(request):
    if request.param == "triton" and kernels is None:
        pytest.skip("triton is not installed")
    return kernels if request.param == "triton" else reference


@pytest.fixture
def interpreted():
    """The kernels, where their text can be changed."""
    if kernels is None or not kernels.INTERPRETED:
        pytest.skip("the kernels are not interpreted here")
    return kernels


def lists(dtypes, n_lists):
    made = [tensors(dtypes, seed, sizes=SHAPES) for seed in range(n_lists)]
    return made, [copies(some) for some in made]


def norm_case(launchers, dtypes=(F32,), etas=(None,)):
    """Norms of lists of different lengths, since a single number may be right by chance."""
    (grads, weights), _ = lists(dtypes, 2)
    grads, weights = ([some[i:] for i in range(len(some))] for some in (grads, weights))
    all_etas = [[etas[i % len(etas)] for i in range(len(some))] for some in grads]
    cases = list(zip(grads, weights, all_etas, strict=True))
    return [launchers.norm(*case) for case in cases], [scaled_norm(*case) for case in cases]


def perturb_case(launchers, dtypes=(F32,), eta=None):
    (weights, grads), (before, _) = lists(dtypes, 2)
    norm = torch.tensor(3.7, dtype=F64, device=DEVICE)
    launchers.perturb_(weights, grads, Backup(weights), norm, [0.5] * len(weights), [eta] * len(weights))
    return weights, [perturbed(w, g, 0.5, eta, norm) for w, g in zip(before, grads, strict=True)]


def sgd_case(launchers, dtypes=(F32,), o=SGDOptions(0.1, 0.9, 0.3, 0.01)):  # noqa: B008
    (weights, grads, buffers), before = lists(dtypes, 3)
    launchers.restore_sgd_step_(weights, weights, grads, buffers, [o] * len(weights))
    rows = [sgd_step(*row, o) for row in zip(*before, strict=True)]
    return weights + buffers, [row[0] for row in rows] + [row[2] for row in rows]


def adam_case(launchers, dtypes=(F32,), o=AdamOptions(0.1, eps=0.01), step=1):  # noqa: B008
    (weights, grads, means, squares), _ = lists(dtypes, 4)
    squares = [v.abs_() for v in squares]
    rows = list(zip(*map(copies, (weights, grads, means, squares)), strict=True))
    steps = [torch.tensor(step - 1.0, device=DEVICE) for _ in weights]
    none, options = [None] * len(weights), [o] * len(weights)
    launchers.restore_adam_step_(weights, weights, grads, means, squares, none, steps, options)
    expected = [adam_step(*row, step, o) for row in rows]
    return weights + means + squares, [row[i] for i in (0, 2, 3) for row in expected]


def average_case(launchers, dtypes=(F32,), decay=0.99):
    (averages, values), (before, _) = lists(dtypes, 2)
    launchers.ema_(averages, values, decay)
    return averages, [moving_average(v, w, decay) for v, w in zip(before, values, strict=True)]


def loss_case(launchers, dtypes=(F32,), n_classes=100, label_smoothing=0.1):
    (dtype,) = dtypes
    logits, rows = (randn(40, n_classes, seed=seed).to(DEVICE, dtype) for seed in (1, 2))
    targets = classes_of(40, n_classes).to(DEVICE)
    options = {"tau": 5.0, "weight": 7.5, "label_smoothing": label_smoothing}
    *found, _ = launchers.trajectory_loss(logits, targets, Past(rows), reduction="none", **options)
    return found, bounded(logits, targets, rows, list(range(40)), **options)


def sum_case(launchers, dtype=F64):
    """Sums of float32 losses, of which the first is large; `dtype` is that of the sum."""
    logits, targets = randn(40, 3, scale=0.3).to(DEVICE, F32), classes_of(40, 3).to(DEVICE)
    logits[0, targets[0]] = -1.7e7  # float32 goes on in steps of 2
    options = {"tau": 1.0, "weight": 1.0}
    losses, _, _ = launchers.trajectory_loss(logits, targets, None, reduction="none", **options)
    found, expected = [], []
    for n in range(24, 41, 4):
        total, _, _ = launchers.trajectory_loss(logits[:n], targets[:n], None, reduction="sum", **options)
        found.append(total[None])
        expected.append(Bounded.exact(losses[:n], dtype).sum(0))
    return found, expected


CASES = [norm_case, perturb_case, sgd_case, adam_case, average_case, loss_case]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_bounds_hold_and_are_near(launchers, case, dtype):
    share = share_of_bound(*case(launchers, (dtype,)))
    assert share <= 1
    # in float64 the truth may round as the code under test does; the reference sums every norm in float64
    is_in_float64 = dtype == F64 or (case is norm_case and launchers is reference)
    assert share > 1 / 20 or is_in_float64


def test_sums_of_losses(launchers):
    """A kernel adds in float64 and rounds once; plain torch adds in float32."""
    assert share_of_bound(*sum_case(launchers, F32 if launchers is reference else F64)) <= 1


@pytest.mark.parametrize("n_classes", [3, 10, 1000, 5000])
def test_bounds_of_losses_are_near_for_any_number_of_classes(launchers, n_classes):
    for found, expected in zip(*loss_case(launchers, (F32,), n_classes), strict=True):
        assert 1 / 20 < share_of_bound([found], [expected]) <= 1


@pytest.mark.parametrize("direction", ["either", "up", "down"])
@pytest.mark.parametrize("case", CASES)
def test_errors_of_fast_instructions_are_allowed(interpreted, monkeypatch, case, direction):
    before = [t.clone() for t in case(interpreted)[0]]
    plant_errors(monkeypatch, direction)
    found, expected = case(interpreted)
    assert_as_exact(found, expected)
    uses_them = case in (adam_case, loss_case)
    assert uses_them == (not all(map(torch.equal, found, before)))


@pytest.mark.parametrize("direction", ["either", "up", "down"])
@pytest.mark.parametrize("dtypes", LISTS, ids=str)
def test_steps_with_errors_of_fast_instructions(interpreted, monkeypatch, dtypes, direction):
    plant_errors(monkeypatch, direction)
    for step, o in ((1, AdamOptions(0.1)), (8, AdamOptions(0.1, weight_decay=0.1, decoupled=True))):
        assert_as_exact(*adam_case(interpreted, dtypes, o, step))


@pytest.mark.parametrize("direction", ["either", "up", "down"])
@pytest.mark.parametrize(("dtype", "history_dtype"), [(F32, F16), (F32, INT8), (BF16, BF16), (F64, F64)])
def test_losses_with_errors_of_fast_instructions(interpreted, monkeypatch, dtype, history_dtype, direction):
    plant_errors(monkeypatch, direction)
    check(interpreted, (2, 10, 100), dtype, history_dtype, (1, 7, 20))
    check(interpreted, (1000, 5000), dtype, history_dtype, (2,))


def bf16(text):
    """Kernel text that rounds a float32 value to bfloat16 and back."""
    return f"({text}).to(tl.bfloat16).to(tl.float32)"


ADAMW = AdamOptions(0.1, weight_decay=0.1, decoupled=True)
FAULTS = {
    "norm, bfloat16": ("norm", "product = widen(g, COMPUTE)", f"product = {bf16('g')}", norm_case, {}),
    "norm, no eta": ("norm", " + eta.to(COMPUTE), 1.0)", ", 1.0)", norm_case, {"etas": (None, 0.5)}),
    "norm, float32 over chunks": ("norm", "tl.sum(sums)", "tl.sum(sums.to(tl.float32))", norm_case, {"dtypes": (F64,)}),
    "norm, float32 in a chunk": (
        "norm", "tl.sum(product * product)", "tl.sum((product * product).to(tl.float32))", norm_case, {"dtypes": (F64,)}
    ),
    "perturb, bfloat16": ("perturb", "widen(g, COMPUTE) * scale", bf16("g * scale"), perturb_case, {}),
    "perturb, 16-bit weights": (
        "perturb", "widen(g, COMPUTE) * scale", bf16("widen(g, COMPUTE) * scale"), perturb_case, {"dtypes": (F16,)}
    ),
    "perturb, no eta": ("perturb", " + eta, 1.0)", ", 1.0)", perturb_case, {"eta": 0.01}),
    "perturb, T for T^2": ("perturb", "eps * t * t", "eps * t", perturb_case, {"eta": 0.01}),
    "perturb, no T^2": ("perturb", "eps * t * t", "eps", perturb_case, {"eta": 0.01}),
    "sgd, bfloat16": (
        "restore_step", "momentum * widen(m, COMPUTE)", bf16("momentum * widen(m, COMPUTE)"), sgd_case, {}
    ),
    "sgd, no weight decay": ("restore_step", "grad + decay * value", "grad", sgd_case, {}),
    "sgd, no momentum": ("restore_step", "momentum * widen(m, COMPUTE) + ", "", sgd_case, {}),
    "sgd, not Nesterov's": (
        "restore_step", "grad + momentum * buffer", "buffer", sgd_case, {"o": SGDOptions(0.1, 0.9, nesterov=True)}
    ),
    "adam, bfloat16": ("restore_adam_step", "(mean / (root + eps))", bf16("mean / (root + eps)"), adam_case, {}),
    "adam, bfloat16 root": ("restore_adam_step", "root + eps)", f"{bf16('root')} + eps)", adam_case, {}),
    "adam, no eps": ("restore_adam_step", "root + eps)", "root)", adam_case, {}),
    "adam, float32 correction": (
        "restore_adam_step", "tl.sqrt(1 - tl.exp2(step * tl.load(set_ptr + 8)))",
        "tl.sqrt(1 - tl.exp2((step * tl.load(set_ptr + 8)).to(tl.float32))).to(tl.float64)", adam_case, {},
    ),
    "adamw, no weight decay": ("restore_adam_step", "value * shrinkage", "value", adam_case, {"o": ADAMW}),
    "average, bfloat16": ("ema", "v + weight * (w - v)", f"v + weight * {bf16('w - v')}", average_case, {}),
    "loss, bfloat16": (
        "loss_blocks", "gradient = tl.exp(shifted)", f"gradient = {bf16('tl.exp(shifted)')}", loss_case, {}
    ),
    "loss, bfloat16 past": ("loss_blocks", "- p * p_factor", f"- {bf16('p')} * p_factor", loss_case, {}),
    "loss, no smoothing": ("loss_blocks", " + smoothing / n_classes.to(COMPUTE)", "", loss_case, {}),
    "loss, no quotient": ("trajectory_loss", " - tl.log(p_sum / q_sum)", "", loss_case, {}),
    "loss, float32 in float64": (
        "loss_blocks", "tl.sum(tl.exp(z - shift))", "tl.sum(tl.exp(z - shift).to(tl.float32)).to(tl.float64)",
        loss_case, {"dtypes": (F64,)},
    ),
    "sum of losses, float32": (
        "loss_blocks", "tl.sum(sums)", "tl.sum(sums.to(tl.float32)).to(tl.float64)", sum_case, {}
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_loss_of_accuracy_is_found(interpreted, monkeypatch, tmp_path, fault):
    from fastsam.kernels import ema, loss_blocks, norm, perturb, restore_adam_step, restore_step, trajectory_loss

    modules = (ema, loss_blocks, norm, perturb, restore_adam_step, restore_step, trajectory_loss)
    name, old, new, case, arguments = FAULTS[fault]
    assert_as_exact(*case(interpreted, **arguments))
    module = next(m for m in modules if m.__name__ == f"fastsam.kernels.{name}")
    plant_fault(monkeypatch, tmp_path, module, old, new)
    with pytest.raises(AssertionError, match="of its bound"):
        assert_as_exact(*case(interpreted, **arguments))


def whole_numbers(launchers):
    """The norm of whole numbers: chunks have sums that float32 holds, and what is added in float64 is exact."""
    grads = [torch.arange(300.0 + i, device=DEVICE) - 150 for i in range(40)]
    square = sum(int(g.long().square().sum()) for g in grads)
    return launchers.norm(grads).item(), math.sqrt(square)


def test_chunks_are_added_in_float64(launchers, monkeypatch, tmp_path):
    found, expected = whole_numbers(launchers)
    assert found == expected
    if launchers is not kernels or not kernels.INTERPRETED:
        return
    from fastsam.kernels import norm

    plant_fault(monkeypatch, tmp_path, norm, "tl.sum(sums)", "tl.sum(sums.to(tl.float32))")
    found, expected = whole_numbers(launchers)
    assert found != expected


OPERATIONS = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: a - b,
    "product": lambda a, b: a * b,
    "quotient": lambda a, b: a / b,
    "root": lambda a, b: a.abs().sqrt(),
    "exp": lambda a, b: a.exp(),
    "log": lambda a, b: a.abs().log(),
    "with a number": lambda a, b: 0.1 * a,
}


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_operation_comes_near_its_bound(operation, dtype):
    a, b = (randn(3000, seed=seed).to(dtype) for seed in (1, 2))
    found = OPERATIONS[operation](a, b)
    expected = OPERATIONS[operation](Bounded.exact(a, dtype), Bounded.exact(b, dtype))
    share = share_of_bound([found], [expected])
    assert share <= 1
    if dtype == F32:
        assert share > (0.05 if operation in ("quotient", "exp", "log") else 0.4)
        wrong = found * (1 + 12 * torch.finfo(dtype).eps)
        with pytest.raises(AssertionError, match="of its bound"):
            assert_as_exact([wrong], [expected])


def test_a_running_sum_in_float32_is_out_of_bounds():
    x = torch.full((1 << 16,), 0.1)
    expected = Bounded.exact(x, F32).sum(0)
    assert share_of_bound([x.sum(0, keepdim=True)], [expected]) <= 1
    running = x.numpy().cumsum(dtype="float32")[-1:]
    with pytest.raises(AssertionError, match="of its bound"):
        assert_as_exact([torch.from_numpy(running.copy())], [expected])


def test_cancellation_keeps_the_errors_of_the_terms():
    a = randn(1000).float()
    third = Bounded.exact(a, F32) * (1 / 3)
    assert (third * 3 - Bounded.exact(a, F32)).error.min() > 0
    nothing = Bounded.exact(a, F32) - Bounded.exact(a, F32)
    assert nothing.error.max() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_exact(bad):
    truth = Bounded.exact(torch.ones(3), F32)
    with pytest.raises(AssertionError, match="of its bound"):
        assert_as_exact([torch.tensor([1.0, bad, 1.0])], [truth])
    with pytest.raises(AssertionError, match="shape"):
        assert_as_exact([torch.ones(4)], [truth])
    assert_as_exact([torch.ones(3)], [truth])


def test_the_rounding_to_a_narrow_dtype_is_half_a_unit():
    values = randn(4096)
    for dtype in (F16, BF16):
        share = share_of_bound([values.float().to(dtype)], [Bounded.exact(values.float(), F32)])
        assert 0.9 < share <= 1
        with pytest.raises(AssertionError, match="of its bound"):
            assert_as_exact(
                [torch.nextafter(values.to(dtype), torch.tensor(math.inf, dtype=dtype))], [Bounded.exact(values, F32)]
            )
