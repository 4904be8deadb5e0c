"""`opt.backward`: both passes with the caller's backward, for loops and frameworks that own it; losses of any shape."""

import pytest
import torch
import torch.nn.functional as F
from methods import by_contexts
from problems import assert_same, batches, largest_difference, losses_of, mlp, snapshot
from torch import nn

from fastsam import ESAM, GSAM, MSAM, SAM, LookSAM

METHODS = {
    "sam": (SAM, {"rho": 0.2}),
    "esam": (ESAM, {"rho": 0.2, "seed": 4}),
    "esam of all rows": (ESAM, {"rho": 0.2, "seed": 4, "gamma": 1.0}),
    "msam": (MSAM, {"rho": 0.2, "num_shards": 3}),
    "gsam": (GSAM, {"rho": 0.2}),
    "looksam": (LookSAM, {"rho": 0.2, "k": 2}),
}
both_passes = pytest.mark.parametrize("name", METHODS)


def made(name):
    cls, options = METHODS[name]
    model = mlp(batchnorm=True)
    return model, cls(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model, **options)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"looksam"}))
def test_micro_batches_accumulate_what_each_would_give_alone(choose, name):
    choose("torch")
    (some, opt), (other, alone) = made(name), made(name)
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        micro, total = batches(2, seed=step), [torch.zeros_like(p) for p in other.parameters()]
        for x, y in micro:
            opt.backward(losses_of(some), x, y, backward=lambda loss: (loss / 2).backward())
            alone.backward(losses_of(other), x, y)
            total = [t + p.grad / 2 for t, p in zip(total, other.parameters(), strict=True)]
            alone.zero_grad()
        opt.step()
        opt.zero_grad()
        for p, t in zip(other.parameters(), total, strict=True):
            p.grad = t
        plain.step()
        plain.zero_grad()
        alone.zero_grad()
        # running statistics of mSAM's pairs move once in a step, whoever cuts the batch
        for p, q in zip(some.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@both_passes
def test_a_frameworks_closure_is_called_once(choose, name):
    choose("torch")
    (some, opt), (other, expected), calls = made(name), made(name), []
    for x, y in batches(3):
        loss = opt.backward(losses_of(some), x, y)
        assert opt.step(lambda loss=loss: calls.append(1) or loss) is loss
        opt.zero_grad()
        assert torch.equal(loss, expected.step(losses_of(other), x, y))
    assert len(calls) == 3
    assert largest_difference(some, other) < 1e-12


@both_passes
def test_gradients_that_are_there_stay(choose, name):
    choose("torch")
    (model, opt), (other, expected) = made(name), made(name)
    (x, y), (v, w) = batches(2)
    losses_of(model)(v, w).mean().backward()
    losses_of(other)(v, w)
    plain = [p.grad.clone() for p in model.parameters()]
    opt.backward(losses_of(model), x, y)
    expected.backward(losses_of(other), x, y)
    for p, q, g in zip(model.parameters(), other.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, q.grad + g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["sam", "esam", "msam"])
def test_aux_is_the_first_passs(choose, name):
    choose("torch")
    (model, opt), calls = made(name), []

    def losses(x, y):
        calls.append(len(calls))
        return losses_of(model)(x, y), {"call": calls[-1], "rows": len(x)}

    x, y = batches(1)[0]
    for take in (lambda: opt.step(losses, x, y, has_aux=True), lambda: opt.backward(losses, x, y, has_aux=True)):
        calls.clear()
        loss, aux = take()
        assert loss.shape == ()
        assert aux == ([{"call": 2 * i, "rows": 4} for i in range(3)] if name == "msam" else {"call": 0, "rows": 12})
    opt.zero_grad()
    with pytest.raises(TypeError, match=r"must return two values, \(losses, aux\), got a tensor of shape \[\d+\]"):
        opt.step(losses_of(model), x, y, has_aux=True)


def test_aux_of_shards_side_by_side_is_refused(choose):
    choose("torch")
    model, (x, y) = mlp(), batches(1)[0]
    opt = MSAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model, num_shards=2, execution="batched")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"has_aux=True .* execution='batched'; use execution='sequential'"):
        opt.step(lambda x, y: (losses_of(model)(x, y), 1), x, y, has_aux=True)
    assert_same(model, before)


@pytest.mark.parametrize("way", ["step", "backward"])
def test_a_loss_that_has_run_backward_itself_is_refused_in_steps_of_one_pass_too(choose, way):
    choose("torch")
    model, opt = made("looksam")
    x, y = batches(1)[0]
    opt.step(losses_of(model), x, y)
    before = snapshot(model)
    assert not opt.needs_second_pass

    def loss(x, y):
        mean = losses_of(model)(x, y).mean()
        mean.backward(retain_graph=True)
        return mean

    with pytest.raises(TypeError, match="has run backward itself"):
        getattr(opt, way)(loss, x, y)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("name", ["sam", "gsam", "looksam", "esam of all rows"])
def test_one_loss_of_the_whole_batch_will_do_where_rows_are_not_needed(choose, name):
    choose("torch")
    (some, opt), (other, expected) = made(name), made(name)
    for i, (x, y) in enumerate(batches(4)):
        whole = lambda x, y: F.cross_entropy(some(x), y)  # noqa: E731
        if i % 2:
            loss = opt.step(whole, x, y)
        else:
            loss = opt.backward(lambda x=x, y=y, whole=whole: whole(x, y))
            opt.step()
            opt.zero_grad()
        torch.testing.assert_close(loss, expected.step(losses_of(other), x, y))
    assert largest_difference(some, other) < 1e-12


@pytest.mark.parametrize(("name", "needs"), [("esam", "ESAM"), ("msam", "MSAM")])
def test_methods_that_need_rows_say_so(choose, name, needs):
    choose("torch")
    model, opt = made(name)
    x, y = batches(1)[0]
    with pytest.raises(TypeError, match=r"returned a scalar; it must return per-sample losses of shape \["):
        opt.step(lambda x, y: F.cross_entropy(model(x), y), x, y)
    with pytest.raises(TypeError, match=rf"{needs}.backward\(loss_fn\) has no rows to cut; pass the batch"):
        opt.backward(lambda: F.cross_entropy(model(x), y))


def test_esams_mask_spares_the_callers_backward_what_it_leaves_out(choose):
    """The caller's backward is given a leaf, whose gradient is the factor by which the loss counts."""
    choose("torch")
    model, opt = made("esam")
    x, y = batches(1)[0]
    opt.step(losses_of(model), x, y)
    seen = []
    assert not all(opt.needs_gradient())
    opt.backward(losses_of(model), x, y, backward=lambda loss: seen.append(loss.is_leaf) or loss.backward())
    assert seen == [True, False]


@both_passes
def test_all_of_backward_runs_within_the_callers_function(choose, name):
    """As Fabric's models demand, whose outputs refuse any other backward; also where a part is left out."""
    choose("torch")
    (model, opt), (other, expected) = made(name), made(name)
    is_inside = []

    def losses(x, y):
        rows = losses_of(model)(x, y)
        rows.register_hook(lambda _: None if is_inside else pytest.fail("backward outside of the caller's function"))
        return rows

    def backward(loss):
        is_inside.append(True)
        loss.backward()
        is_inside.clear()

    for x, y in batches(4):
        opt.backward(losses, x, y, backward=backward)
        expected.backward(losses_of(other), x, y)
        for o in (opt, expected):
            o.step()
            o.zero_grad()
    assert largest_difference(model, other) == 0


def inside(opt, losses, x, y):
    with opt.ascent():
        opt.backward(losses, x, y)


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (RuntimeError, "backward= left no gradient", lambda o, f, x, y: o.backward(f, x, y, backward=lambda v: None)),
        (RuntimeError, "inside ascent", inside),
        (TypeError, "backward must be a function, got 3", lambda o, f, x, y: o.backward(f, x, y, backward=3)),
        (TypeError, "loss_fn must be a function", lambda o, f, x, y: o.backward(x, y)),
        (TypeError, "has_aux must be True or False", lambda o, f, x, y: o.backward(f, x, y, has_aux="yes")),
        (TypeError, "go with step", lambda o, f, x, y: o.step(lambda: f(x, y).mean(), has_aux=True)),
    ],
)
def test_what_is_refused_leaves_the_weights(choose, kind, message, call):
    choose("torch")
    model, opt = made("sam")
    weights = [p.clone() for p in model.parameters()]
    with pytest.raises(kind, match=message):
        call(opt, losses_of(model), *batches(1)[0])
    assert all(map(torch.equal, model.parameters(), weights))


@both_passes
def test_a_pass_that_fails_blocks_the_step_until_zero_grad(choose, name):
    choose("torch")
    model, opt = made(name)
    x, y = batches(1)[0]
    calls, before = [], snapshot(model)

    def losses(x, y):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return losses_of(model)(x, y)

    with pytest.raises(MemoryError):
        opt.backward(losses, x, y)
    assert_same(model, before)
    for call in (opt.step, lambda: opt.backward(losses, x, y)):
        with pytest.raises(RuntimeError, match="after a failed pass; call zero_grad"):
            call()
    opt.zero_grad()
    opt.backward(losses, x, y)
    opt.step()


def test_a_model_may_be_named_late(choose):
    choose("torch")
    model, witness = mlp(batchnorm=True), mlp(batchnorm=True)
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.5)
    wrapped = nn.ModuleList([model])
    opt.bind(wrapped)
    assert opt.model is wrapped
    x, y = batches(1)[0]
    opt.step(losses_of(model), x, y)
    witness(x)
    assert_same(model, snapshot(witness))
    with opt.ascent():
        with pytest.raises(RuntimeError, match=r"bind\(\) cannot be called inside ascent"):
            opt.bind(model)
        losses_of(model)(x, y).mean().backward()
    opt.restore()
    with pytest.raises(TypeError, match="model must be a torch"):
        opt.bind("net")
    by_contexts(opt, losses_of(model), x, y)


@both_passes
def test_what_the_caller_multiplies_the_loss_by_is_measured(choose, name):
    """A loss scale that overflows nothing, and the share of a micro-batch."""
    choose("torch")
    (some, opt), (other, expected) = made(name), made(name)
    for x, y in batches(5):
        opt.backward(losses_of(some), x, y, backward=lambda loss: (loss * 4096 / 2).backward())
        norm = opt.last_grad_norm
        with torch.no_grad():
            torch._foreach_div_([p.grad for p in some.parameters()], 2048)
        opt.step()
        opt.zero_grad()
        expected.step(losses_of(other), x, y)
        assert (norm is None) == (expected.last_grad_norm is None)
        if norm is not None:
            torch.testing.assert_close(norm, expected.last_grad_norm)
        assert largest_difference(some, other) < 1e-12
    if name == "looksam":
        kept = [[o.states_of([p], "g_v")[0] for p in m.parameters()] for o, m in ((opt, some), (expected, other))]
        for a, b in zip(*kept, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def shares_by(name, way):
    """Train with micro-batches of unequal shares, one of them empty of weight."""
    model, opt = made(name)
    for x, y in batches(4):
        for rows, share in ((slice(0, 3), 3 / 12), (slice(3, 12), 9 / 12), (slice(0, 4), 0.0)):
            if way == "backward":
                opt.backward(
                    losses_of(model), x[rows], y[rows], backward=lambda loss, s=share: (loss * s * 256).backward()
                )
            elif share:
                opt.backward(losses_of(model), x[rows], y[rows], backward=lambda loss, s=share: (loss * s).backward())
        assert opt.last_grad_norm is None or opt.last_grad_norm.isfinite().all()
        if way == "backward":
            torch._foreach_div_([p.grad for p in model.parameters()], 256)
        opt.step()
        opt.zero_grad()
    return model, opt


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"esam", "esam of all rows", "msam"}))
def test_shares_of_micro_batches_stay_and_one_of_nothing_counts_nothing(choose, name):
    """A loss scale goes out of what a method keeps, the shares of a step's parts stay in."""
    choose("torch")
    # batch norm's statistics, which the empty micro-batch moves, do not count in training
    (some, opt), (other, _) = shares_by(name, "backward"), shares_by(name, "alone")
    assert opt.skipped_steps == 0
    for p, q in zip(some.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_an_empty_micro_batch_skips_no_step_of_esam(choose):
    choose("torch")
    assert shares_by("esam", "backward")[1].skipped_steps == 0


def test_looksam_keeps_what_contexts_keep(choose):
    choose("torch")
    kept = []
    for way in ("backward", "contexts"):
        model, opt = made("looksam")
        x, y = batches(1)[0]
        for rows, share in ((slice(0, 3), 3 / 12), (slice(3, 12), 9 / 12)):
            if way == "backward":
                opt.backward(losses_of(model), x[rows], y[rows], backward=lambda loss, s=share: (loss * s).backward())
                continue
            for one_pass in (opt.ascent, opt.descent):
                with one_pass():
                    (losses_of(model)(x[rows], y[rows]).mean() * share).backward()
        opt.step()
        kept.append(torch.cat([opt.states_of([p], "g_v")[0].flatten() for p in model.parameters()]))
    torch.testing.assert_close(F.cosine_similarity(*kept, dim=0), torch.ones((), dtype=torch.float64))
