"""ESAM: stochastic weight perturbation and sharpness-sensitive data selection."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from methods import WAYS
from problems import assert_same, batches, cnn, largest_difference, losses_of, mlp, snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsam import ESAM, SAF, SAM
from fastsam.kernels import ops, philox
from fastsam.testing import check_step

SGD = torch.optim.SGD
X, Y = batches(1, rows=128)[0]


def esam(model, **keywords):
    return ESAM(model.parameters(), SGD, **{"rho": 0.1, "lr": 0.1, "momentum": 0.9, "model": model, **keywords})


def masks(opt):
    return opt._kept()


# stochastic weight perturbation


@pytest.mark.parametrize("batchnorm", [False, True])
def test_keeping_everything_is_sam_bit_for_bit(backend, batchnorm):
    model, other = mlp(batchnorm=batchnorm, dropout=0.3), mlp(batchnorm=batchnorm, dropout=0.3)
    opt, expected = esam(model, beta=1.0, gamma=1.0), SAM(other.parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9,
                                                          model=other)  # fmt: skip
    for x, y in batches(5):
        torch.manual_seed(3)
        opt.step(losses_of(model), x, y)
        torch.manual_seed(3)
        expected.step(losses_of(other), x, y)
    assert_same(model, snapshot(other))


def test_the_tensor_mask_is_drawn_anew_for_each_step_by_seed_and_step(backend):
    model = mlp()
    drawn = []
    opt = esam(model, beta=0.5, gamma=1.0, seed=11)
    for step, (x, y) in enumerate(batches(40)):
        drawn.append(masks(opt))
        expected = [w < 2**31 for w in philox.first_words(4, step, 11)]
        assert drawn[-1] == expected
        opt.step(losses_of(model), x, y)
    share = sum(map(sum, drawn)) / 160
    assert 0.35 < share < 0.65
    assert len({tuple(d) for d in drawn}) > 8


@pytest.mark.parametrize("norm", ["masked", "full", "estimated"])
def test_masked_tensors_are_not_touched_and_the_others_by_rho_over_beta(backend, norm):
    model = mlp()
    opt = esam(model, beta=0.5, gamma=1.0, norm=norm)
    for x, y in batches(12):
        before, kept = snapshot(model), masks(opt)
        params = list(model.parameters())
        g = torch.autograd.grad(losses_of(model)(x, y).mean(), params)
        with opt.ascent():
            losses_of(model)(x, y).mean().backward() if any(kept) else None
        with opt.descent():
            part = math.sqrt(sum((gi**2).sum().item() for gi, k in zip(g, kept, strict=True) if k or norm == "full"))
            part = (part / math.sqrt(0.5) if norm == "estimated" else part) + 1e-12
            for p, w, gi, k in zip(params, before.values(), g, kept, strict=True):
                if k:
                    torch.testing.assert_close(p.detach(), w + 0.1 / 0.5 * gi / part, rtol=1e-10, atol=1e-13)
                else:
                    assert torch.equal(p, w)
            losses_of(model)(x, y).mean().backward()
            assert all(p.grad is not None for p in params)
        opt.step()
        opt.zero_grad()


class Quadratic(nn.Module):
    """L(w) = w'Aw/2 - b'w of docs/algorithms.md#the-quadratic."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        self.a = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)

    def forward(self):
        return self.w @ self.a @ self.w / 2 - self.w[0] + self.w[1]


@pytest.mark.parametrize(
    ("norm", "mean", "square"),
    [
        ("full", (0.05547001962252292, 0.08320502943378438), 0.01666666666666667),
        ("masked", (0.07328201177351375, 0.08992301766027064), 0.023333333333333338),
    ],
)
def test_element_masks_enumerated(backend, monkeypatch, norm, mean, square):
    """The mean of eps over all 2^P masks, weighted by their probability; only with "full" it is SAM's eps."""
    total, total_square = torch.zeros(2, dtype=torch.float64), 0.0
    seen = {}
    for step in range(200):  # enough draws to meet every mask
        q = Quadratic()
        opt = ESAM(q.parameters(), SGD, rho=0.1, lr=0.1, beta=0.6, gamma=1.0, mask="element", norm=norm)
        opt.param_groups[0]["fastsam_step"] = step
        bits = tuple((philox.words(2, 0, step, 0) < philox.threshold(0.6)).tolist())
        with opt.ascent():
            q().backward()
        with opt.descent():
            eps = q.w.detach() - torch.tensor([1.0, 2.0], dtype=torch.float64)
        assert tuple((eps != 0).tolist()) == bits
        if bits in seen:
            assert torch.equal(eps, seen[bits])
        seen[bits] = eps
    assert len(seen) == 4
    for bits in itertools.product([True, False], repeat=2):
        probability = 0.6 ** sum(bits) * 0.4 ** (2 - sum(bits))
        total += probability * seen[bits]
        total_square += probability * (seen[bits] ** 2).sum().item()
        if norm == "masked" and any(bits):
            assert seen[bits].norm().item() == pytest.approx(0.1 / 0.6, rel=1e-11)
    assert total.tolist() == pytest.approx(list(mean), rel=1e-11)
    assert total_square == pytest.approx(square, rel=1e-11)


class Work(TorchDispatchMode):
    """Counts the matrix products of linear layers and the outputs asked of convolution backwards."""

    def __init__(self):
        super().__init__()
        self.mm, self.conv_weights = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.mm += 1
        if func is torch.ops.aten.convolution_backward.default:
            self.conv_weights += args[-1][1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["masked", "full"])
def test_weight_gradients_of_masked_tensors_are_not_computed(backend, monkeypatch, norm):
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4))).double()
    x = torch.randn(5, 6, dtype=torch.float64)

    def losses(x):
        return model(x).square().mean(1)

    work = {}
    full = 4 + 4 + 3  # forwards, weight gradients, input gradients (none for the batch itself)
    for kept in ([True] * 4, [True, False, False, True], [False, False, False, True]):
        opt = ESAM(model.parameters(), SGD, rho=0.1, lr=0.0, gamma=1.0, norm=norm)
        monkeypatch.setattr(opt, "_kept", lambda kept=kept: kept)
        with Work() as count:
            opt.step(losses, x)
        work[tuple(kept)] = count.mm - full  # the second pass computes all
    masked = {(True,) * 4: full, (True, False, False, True): full - 2, (False, False, False, True): full - 3 - 3}
    assert work == (masked if norm == "masked" else dict.fromkeys(masked, full))


def test_convolutions_skip_their_weight_gradient_too(backend, monkeypatch):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(48, 10))
    opt = ESAM(model.parameters(), SGD, rho=0.1, lr=0.1, gamma=1.0)
    monkeypatch.setattr(opt, "_kept", lambda: [True, True, False, False, True, True])
    with Work() as count:
        opt.step(losses_of(model), torch.randn(4, 1, 8, 8), torch.arange(4))
    assert count.conv_weights == 1 + 2, "one in the first pass, and both in the second"


@pytest.mark.parametrize("function", [False, True])
def test_gradients_are_left_out_where_the_graph_holds_no_function_but_safs(monkeypatch, function):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    model, computed = mlp(), []
    x, y = batches(1)[0]
    saf = SAF(len(x), 3, lag=1, start_epoch=1, reduction="none")
    opt = esam(model, gamma=1.0)
    monkeypatch.setattr(opt, "_kept", lambda: [False, False, True, True])
    model[0].weight.register_post_accumulate_grad_hook(lambda p: computed.append(p))

    def losses(x, y, ids):
        return saf(Double.apply(model(x)) if function else model(x), y, ids)

    for epoch in (1, 2):
        saf.set_epoch(epoch)
        opt.step(losses, x, y, torch.arange(len(x)))
    assert len(computed) == (4 if function else 2)


@pytest.mark.parametrize("norm", ["masked", "full", "estimated"])
@pytest.mark.parametrize("frozen", [False, True])
def test_kept_tensors_without_a_gradient_make_a_base_step(backend, monkeypatch, norm, frozen):
    """One head for each task, on a backbone that may be frozen; the mask keeps another task's head."""
    model, plain = (nn.ModuleList([mlp()[0], nn.Linear(8, 3), nn.Linear(8, 3)]).double() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    opt, base = esam(model, norm=norm), SGD(plain.parameters(), lr=0.1, momentum=0.9)
    monkeypatch.setattr(opt, "_kept", lambda: [False, False, False, False, True, True])

    def losses_with(model):
        model[0].requires_grad_(not frozen)
        return lambda x, y: F.cross_entropy(model[1](torch.tanh(model[0](x))), y, reduction="none")

    for x, y in batches(3):
        opt.step(losses_with(model), x, y)
        base.zero_grad()
        losses_with(plain)(x, y).mean().backward()
        base.step()
        assert opt.last_selected_fraction == 1.0
    assert largest_difference(model, plain) < 1e-15


def test_a_step_that_fails_does_not_repeat_its_mask_and_a_resumed_run_goes_on_alike(backend):
    def failing(*batch):
        raise MemoryError

    ends = []
    for is_resumed in (False, True):
        model = mlp()
        opt = esam(model, gamma=1.0, beta=0.5, seed=1)
        for step, (x, y) in enumerate(batches(4)):
            drawn = {tuple(masks(opt))}
            for _ in range(3):
                with pytest.raises(MemoryError):
                    opt.step(failing, x, y)
                drawn.add(tuple(masks(opt)))
                with pytest.raises(MemoryError), opt.ascent():
                    failing()
                opt.zero_grad()
                drawn.add(tuple(masks(opt)))
            assert len(drawn) > 2
            if is_resumed and step == 2:
                saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
                opt = esam(model := mlp(seed=5), gamma=1.0, beta=0.5)
                for part, state in zip((model, opt), saved, strict=True):
                    part.load_state_dict(state)
            opt.step(losses_of(model), x, y)
        ends.append(snapshot(model))
    assert_same(model, ends[0])


def test_an_empty_mask_is_a_plain_base_step_in_one_pass(backend, monkeypatch):
    model, plain, passes = mlp(batchnorm=True), mlp(batchnorm=True), []
    opt = esam(model)
    monkeypatch.setattr(opt, "_kept", lambda: [False] * 5)

    def losses(x, y):
        passes.append(1)
        return losses_of(model)(x, y)

    base = SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches(3):
        opt.step(losses, x, y)
        base.zero_grad()
        losses_of(plain)(x, y).mean().backward()
        base.step()
    assert len(passes) == 3
    assert largest_difference(model, plain) < 1e-15
    assert opt.param_groups[0]["fastsam_step"] == 3, "the next step draws another mask"


def test_a_non_finite_ascent_skips_the_step(backend):
    model = mlp()
    opt = esam(model, seed=4)
    opt.step(losses_of(model), X, Y)
    before, buffers = snapshot(model), copy.deepcopy(opt.state_dict()["state"])
    calls = []

    def losses(x, y):
        calls.append(1)
        return losses_of(model)(x, y) * (float("inf") if len(calls) == 1 else 1.0)

    opt.step(losses, X, Y)
    assert_same(model, before)
    assert opt.skipped_steps == 1
    for i, entries in buffers.items():
        assert torch.equal(entries["momentum_buffer"], opt.state_dict()["state"][i]["momentum_buffer"])
    opt.step(losses_of(model), X, Y)
    assert opt.skipped_steps == 1


# sharpness-sensitive data selection


class Logistic(nn.Module):
    """docs/algorithms.md#logistic-regression."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def losses(self, x, y):
        return F.softplus(-y * (x @ self.w))


POINTS = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.5, -1.5]], dtype=torch.float64)
LABELS = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("selection", ["reforward", "reuse"])
@pytest.mark.parametrize(
    ("strict", "gradient"),
    [
        (False, (-0.49131649171115044, -0.45502098251114326)),
        (True, (-0.5605433826933748, -1.1210867653867496)),
    ],
)
def test_worked_numbers_of_selection(backend, strict, gradient, selection):
    m = Logistic()
    opt = ESAM(m.parameters(), SGD, rho=0.1, lr=1.0, beta=1.0, gamma=2 / 3, strict=strict, selection=selection)
    opt.step(m.losses, POINTS, LABELS)
    moved = torch.tensor([0.3, -0.2], dtype=torch.float64) - m.w.detach()
    assert moved.tolist() == pytest.approx(list(gradient), rel=1e-11)
    assert opt.last_selected_fraction == pytest.approx((1 if strict else 2) / 3)


def test_reforward_and_reuse_agree_without_batch_norm(backend):
    model, other = mlp(), mlp()
    opt, expected = esam(model, selection="reforward"), esam(other, selection="reuse")
    for x, y in batches(6, rows=33):
        opt.step(losses_of(model), x, y)
        expected.step(losses_of(other), x, y)
    assert largest_difference(model, other) < 1e-12


@pytest.mark.parametrize("batchnorm", [False, True])
@pytest.mark.parametrize(
    ("n", "gamma", "k"),
    [(128, 0.5, 64), (16, 0.5, 8), (7, 0.7, 4), (3, 0.1, 1), (10, 0.3, 3), (5, 0.999, 4), (1, 0.5, 1)],
)
def test_exactly_k_rows_with_the_largest_deltas_are_used(backend, n, gamma, k, batchnorm):
    if batchnorm and n == 1:
        return  # torch itself refuses batch statistics of one row
    k = max(k, 2) if batchnorm else k
    model, seen = mlp(batchnorm=batchnorm), []
    opt = esam(model, gamma=gamma, beta=1.0)
    before = snapshot(model)

    def losses(x, y):
        values = losses_of(model)(x, y)
        seen.append((x, values.detach(), torch.is_grad_enabled()))
        return values

    x, y = X[:n], Y[:n]
    opt.step(losses, x, y)
    if k == n:
        assert [len(s[0]) for s in seen] == [n, n]
        return
    assert [len(s[0]) for s in seen] == [n, n, k]
    assert [s[2] for s in seen] == [True, False, True], "the selection forward must keep no activations"
    delta = seen[1][1] - seen[0][1]
    rows = [(x == row).all(1).nonzero().item() for row in seen[2][0]]
    assert rows == sorted(rows)
    chosen, rest = delta[rows], delta[[i for i in range(n) if i not in rows]]
    if len(rest):
        assert chosen.min() >= rest.max()
        assert chosen.mean() >= delta.mean() >= rest.mean()
    assert opt.last_selected_fraction == k / n
    if batchnorm:  # one update, of the first forward
        witness = mlp(batchnorm=True)
        witness.load_state_dict(before)
        witness(x)
        assert all(map(torch.equal, model.buffers(), witness.buffers()))


@pytest.mark.parametrize("strict", [False, True])
def test_the_authors_code_keeps_63_of_128_rows(backend, strict):
    model, sizes = mlp(), []
    opt = esam(model, gamma=0.5, strict=strict)

    def losses(x, y):
        sizes.append(len(x))
        return losses_of(model)(x, y)

    opt.step(losses, X, Y)
    assert sizes == [128, 128, 63 if strict else 64]


def test_ties_take_the_lower_rows_and_strict_has_none_to_take(backend):
    model, seen = mlp(), []
    x, y = X[:1].repeat(9, 1), Y[:1].repeat(9)

    def losses(x, y, tag):
        seen.append(tag)
        return losses_of(model)(x, y)

    esam(model).step(losses, x, y, torch.arange(9))
    assert seen[-1].tolist() == [0, 1, 2, 3]
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"strict=True found no row above the 4 largest deltas.*strict=False"):
        esam(model, strict=True).step(losses_of(model), x, y)
    assert_same(model, before)


def test_rows_whose_loss_turns_nan_come_last(backend):
    model, seen = mlp(), []

    def losses(x, y, tag):
        seen.append(tag)
        values = losses_of(model)(x, y)
        return torch.where(tag >= 6, float("nan"), values) if len(seen) == 2 else values

    opt = esam(model)
    opt.step(losses, X[:8], Y[:8], torch.arange(8))
    assert len(seen[-1]) == 4
    assert not {6, 7} & set(seen[-1].tolist())


def test_gamma_one_needs_no_selection_forward(backend):
    model, calls = mlp(), []
    opt = esam(model, gamma=1.0)

    def losses(x, y):
        calls.append(len(x))
        return losses_of(model)(x, y)

    opt.step(losses, X, Y)
    assert calls == [128, 128]


def test_both_forwards_that_are_compared_draw_the_same_dropout(backend):
    model, seen = mlp(dropout=0.5), []
    model[2].register_forward_hook(lambda m, args, out: seen.append(out == 0))
    opt = esam(model)
    torch.manual_seed(0)
    opt.step(losses_of(model), X, Y)
    assert torch.equal(seen[0], seen[1])
    after = torch.rand(3)
    torch.manual_seed(0)
    losses_of(mlp(dropout=0.5))(X, Y)
    torch.manual_seed(0)
    plain = mlp(dropout=0.5)
    torch.manual_seed(0)
    losses_of(plain)(X, Y)
    assert torch.equal(after, torch.rand(3))


def test_a_loss_that_differentiates_inside_is_tried_without_gradients_once(backend):
    """And draws the first pass's numbers; whatever else it raises is raised."""
    model, modes, draws = mlp(dropout=0.5), [], []
    model[2].register_forward_hook(lambda m, args, out: draws.append(out == 0))

    def losses(x, y):
        modes.append(torch.is_grad_enabled())
        rows = losses_of(model)(x, y)
        rows.mean().backward(retain_graph=True)
        return rows

    opt = esam(model, beta=1.0)
    opt.step(losses, X, Y)
    assert modes == [True, False, True, True]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
    opt.step(losses, X, Y)
    assert modes[4:] == [True, True, True]
    for error in (ZeroDivisionError, RuntimeError):

        def broken(x, y, error=error):
            if not torch.is_grad_enabled():
                raise error("a reason of its own")
            return losses_of(model)(x, y)

        with pytest.raises(error, match="a reason of its own"):
            esam(model).step(broken, X, Y)


def test_nested_batches_are_cut_to_the_chosen_rows(backend):
    model, seen = mlp(), []

    def losses(batch, scale):
        seen.append({"x": batch["x"], "pair": batch["pair"]})
        return losses_of(model)(batch["x"], batch["pair"][0]) * scale

    esam(model).step(losses, {"x": X, "pair": (Y, X[:, :1]), "name": "kept"}, 2.0)
    assert [len(s["x"]) for s in seen] == [len(s["pair"][1]) for s in seen] == [128, 128, 64]
    rows = seen[-1]
    assert torch.equal(rows["x"][:, :1], rows["pair"][1])


@pytest.mark.parametrize(("name", "mask"), [("torch", "tensor"), ("triton", "element")])
def test_compiled_models_take_a_mask_without_recompiling(choose, name, mask):
    if name == "triton" and ops._triton_backend() is None:
        pytest.skip("triton is not installed")
    choose(name)
    torch._dynamo.reset()
    model = cnn()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    opt = ESAM(model.parameters(), SGD, rho=0.05, model=compiled, lr=0.05, gamma=1.0, mask=mask)
    x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            opt.step(losses_of(compiled), x, y)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("error", "needle", "keywords"),
    [
        (ValueError, r"beta must be finite and in \(0, 1\], got 0", {"beta": 0}),
        (ValueError, r"beta must be finite and in \(0, 1\], got 1.5", {"beta": 1.5}),
        (ValueError, r"beta must be finite and in \(0, 1\], got nan", {"beta": float("nan")}),
        (TypeError, "beta must be a number, got '0.5'", {"beta": "0.5"}),
        (ValueError, r"gamma must be finite and in \(0, 1\], got -0.1", {"gamma": -0.1}),
        (ValueError, "mask must be one of 'tensor', 'element', got 'row'", {"mask": "row"}),
        (ValueError, "norm must be one of 'masked', 'full', 'estimated', got 'l2'", {"norm": "l2"}),
        (ValueError, "selection must be one of 'reforward', 'reuse', got 'slice'", {"selection": "slice"}),
    ],
)
def test_bad_arguments(error, needle, keywords):
    with pytest.raises(error, match=needle):
        esam(mlp(), **keywords)


@pytest.mark.parametrize("call", ["ascent", "first_step", "closure"])
def test_selection_needs_a_loss_function_and_says_so(backend, call):
    model = mlp()
    opt = esam(model)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"cannot select rows \(gamma=0.5\); use opt.step\(loss_fn, \*batch\)"):
        {"ascent": opt.ascent, "first_step": opt.first_step, "closure": lambda: opt.step(lambda: None)}[call]()
    assert_same(model, before)


@pytest.mark.parametrize("selection", ["reforward", "reuse"])
def test_losses_that_are_wrong_in_a_later_pass_leave_the_weights_alone(backend, selection):
    model = mlp()
    opt = esam(model, selection=selection)
    for bad_call, expected in ((2, TypeError), (3, TypeError)):
        before, calls = snapshot(model), []

        def losses(x, y, calls=calls, bad_call=bad_call):
            calls.append(1)
            values = losses_of(model)(x, y)
            return values.mean() if len(calls) == bad_call else values

        if selection == "reuse" and bad_call == 3:
            continue
        with pytest.raises(expected, match="returned a scalar"):
            opt.step(losses, X, Y)
        assert_same(model, before)
    with pytest.raises(RuntimeError, match="losses have no gradient"):
        opt.step(lambda x, y: losses_of(model)(x, y).detach(), X, Y)


# what the last step masked and selected, and masks that are given


def selected(mask, norm="masked", gamma=0.5, steps=3, given=None, selection="reforward"):
    """Train, with the masks that are given or drawn; return the optimizer, its model and the selections."""
    model, found = mlp(), []
    options = {"mask": mask, "norm": norm, "gamma": gamma, "seed": 4, "selection": selection}
    opt = ESAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, **options)
    for i, batch in enumerate(batches(steps)):
        opt.given_mask = None if given is None else given[i]
        opt.step(losses_of(model), *batch)
        found.append(opt.last_selection)
    return opt, model, found


@pytest.mark.parametrize("selection", ["reforward", "reuse"])
def test_the_last_selection_is_that_of_the_equations(backend, selection):
    _, _, found = selected("tensor", selection=selection, steps=1)
    model, (x, y) = mlp(), batches(1)[0]
    params = list(model.parameters())
    before = losses_of(model)(x, y)
    g = torch.autograd.grad(before.mean(), params)
    words = philox.first_words(len(params), 0, 4)
    mask = [word < philox.threshold(0.6) for word in words]
    norm = torch.stack([g_n.square().sum() for g_n, m in zip(g, mask, strict=True) if m]).sum().sqrt()
    with torch.no_grad():
        for p, g_n, m in zip(params, g, mask, strict=True):
            p.add_(0.5 / 0.6 * m * g_n / norm)
    after = losses_of(model)(x, y)
    rows = (after - before).topk(6).indices.sort().values
    left = torch.tensor([i for i in range(12) if i not in rows.tolist()])
    assert found[0].mask == mask
    assert found[0].rows.tolist() == rows.tolist()
    for ours, truth in (
        (found[0].before, before),
        (found[0].after, after),
        (found[0].deltas, after - before),
        (torch.stack(found[0].plus), torch.stack([before[rows].mean(), after[rows].mean()])),
        (torch.stack(found[0].minus), torch.stack([before[left].mean(), after[left].mean()])),
    ):
        torch.testing.assert_close(ours, truth.detach())


@pytest.mark.parametrize("norm", ["masked", "full", "estimated"])
@pytest.mark.parametrize("mask", ["tensor", "element"])
def test_masks_that_are_given_make_the_step_of_masks_that_are_drawn(backend, mask, norm):
    _, drawn, selections = selected(mask, norm)
    masks = [selection.mask for selection in selections]
    assert len({str(m) for m in masks}) > 1
    opt, given, again = selected(mask, norm, given=masks)
    assert largest_difference(drawn, given) < 1e-12
    for a, b in zip(selections, again, strict=True):
        assert a.rows.tolist() == b.rows.tolist()
    opt.given_mask = None
    assert opt.given_mask is None


def test_a_given_mask_that_keeps_nothing_is_the_base_step(backend):
    _, model, found = selected("tensor", given=[[False] * 4] * 3)
    assert found == [None] * 3
    plain = mlp()
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    for x, y in batches(3):
        base.zero_grad()
        losses_of(plain)(x, y).mean().backward()
        base.step()
    assert largest_difference(model, plain) < 1e-14


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_other_steps_leave_no_selection(backend, gamma):
    opt, model, found = selected("tensor", gamma=gamma)
    assert (found[-1] is None) == (gamma == 1)
    if gamma == 1:
        return
    opt.param_groups[0]["gamma"] = 1.0
    opt.step(losses_of(model), *batches(1)[0])
    assert opt.last_selection is None


def test_the_last_mask_stays_what_it_was(backend):
    opt, _, found = selected("tensor")
    opt.param_groups[0]["beta"] = 0.05
    assert opt.last_selection.mask == found[-1].mask


@pytest.mark.parametrize("way", ["closure", "contexts", "first_step"])
def test_ways_that_select_nothing_leave_no_selection(backend, way):
    opt, model, _ = selected("tensor")
    opt.param_groups[0]["gamma"] = 1.0
    WAYS[{"first_step": "two_steps"}.get(way, way)](opt, losses_of(model), *batches(1)[0])
    assert opt.last_selection is None


def test_a_given_mask_that_fits_no_longer_is_refused(backend):
    opt, model, _ = selected("tensor")
    opt.given_mask = [True, False, True, True]
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2).double())]})
    before = snapshot(model)
    with pytest.raises(ValueError, match="an entry for each of the 5 parameters, got 4"):
        opt.step(losses_of(model), *batches(1)[0])
    assert_same(model, before)


def test_check_step_knows_given_masks(choose):
    choose("torch")
    model = mlp()
    opt = ESAM(model.parameters(), SGD, rho=0.5, lr=0.1, seed=4, model=model)
    opt.step(losses_of(model), *batches(1)[0])
    before = opt.last_selection, opt.last_perturbed_loss
    for mask in ([True, False, False, True], None):
        opt.given_mask = mask
        check_step(opt, losses_of(model), *batches(1)[0])
    assert torch.equal(opt.last_selection.after, before[0].after)
    assert torch.equal(opt.last_perturbed_loss, before[1])


@pytest.mark.parametrize(
    ("mask", "given", "error", "needle"),
    [
        ("tensor", [True] * 3, ValueError, "an entry for each of the 4 parameters, got 3"),
        ("tensor", [1, True, True, True], TypeError, r"given_mask\[0\] must be a bool or a bool tensor, got 1"),
        ("tensor", [torch.ones(8, 6, dtype=torch.bool), *[True] * 3], ValueError, "needs mask='element'"),
        ("element", [torch.ones(8, 6), *[True] * 3], TypeError, "must be a bool or a bool tensor"),
        ("element", [torch.ones(8, dtype=torch.bool), *[True] * 3], ValueError, r"of shape \[8, 6\], got \[8\]"),
    ],
)
def test_a_bad_mask_is_named(mask, given, error, needle):
    opt = ESAM(mlp().parameters(), torch.optim.SGD, mask=mask, lr=0.1)
    with pytest.raises(error, match=needle):
        opt.given_mask = given
    assert opt.given_mask is None
