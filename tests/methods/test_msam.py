"""mSAM: each shard of the batch perturbed by itself, their gradients summed."""

import copy
import gc
import weakref
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from problems import assert_same, batches, cnn, largest_difference, losses_of, mlp, snapshot
from test_esam import LABELS, POINTS, Logistic
from torch import nn

from fastsam import MSAM, SAM

SGD = torch.optim.SGD
X, Y = batches(1, rows=13)[0]
OddBatch = namedtuple("OddBatch", "x y")


def msam(model, **keywords):
    sizes = {} if "shard_size" in keywords else {"num_shards": 3}
    return MSAM(
        model.parameters(), SGD, **{"rho": 0.1, "lr": 0.1, "momentum": 0.9, "model": model, **sizes, **keywords}
    )


def shares_of(sizes, weighting="sample"):
    return [1 / len(sizes) if weighting == "uniform" else size / sum(sizes) for size in sizes]


def oracle_gradient(model, x, y, sizes, rho=0.1, weighting="sample"):
    """docs/algorithms.md#msam in plain torch: d over shards of these sizes; running statistics stay as they were."""
    params = list(model.parameters())
    start = [b.clone() for b in model.buffers()]
    d = [torch.zeros_like(p) for p in params]
    for xs, ys, share in zip(x.split(sizes), y.split(sizes), shares_of(sizes, weighting), strict=True):
        w = [p.detach().clone() for p in params]
        g = torch.autograd.grad(F.cross_entropy(model(xs), ys), params)
        norm = torch.sqrt(sum((gi**2).sum() for gi in g)) + 1e-12
        with torch.no_grad():
            for p, gi in zip(params, g, strict=True):
                p.add_(rho * gi / norm)
        v = torch.autograd.grad(F.cross_entropy(model(xs), ys), params)
        with torch.no_grad():
            for p, wi, di, vi in zip(params, w, d, v, strict=True):
                p.copy_(wi)
                di.add_(share * vi)
    with torch.no_grad():
        for b, s in zip(model.buffers(), start, strict=True):
            b.copy_(s)
    return d


def oracle_statistics(model, x, sizes, bn_update):
    """Batch norm's running statistics after a step, from one forward of each shard at w."""
    start = {name: b.clone() for name, b in model.named_buffers()}
    after = []
    twin = copy.deepcopy(model)
    for xs in x.split(sizes):
        if bn_update == "mean":
            twin.load_state_dict(start, strict=False)
        twin(xs)
        after.append({name: b.clone() for name, b in twin.named_buffers()})
    if bn_update == "sequential":
        return after[-1]
    shares = shares_of(sizes)
    return {
        name: sum(share * a[name] for share, a in zip(shares, after, strict=True)) if b.is_floating_point() else b + 1
        for name, b in start.items()
    }


def with_pairs(opt, losses, x, y, sizes):
    for xs, ys, share in zip(x.split(sizes), y.split(sizes), shares_of(sizes), strict=True):
        with opt.ascent():
            losses(xs, ys).mean().backward()
        with opt.descent():
            (losses(xs, ys).mean() * share).backward()
    opt.step()
    opt.zero_grad()


# the gradient


CUTS = [
    ({"num_shards": 1}, [13]),
    ({"num_shards": 2}, [7, 6]),
    ({"num_shards": 5}, [3, 3, 3, 2, 2]),
    ({"shard_size": 4}, [4, 4, 4, 1]),
    ({"shard_size": 13}, [13]),
    ({"shard_size": 99}, [13]),
    ({"num_shards": 13}, [1] * 13),
]


@pytest.mark.parametrize("weighting", ["sample", "uniform"])
@pytest.mark.parametrize(("cut", "sizes"), CUTS)
def test_trajectory_equals_the_papers_equations(backend, cut, sizes, weighting):
    model, expected = mlp(), mlp()
    opt = msam(model, weighting=weighting, **cut)
    base = SGD(expected.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches(3, rows=13):
        for p, d in zip(expected.parameters(), oracle_gradient(expected, x, y, sizes, 0.1, weighting), strict=True):
            p.grad = d
        mean_before = losses_of(expected)(x, y).mean().item()
        base.step()
        assert opt.step(losses_of(model), x, y).item() == pytest.approx(mean_before, rel=1e-12)
    assert largest_difference(model, expected) < 1e-12
    assert largest_difference(model, mlp()) > 1e-2, "nothing was trained"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bn_update", ["mean", "sequential"])
def test_one_shard_is_sam_bit_for_bit(backend, dtype, bn_update):
    model, other = (mlp(dtype, batchnorm=True, dropout=0.3) for _ in range(2))
    opt = msam(model, num_shards=1, bn_update=bn_update)
    sam = SAM(other.parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9, model=other)
    for x, y in batches(2, dtype=dtype):
        losses = []
        for o, m in ((opt, model), (sam, other)):
            torch.manual_seed(3)
            losses.append(o.step(losses_of(m), x, y))
        assert torch.equal(*losses)
        assert torch.equal(opt.last_grad_norm, sam.last_grad_norm[None])
    assert_same(model, snapshot(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [{"num_shards": 3}, {"shard_size": 5}])
def test_pairs_are_the_same_step(backend, dtype, cut):
    """Way 2, bit for bit: draws of dropout and of stochastic rounding too."""
    model, other = (mlp(dtype, dropout=0.3) for _ in range(2))
    opt, by_pairs = (msam(m, **cut) for m in (model, other))
    for x, y in batches(3, rows=13, dtype=dtype):
        torch.manual_seed(3)
        opt.step(losses_of(model), x, y)
        torch.manual_seed(3)
        with_pairs(by_pairs, losses_of(other), x, y, [5, 4, 4] if "num_shards" in cut else [5, 5, 3])
    assert_same(model, snapshot(other))
    assert opt.param_groups[0]["fastsam_step"] == 9, "every shard has its own draws"


def test_convolutions_in_single_precision(backend):
    model, expected = cnn(), cnn(torch.float64)
    opt = msam(model, num_shards=3, momentum=0.0)
    x, y = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(5)), torch.arange(8)
    statistics = oracle_statistics(expected, x.double(), [3, 3, 2], "mean")
    d = oracle_gradient(expected, x.double(), y, [3, 3, 2])
    opt.step(losses_of(model), x, y)
    for p, di in zip(model.parameters(), d, strict=True):
        torch.testing.assert_close(p.grad.double(), di, rtol=1e-4, atol=1e-6)
    for name, b in model.named_buffers():
        torch.testing.assert_close(b.double(), statistics[name].double(), rtol=1e-5, atol=1e-6)


class Quadratics(nn.Module):
    """Row i's loss is w'A_i w/2 - b_i'w: docs/algorithms.md#two-shards."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        self.a = torch.tensor([[[3.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 4.0]]], dtype=torch.float64)
        self.b = torch.tensor([[1.0, -1.0], [0.0, 3.0]], dtype=torch.float64)

    def losses(self, which):
        return torch.einsum("i,nij,j->n", self.w, self.a[which], self.w) / 2 - self.b[which] @ self.w


@pytest.mark.parametrize(
    ("rows", "cut", "weighting", "gradient"),
    [
        ([0, 1], {"num_shards": 2}, "sample", (2.6346133509075855, 5.80705617438323)),
        ([0, 0, 0, 1], {"shard_size": 3}, "uniform", (2.6346133509075855, 5.80705617438323)),
        ([0, 0, 0, 1], {"shard_size": 3}, "sample", (3.442114219604469, 6.014468126436661)),
        ([0, 1], {"num_shards": 1}, "sample", (2.6282789127333674, 5.793800090453841)),
    ],
)
def test_worked_numbers(backend, rows, cut, weighting, gradient):
    q = Quadratics()
    opt = MSAM(q.parameters(), SGD, rho=0.1, lr=0.1, weighting=weighting, **cut)
    opt.step(q.losses, torch.tensor(rows))
    assert q.w.grad.tolist() == pytest.approx(list(gradient), rel=1e-11)
    if len(set(rows)) == opt.last_grad_norm.numel() == 2:
        assert opt.last_grad_norm.tolist() == pytest.approx([52**0.5, 26**0.5], rel=1e-15)


def test_worked_numbers_of_single_samples(backend):
    m = Logistic()
    MSAM(m.parameters(), SGD, rho=0.1, lr=1.0, num_shards=3).step(m.losses, POINTS, LABELS)
    assert m.w.grad.tolist() == pytest.approx([-0.4074731729430397, -0.10162334304023306], rel=1e-11)


def test_without_a_radius_every_split_is_the_base_optimizer(backend):
    for cut in ({"num_shards": 5}, {"shard_size": 3}):
        model, plain = mlp(), mlp()
        opt, base = msam(model, rho=0.0, **cut), SGD(plain.parameters(), lr=0.1, momentum=0.9)
        for x, y in batches(4, rows=13):
            opt.step(losses_of(model), x, y)
            base.zero_grad()
            losses_of(plain)(x, y).mean().backward()
            base.step()
        assert largest_difference(model, plain) < 1e-12


def test_copies_of_one_shard_are_sam_on_it(backend):
    model, other = mlp(), mlp()
    opt, sam = msam(model, num_shards=4), SAM(other.parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9)
    for x, y in batches(3, rows=5):
        opt.step(losses_of(model), x.repeat(4, 1), y.repeat(4))
        sam.step(losses_of(other), x, y)
    assert largest_difference(model, other) < 1e-12


def test_order_matters_across_shards_alone(backend):
    def gradient(order):
        model = mlp()
        msam(model, num_shards=3).step(losses_of(model), X[:12][order], Y[:12][order])
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    rows = torch.arange(12)
    expected = gradient(rows)
    shards = torch.cat([rows[8:], rows[:4], rows[4:8]])
    within = rows.view(3, 4).flip(1).flatten()
    across = torch.cat([rows[6:], rows[:6]])
    for order in (shards, within):
        torch.testing.assert_close(gradient(order), expected, rtol=1e-12, atol=1e-14)
    assert (gradient(across) - expected).abs().max() > 1e-4


def test_parallel_shard_gradients_are_sams(backend):
    """A linear model with squared loss: shards that pull along one line are perturbed alike."""
    x = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.5, 1.0], [3.0, 6.0]], dtype=torch.float64)
    weights = []
    for build in (SAM, lambda *args, **kwargs: MSAM(*args, num_shards=2, **kwargs)):
        model = nn.Linear(2, 1, bias=False).double()
        nn.init.constant_(model.weight, 1.0)
        opt = build(model.parameters(), SGD, rho=0.1, lr=0.01)
        opt.step(lambda x, model=model: model(x)[:, 0].square(), x)
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-14, atol=0)


# batches


def test_shards_are_views_of_nested_batches(backend):
    model, seen = mlp(), []
    batch = {"xy": OddBatch(X, Y), "list": [X[:, :1]], "name": "passes through", "scale": torch.tensor(2.0)}

    def losses(batch, flag):
        seen.append((batch, flag))
        return losses_of(model)(*batch["xy"]) * batch["scale"]

    msam(model, num_shards=3).step(losses, batch, True)
    assert [len(b["xy"].y) for b, _ in seen] == [5, 5, 4, 4, 4, 4]
    for (b, flag), start in zip(seen, [0, 0, 5, 5, 9, 9], strict=True):
        assert isinstance(b["xy"], OddBatch)
        assert b["xy"].x.data_ptr() == X[start].data_ptr(), "a copy"
        assert torch.equal(b["list"][0], b["xy"].x[:, :1])
        assert (flag, b["name"], b["scale"]) == (True, "passes through", batch["scale"])


def test_gradients_already_there_are_discarded(backend):
    model, other = mlp(), mlp()
    losses_of(model)(X, Y).sum().backward()
    for m in (model, other):
        msam(m).step(losses_of(m), X, Y)
    assert_same(model, snapshot(other))


# what is left alone


@pytest.mark.parametrize("bn_update", ["mean", "sequential"])
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize(
    ("rows", "cut", "sizes"), [(12, {"num_shards": 3}, [4, 4, 4]), (11, {"shard_size": 4}, [4, 4, 3])]
)
def test_running_statistics(backend, bn_update, momentum, rows, cut, sizes):
    model = mlp(batchnorm=True)
    model[1].momentum = momentum
    opt = msam(model, bn_update=bn_update, **cut)
    for i, (x, y) in enumerate(batches(3, rows=rows)):
        expected = oracle_statistics(model, x, sizes, bn_update)
        opt.step(losses_of(model), x, y)
        for name, b in model.named_buffers():
            torch.testing.assert_close(b, expected[name], rtol=1e-14, atol=1e-15)
        assert model[1].num_batches_tracked == (i + 1) * (1 if bn_update == "mean" else 3)


def test_frozen_and_16_bit_statistics(backend):
    frozen, half = mlp(batchnorm=True), mlp(torch.bfloat16, batchnorm=True)
    frozen[1].eval()
    before = snapshot(frozen)
    msam(frozen).step(losses_of(frozen), X, Y)
    assert torch.equal(frozen[1].running_mean, before["1.running_mean"])
    assert frozen[1].num_batches_tracked == 0
    x, y = batches(1, rows=12, dtype=torch.bfloat16)[0]
    shards = [copy.deepcopy(half) for _ in range(3)]
    for shard, xs in zip(shards, x.split(4), strict=True):
        shard(xs)
    mean = sum(shard[1].running_var.float() / 3 for shard in shards).bfloat16()
    msam(half).step(losses_of(half), x, y)
    assert torch.equal(half[1].running_var, mean)


def test_a_layer_that_some_shards_leave_out_counts_one_update(backend):
    model = mlp(batchnorm=True)
    x, y = batches(1, rows=12)[0]

    def losses(x, y, shard):
        if shard[0] == 2:
            return F.cross_entropy(model[3](torch.tanh(model[0](x))), y, reduction="none")
        return losses_of(model)(x, y)

    msam(model).step(losses, x, y, torch.arange(3).repeat_interleave(4))
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("same_rng", [True, False])
def test_a_shards_passes_share_their_draws_and_shards_do_not(backend, same_rng):
    model, masks = mlp(dropout=0.5), []
    model[2].register_forward_hook(lambda m, args, out: masks.append(out == 0))
    opt = msam(model, num_shards=3, same_rng=same_rng)
    torch.manual_seed(7)
    opt.step(losses_of(model), X[:12], Y[:12])
    after = torch.rand(3)
    for first, second in zip(masks[::2], masks[1::2], strict=True):
        assert torch.equal(first, second) is same_rng
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[2], masks[4])
    torch.manual_seed(7)
    for xs in X[:12].split(4):
        model(xs)
    assert torch.equal(after, torch.rand(3)) is same_rng, "the generator must be where the first passes leave it"


@pytest.mark.parametrize("num_shards", [2, 7])
def test_scratch_does_not_grow_with_the_shards(backend, num_shards, request):
    gc.collect()
    gc.freeze()  # what other tests left is not looked through in every pass
    request.addfinalizer(gc.unfreeze)
    torch.manual_seed(0)
    model = nn.Linear(301, 5, bias=False)
    x, y = torch.randn(14, 301), torch.arange(14) % 5
    opt = MSAM(model.parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9, num_shards=num_shards)
    counts, backups = [], set()

    def losses(x, y):
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.shape == (5, 301)]
        counts.append(len({t.data_ptr() for t in tensors}))
        backups.update(t.data_ptr() for t in opt._run.backup.tensors)
        return losses_of(model)(x, y)

    for _ in range(2):
        counts.clear()
        opt.step(losses, x, y)
    # weights, momentum, backup; the sum after the first shard; the first pass makes its gradient later
    assert counts == [3, 3] + [4, 4] * (num_shards - 1)
    assert len(backups) == 1


def test_an_ascent_gradient_is_gone_when_the_second_pass_runs(backend):
    model, ascent, alive = mlp(), [], []
    opt = msam(model)

    def losses(x, y):
        alive.append(any(g() is not None for g in ascent))
        ascent.clear()
        return losses_of(model)(x, y)

    handles = [
        p.register_post_accumulate_grad_hook(lambda p: ascent.append(weakref.ref(p.grad)) if len(alive) % 2 else None)
        for p in model.parameters()
    ]
    opt.step(losses, X, Y)
    assert len(handles) == 4
    assert alive == [False] * 6


@pytest.mark.parametrize("bn_update", ["mean", "sequential"])
def test_compiled_models_run_without_recompiling(backend, bn_update):
    torch._dynamo.reset()
    model, eager = cnn(), cnn()
    compiled = torch.compile(model, backend="aot_eager")
    opts = [
        MSAM(m.parameters(), SGD, rho=0.05, lr=0.05, num_shards=3, model=w, bn_update=bn_update)
        for m, w in ((model, compiled), (eager, eager))
    ]
    x, y = torch.randn(9, 1, 8, 8), torch.arange(9)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            opts[0].step(losses_of(compiled), x, y)
            opts[1].step(losses_of(eager), x, y)
    assert largest_difference(model, eager) < 1e-5
    torch._dynamo.reset()


# what goes wrong


class Failing:
    """Losses that are multiplied or raise in one call."""

    def __init__(self, model, call, factor=1.0, error=None):
        self.model, self.call, self.factor, self.error, self.calls = model, call, factor, error, 0

    def __call__(self, x, y):
        self.calls += 1
        values = losses_of(self.model)(x, y)
        if self.calls != self.call:
            return values
        if self.error is not None:
            raise self.error
        return values * self.factor


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_non_finite_ascent_leaves_its_shard_unperturbed(backend, factor, shard):
    model, expected = mlp(), mlp()
    x, y = X[:12], Y[:12]
    opt = msam(model, lr=0.0)
    opt.step(Failing(model, 2 * shard + 1, factor), x, y)
    for i, (xs, ys) in enumerate(zip(x.split(4), y.split(4), strict=True)):
        for p, d in zip(expected.parameters(), oracle_gradient(expected, xs, ys, [4], 0.0 if i == shard else 0.1),
                        strict=True):  # fmt: skip
            p.grad = d / 3 if p.grad is None else p.grad + d / 3
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-14)
    assert torch.isfinite(opt.last_grad_norm).tolist() == [i != shard for i in range(3)]
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("call", [2, 4, 6])
def test_a_non_finite_descent_skips_the_whole_step(backend, call, scaled, factor):
    model = mlp(torch.float32)
    opt = msam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    x, y = batches(1, rows=13, dtype=torch.float32)[0]
    opt.step(losses_of(model), x, y)
    before, momenta = snapshot(model), copy.deepcopy(opt.state_dict()["state"])
    opt.step(Failing(model, call, factor), x, y, scaler=scaler)
    assert_same(model, before)
    assert opt.skipped_steps == 1
    for i, entries in momenta.items():
        assert torch.equal(entries["momentum_buffer"], opt.state_dict()["state"][i]["momentum_buffer"])
    if scaled:
        scaler.update()
        assert scaler.get_scale() == 512.0


def test_the_norm_of_a_shard_without_perturbed_tensors_is_zero(backend):
    model = nn.ModuleList([nn.Linear(6, 3).double(), nn.Linear(6, 3).double()])
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), "perturb": False}]
    opt = MSAM(groups, SGD, lr=0.1, num_shards=2)

    def losses(x, y, which):
        return F.cross_entropy(model[int(which[0])](x), y, reduction="none")

    opt.step(losses, X[:4], Y[:4], torch.tensor([0, 0, 1, 1]))
    assert (opt.last_grad_norm > 0).tolist() == [True, False]
    opt.step(losses, X[:4], Y[:4], torch.ones(4))
    assert opt.last_grad_norm is None


# checkpoints


def test_checkpoints_pass_to_and_from_the_base_and_sam(backend):
    model = mlp()
    opt = msam(model)
    opt.step(losses_of(model), X, Y)
    momentum = opt.state_dict()["state"][0]["momentum_buffer"].clone()
    base = SGD(mlp().parameters(), lr=0.7)
    base.load_state_dict(opt.state_dict())
    sam = SAM(mlp().parameters(), SGD, lr=0.7)
    sam.load_state_dict(opt.state_dict())
    for other in (base, sam):
        assert torch.equal(other.state_dict()["state"][0]["momentum_buffer"], momentum)
    plain = SGD(mlp().parameters(), lr=0.7)
    plain.load_state_dict(SGD(mlp().parameters(), lr=0.3).state_dict())
    fresh = msam(mlp(), num_shards=5)
    for saved in (plain.state_dict(), SAM(mlp().parameters(), SGD, lr=0.3).state_dict()):
        fresh.load_state_dict(saved)
        group = fresh.param_groups[0]
        assert (group["num_shards"], group["shard_size"], group["lr"]) == (5, None, 0.3)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.8's own use of it
def test_distributed_checkpoint_round_trip(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, resumed = mlp(), mlp(seed=9)
    opt, again = msam(model, shard_size=5), msam(resumed, shard_size=2)
    opt.step(losses_of(model), X, Y)
    opt.zero_grad()
    dcp.save({"optimizer": get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path, no_dist=True)
    state = {"optimizer": get_optimizer_state_dict(resumed, again)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(resumed, again, state["optimizer"])
    resumed.load_state_dict(model.state_dict())
    for o, m in ((opt, model), (again, resumed)):
        o.step(losses_of(m), X, Y)
    assert_same(resumed, snapshot(model))


# bad input


@pytest.mark.parametrize(
    ("error", "needle", "keywords"),
    [
        (ValueError, r"pass num_shards \(the paper's m.*or shard_size \(rows in each\), got neither", {}),
        (ValueError, "got both num_shards=2 and shard_size=3", {"num_shards": 2, "shard_size": 3}),
        (ValueError, "num_shards must be at least 1, got 0", {"num_shards": 0}),
        (ValueError, "shard_size must be at least 1, got -4", {"shard_size": -4}),
        (TypeError, "num_shards must be an integer, got True of type bool", {"num_shards": True}),
        (TypeError, "num_shards must be an integer, got 8.0 of type float", {"num_shards": 8.0}),
        (TypeError, "shard_size must be an integer, got '4' of type str", {"shard_size": "4"}),
        (
            ValueError,
            "weighting must be one of 'sample', 'uniform', got 'mean'",
            {"num_shards": 2, "weighting": "mean"},
        ),
        (ValueError, "bn_update must be one of 'mean', 'sequential', got 1", {"num_shards": 2, "bn_update": 1}),
        (ValueError, "rho must be finite and >= 0, got -1", {"num_shards": 2, "rho": -1}),
    ],
)
def test_bad_arguments(error, needle, keywords):
    with pytest.raises(error, match=needle):
        MSAM(mlp().parameters(), SGD, **{"lr": 0.1, **keywords})


def test_a_bad_option_of_a_group_or_a_checkpoint_is_refused():
    opt = msam(mlp())
    with pytest.raises(ValueError, match="got both num_shards=3 and shard_size=2"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "shard_size": 2})
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["num_shards"] = 0
    with pytest.raises(ValueError, match="num_shards must be at least 1, got 0"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["num_shards"] == 3


@pytest.mark.parametrize(
    ("error", "needle", "cut", "rows"),
    [
        (ValueError, r"num_shards=14 is more than the 13 rows of the batch; pass fewer shards", {"num_shards": 14}, 13),
        (ValueError, r"13 rows in 7 shards leaves 1 row in a shard.*drop_last=True", {"num_shards": 7}, 13),
        (ValueError, r"13 rows in 4 shards leaves 1 row in a shard", {"shard_size": 4}, 13),
        (ValueError, r"the batch is empty \(leading size 0\)", {"num_shards": 2}, 0),
    ],
)
def test_a_batch_that_cannot_be_cut_changes_nothing(backend, error, needle, cut, rows):
    model = mlp(batchnorm=True)
    opt, before = msam(model, **cut), snapshot(model)
    losses_of(model)(X, Y).sum().backward()
    gradient = model[0].weight.grad.clone()
    before = snapshot(model)
    with pytest.raises(error, match=needle):
        opt.step(losses_of(model), X[:rows], Y[:rows])
    assert_same(model, before)
    assert torch.equal(model[0].weight.grad, gradient)


def test_one_row_in_a_shard_is_refused_for_batch_statistics_alone(backend):
    for norm in (nn.Identity(), nn.InstanceNorm1d(6), nn.BatchNorm1d(6).eval()):
        model = nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 6, 1), nn.Upsample(4), norm, nn.Flatten()).double()
        model.append(nn.Linear(24, 3).double())
        msam(model, shard_size=1).step(losses_of(model), X, Y)


@pytest.mark.parametrize("call", ["first_step", "closure"])
def test_what_cannot_cut_the_batch_says_so(backend, call):
    model = mlp()
    opt, before = msam(model), snapshot(model)
    with pytest.raises(RuntimeError, match=r"cannot cut the batch into shards; use opt.step\(loss_fn, \*batch\), or"):
        {"first_step": opt.first_step, "closure": lambda: opt.step(lambda: None)}[call]()
    assert_same(model, before)


def test_a_frameworks_closure_finishes_pairs(backend):
    model, other = mlp(), mlp()
    opt, calls = msam(model), []
    for xs, ys in zip(X.split([5, 4, 4]), Y.split([5, 4, 4]), strict=True):
        for context in (opt.ascent(), opt.descent()):
            with context:
                (losses_of(model)(xs, ys).mean() * (len(xs) / 13)).backward()
    opt.step(lambda: calls.append(1))
    assert calls == [1]
    msam(other).step(losses_of(other), X, Y)
    assert largest_difference(model, other) < 1e-14


# shards side by side


def both(make, base=SGD, data=None, scaler=None, **keywords):
    """Models after a few steps, sequential and batched."""
    models = []
    for execution in ("sequential", "batched"):
        model = make()
        keywords = {"rho": 0.1, "lr": 0.01, "num_shards": 3, **keywords}
        opt = MSAM(model.parameters(), base, model=model, execution=execution, **keywords)
        returned = []
        for x, y in data or batches(3):
            returned.append(opt.step(losses_of(model), x, y, scaler=scaler))
            if scaler is not None:
                scaler.update()
        models.append((model, opt, returned))
    return models


@pytest.mark.parametrize(
    ("make", "keywords"),
    [
        (mlp, {}),
        (mlp, {"shard_size": 3, "num_shards": None, "weighting": "uniform"}),
        (mlp, {"adaptive": True, "base": torch.optim.AdamW}),
        (mlp, {"base": torch.optim.RMSprop, "num_shards": 12}),
        (lambda: mlp(batchnorm=True), {"momentum": 0.9}),
        (lambda: mlp(batchnorm=True).eval(), {"maximize": True}),
        (mlp, {"scaler": torch.amp.GradScaler("cpu", init_scale=256.0)}),
    ],
)
def test_batched_equals_sequential(backend, make, keywords):
    (model, opt, returned), (batched, batched_opt, batched_returned) = both(make, **keywords)
    assert largest_difference(model, batched) < 1e-12
    torch.testing.assert_close(batched_returned, returned, rtol=1e-13, atol=0)
    torch.testing.assert_close(batched_opt.last_grad_norm, opt.last_grad_norm, rtol=1e-13, atol=0)
    assert batched_opt.param_groups[0]["fastsam_step"] == opt.param_groups[0]["fastsam_step"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_convolutions_and_16_bits(backend, dtype):
    data = [(torch.randn(9, 1, 8, 8, dtype=dtype), torch.arange(9))]
    (model, *_), (batched, *_) = both(lambda: cnn(dtype), data=data)
    exact = cnn(torch.float64)
    exact.load_state_dict(cnn(dtype).state_dict())
    d = oracle_gradient(exact, data[0][0].double(), data[0][1], [3, 3, 3])
    for p, q, di in zip(model.parameters(), batched.parameters(), d, strict=True):
        floor = torch.finfo(dtype).eps * di.abs().max()
        assert (q.grad - di).abs().max() <= 2 * (p.grad - di).abs().max() + 4 * floor
        assert q.grad.dtype == dtype
    assert batched[1].num_batches_tracked == 1
    torch.testing.assert_close(batched[1].running_mean, model[1].running_mean)


class Odd(nn.Module):
    """Tied, frozen, unused and unperturbed parameters, and a buffer that is only read."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.frozen, self.unused, self.still = (nn.Linear(6, 6).double() for _ in range(5))
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x):
        return self.still(self.second(torch.tanh(self.first(x))) + self.frozen(x)) * self.scale


def test_batched_handles_odd_parameters_and_nested_batches(backend):
    ends = []
    for execution in ("sequential", "batched"):
        model = Odd()
        still = list(model.still.parameters())
        rest = [p for p in model.parameters() if all(p is not s for s in still)]
        opt = MSAM([{"params": rest, "rho": 0.3}, {"params": still, "perturb": False}], SGD, num_shards=2, model=model,
                   lr=0.1, weight_decay=0.1, execution=execution)  # fmt: skip
        x, y = batches(1)[0]
        opt.step(
            lambda b, word, model=model: losses_of(model)(*b["xy"]) if word else None, {"xy": OddBatch(x, y)}, "on"
        )
        assert model.unused.weight.grad is None, "no gradient and a gradient of zeros differ by the weight decay"
        ends.append(model)
    assert largest_difference(*ends) < 1e-14


@pytest.mark.parametrize("same_rng", [True, False])
def test_batched_passes_share_their_dropout_and_shards_do_not(backend, same_rng):
    """Each shard has inputs, and so weights, of its own: its part of the gradient shows the second pass's mask."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(60, 1, bias=False)).double()
    # less than any rounding of a weight, so that both passes see the same ones
    opt = msam(model, execution="batched", rho=1e-30, lr=0.0, same_rng=same_rng)
    x = torch.eye(3, dtype=torch.float64).repeat_interleave(20, 1)
    torch.manual_seed(5)
    opt.step(lambda x: model(x)[:, 0], x)
    after = torch.rand(3)
    second = 3 * model[1].weight.grad.view(3, 20).norm(dim=1)
    assert torch.allclose(second, opt.last_grad_norm, rtol=1e-12) is same_rng
    assert len(set(opt.last_grad_norm.tolist())) > 1, "shards must draw masks of their own"
    torch.manual_seed(5)
    F.dropout(torch.ones(3, 1, 60, dtype=torch.float64), 0.5)
    assert torch.equal(after, torch.rand(3)) is same_rng, "the generator must be where the first pass leaves it"


@pytest.mark.parametrize("call", [1, 2])
def test_batched_non_finite_passes(backend, call):
    model, plain = mlp(), mlp()
    opt, base = msam(model, execution="batched"), SGD(plain.parameters(), lr=0.1, momentum=0.9)
    opt.step(Failing(model, call, float("nan")), X[:12], Y[:12])
    assert opt.skipped_steps == call - 1
    if call == 1:  # no shard was perturbed
        losses_of(plain)(X[:12], Y[:12]).mean().backward()
        base.step()
    assert largest_difference(model, plain) < 1e-14


class Wrapper(nn.Module):
    def __init__(self, attribute):
        super().__init__()
        self.inner = mlp()
        object.__setattr__(self, attribute, None)


@pytest.mark.parametrize(
    ("needle", "keywords"),
    [
        ("execution must be one of 'sequential', 'batched', got 'fast'", {"execution": "fast"}),
        ("swaps the model's tensors; pass model=, or use execution='sequential'", {"model": None}),
        ("cannot update batch norm one shard after the other", {"bn_update": "sequential"}),
        ("below a Wrapper; pass a model that is neither distributed nor compiled", {"model": Wrapper("no_sync")}),
        ("below a OptimizedModule", {"model": torch.compile(mlp(), backend="eager")}),
    ],
)
def test_what_cannot_be_batched_is_refused(needle, keywords):
    with pytest.raises(ValueError, match=needle):
        MSAM(mlp().parameters(), SGD, num_shards=2, **{"model": mlp(), "execution": "batched", **keywords})


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


def with_leak(model):
    weight = model[0].weight
    return lambda x, y: losses_of(model)(x, y) + weight.square().sum()


def with_item(model):
    return lambda x, y: losses_of(model)(x, y) * (2.0 if x.sum().item() > 0 else 1.0)


@pytest.mark.parametrize(
    ("error", "needle", "make", "losses"),
    [
        (ValueError, "needs equal shards, and 13 rows make shards of 5 and 4; pass another size", mlp, losses_of),
        (RuntimeError, "uses a tensor that requires a gradient other than the optimizer's", mlp, with_leak),
        (RuntimeError, "torch.func.vmap cannot run the loss function; use execution='seq", mlp, with_item),
        (RuntimeError, "changes the buffer calls, which is no batch norm's", Counting, losses_of),
        (TypeError, "returned a scalar", mlp, lambda model: lambda x, y: losses_of(model)(x, y).mean()),
    ],
)
def test_what_cannot_be_batched_is_refused_in_the_step(backend, error, needle, make, losses):
    model = make()
    opt, before = msam(model, execution="batched"), snapshot(model)
    rows = 13 if error is ValueError else 12
    with pytest.raises(error, match=needle):
        opt.step(losses(model), X[:rows], Y[:rows])
    assert_same(model, before)


def test_batched_refuses_cumulative_statistics_and_foreign_parameters(backend):
    model = mlp(batchnorm=True)
    model[1].momentum = None
    with pytest.raises(ValueError, match="cannot run batch norm with momentum=None; use execution='sequential'"):
        msam(model, execution="batched").step(losses_of(model), X[:12], Y[:12])
    opt = MSAM([*mlp().parameters(), *(m := mlp()).parameters()], SGD, num_shards=2, model=m, execution="batched")
    with pytest.raises(ValueError, match=r"a parameter of shape \[8, 6\] is not in model="):
        opt.step(losses_of(m), X[:12], Y[:12])


def test_a_single_pair_says_that_pairs_are_the_shards():
    """Once, before the update; the step is SAM's."""
    model, plain = mlp(), mlp()
    opt = MSAM(model.parameters(), torch.optim.SGD, rho=0.1, num_shards=4, lr=0.1)
    x, y = batches(1)[0]

    def pair():
        for context in (opt.ascent(), opt.descent()):
            with context:
                losses_of(model)(x, y).mean().backward()

    pair()
    with pytest.warns(UserWarning, match=r"pair is one shard.*num_shards=4: .* pairs are the shards.*num_shards=1"):
        opt.step()
    SAM(plain.parameters(), torch.optim.SGD, rho=0.1, lr=0.1).step(losses_of(plain), x, y)
    assert largest_difference(model, plain) < 1e-15
    for pairs in (1, 2):
        for _ in range(pairs):
            pair()
        opt.step()
