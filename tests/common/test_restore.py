"""Weights come back bit for bit, whatever happens in a step."""

import copy
import sys

import pytest
import torch
from problems import assert_same, batches, losses_of, mlp, snapshot
from test_exactness import WAYS, with_contexts, with_loss_function, with_two_steps
from torch import nn

from fastsam import SAM

BASES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.AdamW, {"lr": 0.01}),
    (torch.optim.RMSprop, {"lr": 0.01}),
]


def _inside_a_kernel(frame):
    """Whether Triton's interpreter is running a kernel: on a GPU no interrupt comes half-way through one."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "triton.runtime.interpreter":
            return True
        frame = frame.f_back
    return False


class Interrupt:
    """Raises KeyboardInterrupt at the n-th call or return in the library's own code; counts them all for n = 0."""

    def __init__(self, n=0):
        self.n, self.seen = n, 0

    def _profile(self, frame, event, arg):
        # what is raised while Python disposes of a generator it swallows itself
        if "fastsam" not in frame.f_globals.get("__name__", "") or frame.f_code.co_name == "<genexpr>":
            return
        if _inside_a_kernel(frame):
            return
        # no signal arrives between the return of __enter__ and the with block
        if event == "return" and frame.f_code.co_name == "__enter__":
            return
        self.seen += 1
        if self.seen == self.n:
            sys.setprofile(None)
            raise KeyboardInterrupt(f"{event} at {frame.f_code.co_name}:{frame.f_lineno}")

    def __enter__(self):
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)


def prepared(cls, kwargs, dtype=torch.float32):
    """Model and optimizer after one step, so that state and scratch exist."""
    model = mlp(dtype, batchnorm=True, dropout=0.3)
    opt = SAM(model.parameters(), cls, rho=0.5, model=model, **kwargs)
    (x, y), *_ = batches(1, dtype=dtype)
    opt.step(losses_of(model), x, y)
    return model, opt, x, y


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("cls", "kwargs"), BASES)
def test_an_interrupt_at_any_call_boundary_leaves_the_weights_of_before_or_after(backend, cls, kwargs, way):
    model, opt, x, y = prepared(cls, kwargs)
    start, state, saved = snapshot(model), torch.get_rng_state(), copy.deepcopy(opt.state_dict())

    def rewind():
        model.load_state_dict(start)
        opt.restore()
        opt.load_state_dict(copy.deepcopy(saved))
        opt.zero_grad()
        torch.set_rng_state(state)

    rewind()
    before = weights_of(model)
    with Interrupt() as count:
        way(opt, losses_of(model), x, y)
    after = weights_of(model)
    assert not torch.equal(before[0], after[0])
    hits = {"before": 0, "after": 0}
    # every boundary of torch's path; of that of the interpreted kernels, which are slow, an even sample
    stride = 1 if backend == "torch" and cls is torch.optim.SGD else max(3, count.seen // 60)
    for n in range(1, count.seen + 1, stride):
        rewind()
        storage = [p.data_ptr() for p in model.parameters()]
        interrupt, raised = Interrupt(n), None
        try:
            with interrupt:
                way(opt, losses_of(model), x, y)
        except KeyboardInterrupt as error:
            raised = error
        if raised is None:
            assert interrupt.seen < n, "an interrupt was swallowed"
            break  # with warm caches there are fewer calls than were counted
        if way is with_two_steps:
            opt.restore()  # an interrupt between the two calls is the caller's to handle
        now = weights_of(model)
        outcome = "before" if all(map(torch.equal, now, before)) else "after"
        assert outcome == "before" or all(map(torch.equal, now, after)), f"lost weights: {raised}"
        hits[outcome] += 1
        assert storage == [p.data_ptr() for p in model.parameters()]
        assert not opt._run.backup.valid
        opt.restore()  # drops an ascent that waits for its descent
        opt.zero_grad()
        way(opt, losses_of(model), x, y)  # the optimizer still works
    assert hits["before"] > hits["after"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing_pass", [1, 2])
def test_an_exception_in_either_pass_restores_every_dtype(backend, dtype, error, failing_pass):
    model, opt, x, y = prepared(torch.optim.SGD, {"lr": 0.1}, dtype)
    calls, before = [], weights_of(model)

    def losses(x, y):
        calls.append(1)
        result = losses_of(model)(x, y)
        if len(calls) == failing_pass:
            raise error
        return result

    with pytest.raises(type(error)):
        opt.step(losses, x, y)
    assert all(map(torch.equal, weights_of(model), before))
    opt.step(losses, x, y)
    assert not all(map(torch.equal, weights_of(model), before))


@pytest.mark.parametrize("where", ["ascent", "descent"])
def test_a_failed_context_blocks_the_step_until_zero_grad(backend, where):
    model, opt, x, y = prepared(torch.optim.SGD, {"lr": 0.1})
    opt.zero_grad()
    before, state = weights_of(model), snapshot(model)
    try:
        with opt.ascent():
            losses_of(model)(x, y).mean().backward()
            if where == "ascent":
                raise MemoryError
        with opt.descent():
            assert not torch.equal(model[0].weight, before[0])
            losses_of(model)(x, y).mean().backward()
            raise MemoryError
    except MemoryError:
        pass
    assert_same(model, state)
    if where == "ascent":
        assert all(p.grad is None for p in model.parameters())
    for call in (opt.step, opt.ascent().__enter__, opt.descent().__enter__, opt.first_step):
        with pytest.raises(RuntimeError, match="after a failed pass; call zero_grad"):
            call()
    opt.zero_grad()
    with_contexts(opt, losses_of(model), x, y)
    assert not torch.equal(model[0].weight, before[0])


def test_random_draws_go_on_after_a_failed_descent(backend):
    model, opt, x, y = prepared(torch.optim.SGD, {"lr": 0.1})
    opt.zero_grad()
    with opt.ascent():
        losses_of(model)(x, y).mean().backward()
    after_first_pass = torch.get_rng_state()

    def fail_after_drawing():
        torch.rand(5)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), opt.descent():
        fail_after_drawing()
    assert torch.equal(torch.get_rng_state(), after_first_pass)


@pytest.mark.parametrize("way", WAYS)
def test_the_base_step_sees_the_weights_of_before(backend, way):
    model = mlp(torch.float32)
    seen = []
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    base.register_step_pre_hook(lambda *_: seen.append(weights_of(model)))
    opt = SAM.wrap(base, rho=0.5)
    for x, y in batches(3, dtype=torch.float32):
        before = weights_of(model)
        way(opt, losses_of(model), x, y)
        assert all(map(torch.equal, seen[-1], before))
    assert len(seen) == 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("cls", "kwargs"), BASES)
def test_storage_never_moves(backend, cls, kwargs, way):
    model = mlp(torch.float32)
    views = [p.detach() for p in model.parameters()]
    opt = SAM(model.parameters(), cls, rho=0.5, **kwargs)
    for x, y in batches(3, dtype=torch.float32):
        way(opt, losses_of(model), x, y)
    assert all(
        v.data_ptr() == p.data_ptr() and torch.equal(v, p) for v, p in zip(views, model.parameters(), strict=True)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("cls", "kwargs"), BASES)
def test_non_finite_ascent_gradient_means_a_base_step(backend, cls, kwargs, bad):
    plain, model = mlp(torch.float64), mlp(torch.float64)
    base, opt = cls(plain.parameters(), **kwargs), SAM(model.parameters(), cls, rho=0.5, **kwargs)
    for x, y in batches(3):
        with opt.ascent():
            losses_of(model)(x, y).mean().backward()
            model[0].weight.grad[0, 0] = bad
        with opt.descent():
            losses_of(model)(x, y).mean().backward()
        opt.step()
        opt.zero_grad()
        losses_of(plain)(x, y).mean().backward()
        base.step()
        base.zero_grad()
    assert all(
        torch.allclose(a, b, rtol=1e-11, atol=0) for a, b in zip(plain.parameters(), model.parameters(), strict=True)
    )
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("cls", "kwargs"), [*BASES, (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5})])
@pytest.mark.parametrize("first", [False, True])
def test_non_finite_final_gradient_means_a_skipped_step(backend, cls, kwargs, bad, first):
    model = mlp(torch.float64)
    opt = SAM(model.parameters(), cls, rho=0.5, **kwargs)
    data = batches(3)
    if not first:
        opt.step(losses_of(model), *data[0])
    before = weights_of(model)
    state = {k: {n: t.clone() for n, t in s.items()} for k, s in opt.state_dict()["state"].items()}
    passes = []

    def losses(x, y):
        passes.append(1)
        return losses_of(model)(x, y) * (bad if len(passes) == 2 else 1)

    opt.step(losses, *data[1])
    assert all(map(torch.equal, weights_of(model), before))
    assert opt.skipped_steps == 1
    for k, entries in state.items():
        for name, t in entries.items():
            assert torch.equal(opt.state_dict()["state"][k][name], t)
    opt.step(losses_of(model), *data[2])  # goes on as if the step had not been
    other = mlp(torch.float64)
    opt_other = SAM(other.parameters(), cls, rho=0.5, **kwargs)
    for batch in ([] if first else data[:1]) + data[2:]:
        opt_other.step(losses_of(other), *batch)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(weights_of(model), weights_of(other), strict=True))


def test_without_the_finite_check_the_step_is_the_base_optimizers(backend):
    model = mlp(torch.float64)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, check_finite=False)
    x, y = batches(1)[0]
    opt.step(lambda x, y: losses_of(model)(x, y) * float("nan"), x, y)
    assert not torch.isfinite(model[0].weight).any()
    assert opt.skipped_steps == 0


def test_gradients_in_one_pass_only_frozen_and_tied_parameters(backend):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.both, self.frozen = (nn.Linear(4, 4).double() for _ in range(4))
            self.tied = nn.Linear(4, 4).double()
            self.tied.weight = self.both.weight
            self.frozen.requires_grad_(False)
            self.passes = 0

        def forward(self, x):
            self.passes += 1
            x = self.tied(torch.tanh(self.both(x))) + self.frozen(x)
            return self.first(x) if self.passes % 2 else self.second(x)

    torch.manual_seed(0)
    model = Odd()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    before = snapshot(model)
    opt.step(lambda x: model(x).square().mean(1), torch.randn(5, 4, dtype=torch.float64))
    after = snapshot(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"second.weight", "second.bias", "both.weight", "both.bias", "tied.weight", "tied.bias"}
    # the tied weight counts once in the norm
    params = list(dict.fromkeys(p for p in model.parameters() if p.requires_grad))
    assert sum(p is model.both.weight for p in params) == 1


def test_mixed_dtypes_layouts_and_odd_shapes_in_one_optimizer(backend):
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(5, 7, dtype=torch.float64).t()),
        nn.Parameter(torch.randn(70, dtype=torch.bfloat16)),
        nn.Parameter(torch.randn(33, dtype=torch.float16)),
        nn.Parameter(torch.randn(())),
        nn.Parameter(torch.randn(0)),
        nn.Parameter(torch.randn(12)[1:]),
        nn.Parameter(torch.randn(4, 6)[:, ::2]),
    ]
    before = [p.detach().clone() for p in params]
    opt = SAM(params, torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)

    def losses(x):
        return sum((p.double() ** 2).sum() for p in params).expand(1)

    norm = torch.sqrt(sum(((2 * p.detach().double()) ** 2).sum() for p in params)).item()
    with opt.ascent():
        losses(None).mean().backward()
    with opt.descent():
        for p, b in zip(params, before, strict=True):
            expected = b.double() * (1 + 0.5 * 2 / norm)
            spacing = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(p.dtype, 2**-22)
            assert ((p.double() - expected).abs() <= expected.abs() * spacing + 1e-30).all(), p.dtype
        losses(None).mean().backward()
    assert all(map(torch.equal, (p.detach() for p in params), before))
    opt.step()
    for p, b in zip(params, before, strict=True):
        expected = b.double() - 0.1 * 2 * b.double() * (1 + 1 / norm)
        spacing = {torch.bfloat16: 2**-6, torch.float16: 2**-9}.get(p.dtype, 2**-20)
        assert ((p.double() - expected).abs() <= b.double().abs() * spacing + 1e-30).all(), p.dtype


def test_complex_parameters_count_as_pairs_of_reals(backend):
    z = nn.Parameter(torch.tensor([3 + 4j, 0j], dtype=torch.complex128))
    r = nn.Parameter(torch.view_as_real(z.detach()).clone())
    ends = []
    for p in (z, r):
        opt = SAM([p], torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
        target = torch.ones_like(p)

        def losses(x, p=p, target=target):
            d = p - target if not p.is_complex() else torch.view_as_real(p) - 1
            return (d**4).sum().expand(1)

        for _ in range(3):
            opt.step(losses, torch.zeros(1))
        ends.append(torch.view_as_real(p.detach()) if p.is_complex() else p.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


def test_sparse_gradients_are_coalesced(backend):
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(10, 4, sparse=sparse).double()
        opt = SAM(table.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
        ids = torch.tensor([1, 1, 3, 7, 1])
        for _ in range(3):
            opt.step(lambda i, table=table: table(i).square().sum(1), ids)
        ends.append(table.weight.detach())
        assert opt.last_grad_norm > 0
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "rho"), [(torch.bfloat16, 7e-3), (torch.float16, 9e-4)])
def test_stochastic_rounding_keeps_the_perturbation_of_16_bit_weights(backend, dtype, rho):
    def projection(stochastic):
        torch.manual_seed(0)
        w = nn.Parameter((torch.randn(200_000) * 0.01).to(dtype))
        g = torch.randn(200_000).to(dtype)
        before = w.detach().clone()
        opt = SAM([w], torch.optim.SGD, rho=rho, lr=0.1, stochastic_rounding=stochastic)
        with opt.ascent():
            (w * g).sum().backward()
        with opt.descent():
            eps = w.detach().double() - before.double()
        assert torch.equal(w, before)
        direction = g.double() / g.double().norm()
        return (eps @ direction).item() / rho

    assert projection("auto") == pytest.approx(1.0, abs=0.02)
    assert projection(False) < 0.9


def test_a_later_step_rounds_with_other_draws_and_a_seed_repeats_them(backend):
    def perturbed(seed, steps):
        w = nn.Parameter(torch.linspace(-1, 1, 1000).bfloat16())
        opt = SAM([w], torch.optim.SGD, rho=0.1, lr=0.0, seed=seed)
        for _ in range(steps):
            with opt.ascent():
                w.float().sum().backward()
            with opt.descent():
                moved = w.detach().clone()
        return moved

    assert torch.equal(perturbed(3, 2), perturbed(3, 2))
    assert not torch.equal(perturbed(3, 1), perturbed(3, 2))
    assert not torch.equal(perturbed(3, 1), perturbed(4, 1))


def test_step_with_nothing_to_do(backend):
    w = nn.Parameter(torch.ones(3))
    opt = SAM([{"params": [w]}, {"params": []}], torch.optim.AdamW, rho=0.5, lr=0.1)
    assert opt.step(lambda: None) is None
    assert torch.equal(w, torch.ones(3))
    with_loss_function(opt, lambda x, y: w.sum() * x, torch.ones(2), torch.ones(2))
    assert not torch.equal(w, torch.ones(3))
