"""The trajectory loss, the kernel and its reference, against float64 and plain Python's view of the history."""

import itertools
import math

import exact_formulas
import pytest
import torch
import torch.nn.functional as F
from error_bounds import Bounded, assert_as_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, assert_same_bits, kernels, reference
from test_kernel_launches import Operations

from fastsam.kernels import ops, reference_common
from fastsam.kernels.reference import Past

F64, F32, F16, BF16, INT8 = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8
INF, NAN = float("inf"), float("nan")
N_SAMPLES, IGNORED = 70, -100


@pytest.fixture(params=["torch", "torch as on a device", "triton"])
def module(request, monkeypatch):
    """The launchers under test; whatever they leave unwritten is NaN."""
    if request.param == "triton" and kernels is None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(reference_common, "READ_SCALARS", request.param == "torch")
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(NAN) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    return kernels if request.param == "triton" else reference


def randn(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * scale


def classes_of(n, n_classes, seed=0):
    return torch.randint(0, n_classes, (n,), generator=torch.Generator().manual_seed(seed))


def probabilities(n, n_classes, seed=0):
    return randn(n, n_classes, seed=seed).softmax(1)


def history(n_classes, dtype, seed=1, **fields):
    """A history whose padding must not be used, all of it recorded in epoch 1."""
    width = -(-n_classes // 16) * 16
    rows, scales = randn(N_SAMPLES, width, seed=seed), None
    if dtype == INT8:
        rows = (rows * 20).round().clamp(-127, 127)
        scales = torch.linspace(0.02, 0.1, N_SAMPLES, device=DEVICE)
    rows[:, n_classes:] = 127 if dtype == INT8 else NAN
    tags = torch.ones(N_SAMPLES, dtype=torch.int32, device=DEVICE)
    errors = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    return Past(rows.to(DEVICE, dtype), scales, tags, epoch=4, wanted=1, errors=errors)._replace(**fields)


def clone(past):
    return Past(*(t.clone() if isinstance(t, torch.Tensor) else t for t in past))


def who_takes_part(past, targets):
    """Rows of the batch that read and write the history, and those that find a record, told in plain Python."""
    seen, part, found = set(), [], []
    for row, sample in enumerate(past.ids.tolist()):
        if (targets.dim() == 1 and targets[row] == IGNORED) or not 0 <= sample < len(past.rows) or sample in seen:
            continue
        seen.add(sample)
        part.append(row)
        found += [row] if past.tags[sample] == past.wanted else []
    return part, found


def past_of(past, n_classes):
    """The past logits of each row of the batch in float64, NaN where it has none, and what int8 is to be scaled by."""
    ids = past.ids.clamp(0, len(past.rows) - 1)
    return past.rows[ids, :n_classes].double(), None if past.scales is None else past.scales[ids]


def by_torch(logits, targets, t, found, *, tau, weight, label_smoothing=0.0):
    """Each row's loss and its gradient, by torch's own losses in float64; rows `found` have a past."""
    z = logits.detach().to(F64).requires_grad_()
    y = targets if targets.dim() == 1 else targets.to(F64)
    losses = F.cross_entropy(z, y, reduction="none", label_smoothing=label_smoothing, ignore_index=IGNORED)
    if len(found):
        log_p = F.log_softmax(t[found].to(F64) / tau, 1)
        log_q = F.log_softmax(z[found] / tau, 1)
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
        losses = losses.index_add(0, torch.tensor(found, device=z.device), weight * divergence)
    losses.sum().backward()
    return losses.detach(), z.grad


def bounded(logits, targets, t, found, scales=None, **options):
    """The same, with a bound on the errors of the arithmetic that the logits call for."""
    has_past = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    has_past[found] = True
    counted = targets != IGNORED if targets.dim() == 1 else torch.ones_like(has_past)
    truth = by_torch(logits, targets, t if scales is None else t * scales.double()[:, None], found, **options)
    made = exact_formulas.trajectory_loss(logits, targets, t, has_past, counted, scales=scales, **options)
    return [Bounded(value, bound.error, bound.dtype) for value, bound in zip(truth, made, strict=True)]


def ids_for(n, seed=0):
    """Samples in random order; among seven rows one comes twice, and two are not there."""
    ids = torch.randperm(N_SAMPLES, generator=torch.Generator().manual_seed(seed))[:n]
    if n >= 7:
        ids[2], ids[3], ids[4] = ids[0], -1, N_SAMPLES
    return ids.to(DEVICE)


def check(module, numbers_of_classes, dtype, history_dtype, sizes, soft=False, **options):
    """Loss, gradient, record and tags of batches of these sizes."""
    options = {"tau": 5.0, "weight": 7.5, **options}
    for n_classes, n in itertools.product(numbers_of_classes, sizes):
        logits = randn(n, n_classes, seed=n).to(DEVICE, dtype)
        targets = probabilities(n, n_classes).to(DEVICE, dtype) if soft else classes_of(n, n_classes).to(DEVICE)
        if n >= 7 and not soft:
            targets[1] = IGNORED
        past = history(n_classes, history_dtype, ids=ids_for(n), record=True)
        past.tags[past.ids[-1:]] = 0
        part, found = who_takes_part(past, targets)
        (t, scales), before = past_of(past, n_classes), clone(past)
        losses, gradient, scale = module.trajectory_loss(
            logits, targets, past, reduction="none", ignore_index=IGNORED, **options
        )
        assert losses.dtype == (F64 if dtype == F64 else F32)
        assert gradient.dtype == dtype
        assert scale.item() == 1
        assert_as_exact([losses, gradient], bounded(logits, targets, t, found, scales, **options))
        check_record(logits, before, past, part)
        n_outside = 2 if n >= 7 else 0
        assert past.errors[0] == n_outside
        assert past.errors[1] in ((-1, N_SAMPLES) if n_outside else (0,))


def check_record(logits, before, after, part):
    """Exactly the rows of those who take part have changed, into their logits."""
    n_classes, expected = logits.shape[1], clone(before)
    for row in part:
        sample, z = before.ids[row], logits[row]
        if before.scales is None:
            largest = 65504.0 if before.rows.dtype == F16 else INF
            expected.rows[sample, :n_classes] = z.clamp(-largest, largest).to(before.rows.dtype)
        else:
            scale = z.float().abs().max() / 127
            torch.testing.assert_close(after.scales[sample], scale, rtol=2**-23, atol=0)
            expected.scales[sample] = after.scales[sample]
            expected.rows[sample, :n_classes] = (z.float() / after.scales[sample]).round().to(INT8)
        expected.tags[sample] = before.epoch
    assert torch.equal(after.tags, expected.tags)
    untouched = torch.ones(N_SAMPLES, dtype=torch.bool)
    untouched[before.ids[part].cpu()] = False
    if before.rows.dtype == INT8:
        assert torch.equal(after.rows[:, :n_classes], expected.rows[:, :n_classes])
        assert torch.equal(after.rows[untouched], expected.rows[untouched])
        assert torch.equal(after.scales, expected.scales)
    else:
        assert_same_bits([after.rows[:, :n_classes]], [expected.rows[:, :n_classes]])
        assert_same_bits([after.rows[untouched]], [expected.rows[untouched]])


KINDS = [(F32, F16), (F32, INT8), (F32, F32), (F16, F32), (BF16, BF16), (BF16, INT8), (F64, F64), (F64, F16)]


@pytest.mark.parametrize(("dtype", "history_dtype"), KINDS)
def test_few_classes(module, dtype, history_dtype):
    check(module, (2, 3, 10, 16, 100), dtype, history_dtype, (1, 2, 7))
    check(module, (10,), dtype, history_dtype, (64,))


@pytest.mark.parametrize(("dtype", "history_dtype"), KINDS)
def test_many_classes(module, dtype, history_dtype):
    check(module, (1000, 1001, 4097), dtype, history_dtype, (7,))


@pytest.mark.parametrize(("dtype", "history_dtype"), [(F32, F16), (BF16, INT8)])
def test_as_many_classes_as_a_vocabulary(module, dtype, history_dtype):
    check(module, (50257,), dtype, history_dtype, (4,))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_targets(module, dtype, soft, label_smoothing):
    check(module, (10, 1001, 2049), dtype, F32, (13,), soft, label_smoothing=label_smoothing)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_targets_in_float64(module, soft, label_smoothing):
    logits, rows = (randn(9, 1500, seed=s).to(DEVICE) for s in (1, 2))
    targets = probabilities(9, 1500).to(DEVICE) if soft else classes_of(9, 1500).to(DEVICE)
    options = {"tau": 3.0, "weight": 2.0, "label_smoothing": label_smoothing}
    *found, _ = module.trajectory_loss(logits, targets, Past(rows), reduction="none", **options)
    expected = by_torch(logits, targets, rows, list(range(9)), **options)
    torch.testing.assert_close(tuple(found), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("n_classes", [10, 1000])
def test_teacher(module, n_classes, dtype):
    logits, rows = (randn(7, n_classes, seed=s).to(DEVICE, dtype) for s in (1, 2))
    targets = classes_of(7, n_classes).to(DEVICE)
    targets[3] = IGNORED
    found = [0, 1, 2, 4, 5, 6]
    kept = rows.clone()
    *fused, _ = module.trajectory_loss(logits, targets, Past(rows), tau=2.0, weight=3.0, reduction="none")
    assert_as_exact(fused, bounded(logits, targets, rows, found, tau=2.0, weight=3.0))
    assert torch.equal(rows, kept)
    assert fused[0][3] == 0
    assert (fused[1][3] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("n_ignored", [0, 2, 7])
def test_reductions(module, reduction, n_ignored):
    logits, targets, rows = randn(7, 10).to(DEVICE), classes_of(7, 10).to(DEVICE), randn(7, 10, seed=5).to(DEVICE)
    targets[:n_ignored] = IGNORED
    for past, found in ((None, []), (Past(rows), list(range(n_ignored, 7)))):
        loss, gradient, scale = module.trajectory_loss(logits, targets, past, tau=5.0, weight=7.5, reduction=reduction)
        losses, truth = by_torch(logits, targets, rows, found, tau=5.0, weight=7.5)
        count = 7 - n_ignored if reduction == "mean" else 1
        expected = losses.sum() / count if count else torch.tensor(NAN, dtype=F64, device=DEVICE)  # as torch's mean
        torch.testing.assert_close(loss, expected, equal_nan=True)
        torch.testing.assert_close(gradient * scale, truth / max(count, 1))
        assert scale.dtype == loss.dtype


def test_no_rows(module):
    logits, targets = torch.zeros(0, 5, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    past = history(5, F32, ids=targets, record=True)
    loss, gradient, scale = module.trajectory_loss(logits, targets, past, tau=1.0, weight=1.0)
    assert math.isnan(loss.item())
    assert gradient.shape == (0, 5)
    assert torch.isfinite(scale)
    module.record_(logits, past)
    assert (past.tags == 1).all()


def test_strides(module):
    base = randn(14, 40).to(DEVICE)
    targets = classes_of(28, 10).to(DEVICE)[::4]
    contiguous = module.trajectory_loss(base[::2, 3:13].contiguous(), targets.clone(), None, tau=1.0, weight=1.0)
    for logits in (base[::2, 3:13], base[::2, 3:13].t().contiguous().t()):
        found = module.trajectory_loss(logits, targets, None, tau=1.0, weight=1.0)
        torch.testing.assert_close(found, contiguous, rtol=1e-14, atol=1e-15)
    shares = probabilities(7, 10).to(DEVICE)
    expected = module.trajectory_loss(base[:7, :10], shares, Past(base[7:, :10]), tau=1.0, weight=1.0)
    others = shares.t().contiguous().t(), Past(base[7:, :10].t().contiguous().t())
    found = module.trajectory_loss(base[:7, :10], *others, tau=1.0, weight=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("n_classes", [10, 2049])
def test_repeats_bit_for_bit(module, n_classes):
    logits, targets = randn(30, n_classes).to(DEVICE, F32), classes_of(30, n_classes).to(DEVICE)
    runs = []
    for _ in range(2):
        past = history(n_classes, F16, ids=ids_for(30), record=True)
        runs.append((*module.trajectory_loss(logits, targets, past, tau=5.0, weight=7.5), past.rows[:, :n_classes]))
    assert_same_bits(*runs)


def test_worked_numbers(module):
    """docs/algorithms.md#trajectory-loss, to 1e-12 in float64."""
    rows, logits = (torch.tensor([v], dtype=F64, device=DEVICE) for v in ([2.0, 0.0, -1.0], [1.0, 0.5, -0.5]))
    y = torch.tensor([0], device=DEVICE)
    close = {"rtol": 0, "atol": 1e-12}

    def at(past, weight, **kwargs):
        loss, gradient, _ = module.trajectory_loss(logits, y, past, tau=5.0, weight=weight, **kwargs)
        return loss.cpu(), gradient[0].cpu()

    cross_entropy, cross_entropy_gradient = at(None, 0.0)
    for weight, kl, gradient in (
        (1.0, 0.01099093971692731, [-0.0145297129948176, 0.007988930175743592, 0.006540782819073982]),
        (25.0, 0.27477349292318276, [-0.36324282487044, 0.1997232543935898, 0.16351957047684954]),
    ):
        loss, found = at(Past(rows), weight)
        torch.testing.assert_close(loss - cross_entropy, torch.tensor(kl, dtype=F64), **close)
        torch.testing.assert_close(found - cross_entropy_gradient, torch.tensor(gradient, dtype=F64), **close)
    loss, found = at(Past(rows), 0.3 * 25)
    torch.testing.assert_close(loss, torch.tensor(0.686562653213683, dtype=F64), **close)
    expected = torch.tensor([-0.5624234601949524, 0.39141593674216846, 0.1710075234527837], dtype=F64)
    torch.testing.assert_close(found, expected, **close)
    loss, found = at(None, 0.0, label_smoothing=0.1)
    torch.testing.assert_close(loss, torch.tensor(0.6707972720033949, dtype=F64), **close)
    expected = torch.tensor([-0.3867839460671537, 0.29816562709075817, 0.08861831897639552], dtype=F64)
    torch.testing.assert_close(found, expected, **close)


def test_invariants_of_the_divergence(module):
    """docs/algorithms.md#invariant-22."""
    tau, logits, rows = 5.0, randn(6, 10).to(DEVICE), randn(6, 10, seed=1).to(DEVICE)
    rows[0] = logits[0] + 3
    y = classes_of(6, 10).to(DEVICE)

    def divergence(tau, weight):
        with_past = module.trajectory_loss(logits, y, Past(rows), tau=tau, weight=weight, reduction="none")
        without = module.trajectory_loss(logits, y, None, tau=tau, weight=weight, reduction="none")
        return with_past[0] - without[0], with_past[1] - without[1]

    kl, gradient = divergence(tau, tau**2)
    assert abs(kl[0]) < 1e-13
    assert (kl[1:] > 1e-3).all()
    torch.testing.assert_close(gradient.sum(1), torch.zeros(6, dtype=F64, device=DEVICE))
    expected = tau * ((logits / tau).softmax(1) - (rows / tau).softmax(1))
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)
    difference = rows - logits
    limit = (difference - difference.mean(1, keepdim=True)).square().sum(1) / 20
    kl, _ = divergence(1e4, 1e8)
    torch.testing.assert_close(kl, limit, rtol=1e-2, atol=1e-6)


def test_classes_without_probability(module):
    """-inf on both sides, in the past alone, and in the current logits alone."""
    logits = torch.tensor([[1.0, -INF, 0.0, 2.0], [1.0, 0.0, -1.0, 2.0], [1.0, -INF, 0.0, 2.0]], dtype=F64)
    rows = torch.tensor([[0.0, -INF, 1.0, 0.5], [0.0, -INF, 1.0, 0.5], [0.0, 1.0, 1.0, 0.5]], dtype=F64)
    losses, gradient, _ = module.trajectory_loss(
        logits.to(DEVICE), torch.tensor([0, 0, 0], device=DEVICE), Past(rows.to(DEVICE)), tau=2.0, weight=4.0,
        reduction="none",
    )  # fmt: skip
    kept = [0, 2, 3]
    expected = by_torch(logits[:1, kept], torch.tensor([0]), rows[:1, kept], [0], tau=2.0, weight=4.0)
    torch.testing.assert_close(losses[:1].cpu(), expected[0])
    torch.testing.assert_close(gradient[:1, kept].cpu(), expected[1])
    p, q = (rows[1] / 2).softmax(0), (logits[1] / 2).softmax(0)
    kl = (p[kept] * (p[kept] / q[kept]).log()).sum()
    torch.testing.assert_close(losses[1].cpu(), -logits[1].log_softmax(0)[0] + 4 * kl)
    assert losses[2] == INF
    own = logits.softmax(1) - torch.eye(4, dtype=F64)[0]
    torch.testing.assert_close(gradient.cpu(), own + 2 * ((logits / 2).softmax(1) - (rows / 2).softmax(1)))


@pytest.mark.parametrize("dtype", [F32, F16, INT8])
@pytest.mark.parametrize("bad", [NAN, INF, "all"])
def test_a_bad_record_is_no_past(module, dtype, bad):
    logits, y = randn(2, 5).to(DEVICE, F32), torch.tensor([1, 2], device=DEVICE)
    past = history(5, dtype, ids=torch.tensor([3, 8], device=DEVICE), record=True, epoch=2)
    spoilt = logits.clone()
    spoilt[0, slice(None) if bad == "all" else 2] = -INF if bad == "all" else bad
    module.record_(spoilt, past)
    losses, gradient, _ = module.trajectory_loss(
        logits, y, past._replace(wanted=2, epoch=3), tau=5.0, weight=7.5, reduction="none"
    )
    plain = module.trajectory_loss(logits, y, None, tau=5.0, weight=7.5, reduction="none")
    assert_same_bits((losses[:1], gradient[:1]), (plain[0][:1], plain[1][:1]))
    if dtype == F32:  # the other row's record is what it is now
        assert losses[1] == plain[0][1]
    assert past.tags[[3, 8]].tolist() == [3, 3]
    # and what was recorded over it is good again
    again, _, _ = module.trajectory_loss(
        logits - logits.mean(), y, past._replace(wanted=3), tau=0.1, weight=7.5, reduction="none"
    )
    assert torch.isfinite(again).all()


def test_float16_records_are_clamped(module):
    logits = torch.tensor([[1e6, -1e5, 0.0, 65504.0, 65519.0, -INF]], device=DEVICE)
    past = history(6, F16, ids=torch.tensor([1], device=DEVICE))
    module.record_(logits, past)
    assert past.rows[1, :6].tolist() == [65504.0, -65504.0, 0.0, 65504.0, 65504.0, -INF]


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1e-40, -1e-41, 0.0], [0.5, 1.5, 127.0], [-2.5, -254.0, 3.0]])
def test_int8_rounds_half_to_even(module, values):
    past = history(3, INT8, ids=torch.tensor([1], device=DEVICE))
    module.record_(torch.tensor([values], device=DEVICE), past)
    scale = max(max(map(abs, values)) / 127, 2.0**-126)
    assert past.scales[1].item() == pytest.approx(scale, rel=2**-23)
    assert past.rows[1, :3].tolist() == [round(v / scale) for v in values]  # Python rounds half to even


@pytest.mark.parametrize("dtype", [F32, F16, BF16, INT8])
@pytest.mark.parametrize("n_classes", [10, 2049])
def test_the_record_alone_is_the_same(module, dtype, n_classes):
    logits, targets = randn(9, n_classes).to(DEVICE, F32), classes_of(9, n_classes).to(DEVICE)
    targets[[0, 5]] = IGNORED  # the first of two rows with one id does not count
    past = history(n_classes, dtype, ids=ids_for(9), record=True)
    alone, expected = clone(past), clone(past)
    module.trajectory_loss(logits, targets, past, tau=1.0, weight=1.0)
    module.record_(logits, alone, targets, IGNORED)
    reference.record_(logits, expected, targets, IGNORED)
    for other in (alone, expected):
        integers = past.rows.element_size() == 1
        same = torch.equal if integers else lambda a, b: assert_same_bits([a], [b]) is None
        assert same(past.rows[:, :n_classes], other.rows[:, :n_classes])
        assert torch.equal(past.tags, other.tags)
        assert past.scales is None or torch.equal(past.scales, other.scales)
        assert past.errors[0] == other.errors[0] == 2
    assert past.tags[past.ids[2]] == 4


def test_nobody_takes_part(module):
    """Ids all out of range, then all ignored, then records all of another epoch."""
    logits, targets = randn(3, 10).to(DEVICE), torch.tensor([1, 2, 3], device=DEVICE)
    plain = module.trajectory_loss(logits, targets, None, tau=1.0, weight=1.0)
    past = history(10, F32, ids=torch.tensor([-5, 99, 1 << 40], device=DEVICE), record=True)
    before = clone(past)
    assert_same_bits(module.trajectory_loss(logits, targets, past, tau=1.0, weight=1.0), plain)
    assert past.errors[0] == 3
    past.errors.zero_()
    ignored = torch.full_like(targets, IGNORED)
    assert module.trajectory_loss(logits, ignored, past, tau=1.0, weight=1.0, reduction="sum")[0] == 0
    assert past.errors[0] == 0  # who is ignored is not asked for an id
    assert_same_bits([past.rows], [before.rows])
    assert torch.equal(past.tags, before.tags)
    past = past._replace(ids=torch.tensor([0, 1, 2], device=DEVICE), wanted=2)
    assert_same_bits(module.trajectory_loss(logits, targets, past, tau=1.0, weight=1.0), plain)
    assert past.tags[:4].tolist() == [4, 4, 4, 1]


def test_ids_without_an_error_tensor(module):
    past = history(10, F32, ids=torch.tensor([-5, 3], device=DEVICE), errors=None)
    loss, _, _ = module.trajectory_loss(randn(2, 10).to(DEVICE), past.ids.clamp(0), past, tau=1.0, weight=1.0)
    assert torch.isfinite(loss)


def test_reading_without_recording(module):
    past = history(10, F32, ids=torch.tensor([4, 5], device=DEVICE))
    before = clone(past)
    module.trajectory_loss(randn(2, 10).to(DEVICE), torch.tensor([0, 1], device=DEVICE), past, tau=1.0, weight=1.0)
    assert_same_bits([past.rows], [before.rows])
    assert torch.equal(past.tags, before.tags)


def test_a_target_that_is_no_class(module):
    logits, targets = randn(3, 4).to(DEVICE), torch.tensor([1, 4, 2], device=DEVICE)
    if module is reference:
        with pytest.raises(IndexError, match="4 is out of bounds"):
            module.trajectory_loss(logits, targets, None, tau=1.0, weight=1.0)
        return
    losses, gradient, _ = module.trajectory_loss(logits, targets, None, tau=1.0, weight=1.0, reduction="none")
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]


GAPS = st.one_of(st.floats(-5, 5, width=32), st.sampled_from([-1200.0, -600.0, 600.0, 1200.0, 65504.0]))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([F64, F32]), st.sampled_from([0.5, 1.0, 5.0]), st.booleans())
def test_logits_far_apart(data, dtype, tau, by_kernel):
    n = data.draw(st.integers(2, 6))
    z = torch.tensor(data.draw(st.lists(GAPS, min_size=n, max_size=n)), dtype=F64)
    t = torch.tensor(data.draw(st.lists(GAPS, min_size=n, max_size=n)), dtype=F64)
    y = data.draw(st.integers(0, n - 1))
    launchers = kernels if by_kernel and kernels is not None else reference
    logits, rows = (x.to(DEVICE, dtype)[None] for x in (z, t))
    targets, options = torch.tensor([y], device=DEVICE), {"tau": tau, "weight": tau**2}
    *found, _ = launchers.trajectory_loss(logits, targets, Past(rows), reduction="none", **options)
    assert_as_exact(found, bounded(logits, targets, rows, [0], **options))


@pytest.mark.skipif(kernels is None, reason="triton is not installed")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_one_launch_and_no_waiting(reduction):
    from fastsam.kernels import launch, launch_tables

    # A store that the tables of other tests have filled would drop all it holds, at any time.
    launch_tables.forget()
    names = []

    def counted(kernel, n_programs, *args, **constants):
        names.append((kernel.__name__, n_programs))

    logits, targets = randn(6, 10).to(DEVICE, F32), classes_of(6, 10).to(DEVICE)
    past = history(10, INT8, ids=ids_for(6), record=True)
    with launch.observed_by(counted):
        kernels.trajectory_loss(logits, targets, past, tau=5.0, weight=1.0)  # uploads its numbers once
    del names[:]
    with launch.observed_by(counted), Operations() as operations:
        kernels.trajectory_loss(logits, targets, past, tau=5.0, weight=1.0, reduction=reduction)
        kernels.record_(logits, past, targets)
    assert names == [("_trajectory_loss_kernel", 6), ("_record_kernel", 6)]
    assert operations.names <= {"empty", "select", "detach"}


def test_the_reference_does_not_wait_for_a_device(monkeypatch):
    monkeypatch.setattr(reference_common, "READ_SCALARS", False)
    logits, targets = randn(9, 10).to(F32), classes_of(9, 10)
    past = history(10, INT8, ids=ids_for(9).cpu(), record=True)
    past = Past(*(t.cpu() if isinstance(t, torch.Tensor) else t for t in past))
    with Operations() as operations:
        reference.trajectory_loss(logits, targets, past, tau=5.0, weight=1.0)
    assert "index_copy_" in operations.names


def test_dispatch(backend):
    chosen = ops._pick([torch.ones(1, device=DEVICE)])
    assert chosen.__name__ == "fastsam.kernels." + ("triton_backend" if backend == "triton" else "reference")
    for name in ("trajectory_loss", "record_"):
        assert callable(getattr(chosen, name))


Z, Y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
GOOD = Past(torch.zeros(4, 3), None, torch.zeros(4, dtype=torch.int32), Y)
BAD = [
    ({"logits": torch.zeros(3)}, r"logits must be \[n, C\].*got \(3,\)"),
    ({"logits": Z.int()}, r"got \(2, 3\) torch\.int32"),
    ({"targets": Y.int()}, r"targets must be int64 \[2\].*got \(2,\) torch\.int32"),
    ({"targets": torch.zeros(2)}, r"class probabilities \[2, 3\], got \(2,\) torch\.float32"),
    ({"tau": 0.0}, r"tau must be positive, got 0\.0"),
    ({"reduction": "batch"}, "unknown reduction 'batch'; choose one of 'none', 'sum', 'mean'"),
    ({"past": Past(torch.zeros(2, 4))}, r"teacher's logits must be floating \[2, 3\], got \(2, 4\)"),
    ({"past": GOOD._replace(rows=torch.zeros(4, 2))}, r"3 or more\], got \(4, 2\)"),
    ({"past": GOOD._replace(rows=torch.zeros(4, 3, dtype=torch.int16))}, r"got \(4, 3\) torch\.int16"),
    ({"past": GOOD._replace(rows=torch.zeros(4, 3, dtype=INT8))}, "scales belong to an int8 history"),
    ({"past": GOOD._replace(scales=torch.ones(4))}, r"to no other, got a history of torch\.float32"),
    ({"past": GOOD._replace(tags=None)}, r"tags must be a contiguous torch\.int32 \[4\], got None"),
    ({"past": GOOD._replace(ids=Y[:1])}, r"ids must be a contiguous torch\.int64 \[2\], got \(1,\)"),
    ({"past": GOOD._replace(errors=Y.int())}, r"errors must be a contiguous torch\.int64 \[2\]"),
    ({"past": GOOD._replace(tags=GOOD.tags.to("meta"))}, "past must be on the logits' device, cpu"),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
@pytest.mark.parametrize("implementation", [reference, kernels], ids=["torch", "triton"])
def test_bad_arguments(implementation, changed, message):
    if implementation is None:
        pytest.skip("triton is not installed")
    arguments = {"logits": Z, "targets": Y, "past": None, "tau": 1.0, "weight": 1.0, **changed}
    with pytest.raises(ValueError, match=message):
        implementation.trajectory_loss(**arguments)
    with pytest.raises(ValueError, match="only a history records"):
        implementation.record_(Z, Past(Z))
