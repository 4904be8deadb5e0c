"""Edges where a step once was another one than the user meant, without a word."""

import math
import threading

import pytest
import torch
from problems import assert_same, batches, losses_of, mlp, snapshot

from fastsam import ESAM, GSAM, MESA, MSAM, SAF, SAM, LookSAM
from fastsam.two_pass.stage import under_way

SGD = torch.optim.SGD
IDS = torch.arange(12)


def sam(model, **keywords):
    return SAM(model.parameters(), SGD, model=model, lr=0.1, **keywords)


def started(model):
    """An optimizer whose ascent is over and whose descent has not begun."""
    opt = sam(model)
    with opt.ascent():
        losses_of(model)(*batches(1)[0]).mean().backward()
    return opt


# a loss obeys the pass that is executed, in its own thread


def test_a_step_that_waits_between_its_passes_is_not_under_way():
    opt = started(mlp())
    assert under_way() is None
    with opt.descent():
        assert under_way() is opt._run
    assert under_way() is None


def test_passes_of_two_optimizers_nest():
    outer, inner = started(mlp()), sam(mlp())
    with outer.descent():
        with inner.ascent():
            assert under_way() is inner._run
        assert under_way() is outer._run
        inner.restore()
    assert under_way() is None


def test_another_thread_is_in_no_pass():
    seen, opt = [], started(mlp())
    with opt.descent():
        thread = threading.Thread(target=lambda: seen.append(under_way()))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize("stage", ["between its passes", "in a pass of another thread"])
def test_an_unrelated_optimizer_does_not_change_what_saf_does(stage):
    model, (x, y) = mlp(), batches(1)[0]
    alone, beside = (SAF(12, 3, lag=1, start_epoch=1, history_dtype=torch.float64) for _ in range(2))

    def follow(saf):
        with torch.no_grad():
            for epoch in (1, 2):
                saf.set_epoch(epoch)
                found.append(saf(model(x) * epoch, y, IDS))

    found = []
    follow(alone)
    other = started(mlp())
    if stage == "between its passes":
        follow(beside)
    else:
        with other.descent():
            thread = threading.Thread(target=follow, args=(beside,))
            thread.start()
            thread.join()
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert found[0] != found[1]


def test_mesas_answer_to_a_buffer_that_was_filled_anew_is_not_kept():
    model, (x, y), (other, _) = mlp(), *batches(2)
    mesa = MESA(model, start_epoch=1, reduction="none")
    mesa.set_epoch(2)
    with torch.no_grad():
        for p in mesa.teacher.parameters():
            p.mul_(2.0)
    buffer, opt = x.clone(), sam(model)
    with opt.ascent():
        mesa(model(buffer), y, buffer).mean().backward()
    buffer.copy_(other)
    with opt.descent():
        loss = mesa(model(buffer), y, buffer)
        fresh = other.clone()
        assert torch.equal(loss, mesa(model(fresh), y, fresh))
        loss.mean().backward()
    opt.step()


# finished pairs and closures


@pytest.mark.parametrize("change", ["zero_grad", "backward", "zero_grad and backward"])
def test_a_closure_that_changes_the_gradients_of_finished_pairs_is_refused(backend, change):
    model, (x, y) = mlp(), batches(1)[0]
    opt = started(model)
    with opt.descent():
        losses_of(model)(x, y).mean().backward()
    before = snapshot(model)

    def closure():
        if "zero_grad" in change:
            model.zero_grad()
        loss = losses_of(model)(x, y).mean()
        if "backward" in change:
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"the closure changed p\.grad, which holds the gradients of finished"):
        opt.step(closure)
    assert_same(model, before)


def test_a_closure_that_leaves_them_alone_is_called_once(backend):
    model, (x, y) = mlp(), batches(1)[0]
    opt, calls = started(model), []
    with opt.descent():
        losses_of(model)(x, y).mean().backward()
    assert opt.step(lambda: calls.append(1) or 7) == 7
    assert calls == [1]


# steps without a second pass


def at_a_cheap_step(model, **keywords):
    """LookSAM after its first SAM step: the next step has one pass."""
    opt = LookSAM(model.parameters(), SGD, model=model, lr=0.1, **keywords)
    opt.step(losses_of(model), *batches(1)[0])
    opt.zero_grad()
    assert not opt.needs_second_pass
    return opt


def closure_of(opt, model):
    def closure():
        opt.zero_grad()
        loss = losses_of(model)(*batches(1)[0]).mean()
        loss.backward()
        return loss

    return closure


def test_a_closure_step_goes_on_after_one_whose_base_step_failed(backend):
    model = mlp()
    opt = at_a_cheap_step(model)

    def fail(*_):
        raise MemoryError

    hook = opt.base_optimizer.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        opt.step(closure_of(opt, model))
    hook.remove()
    opt.zero_grad()
    before = snapshot(model)
    opt.step(closure_of(opt, model))
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_pairs_whose_closure_was_refused_are_over(backend):
    model, (x, y) = mlp(), batches(1)[0]
    opt = started(model)
    with opt.descent():
        losses_of(model)(x, y).mean().backward()
    with pytest.raises(RuntimeError, match="the closure changed"):
        opt.step(model.zero_grad)
    opt.step(closure_of(opt, model))  # a step of its own, of two passes
    assert opt.last_grad_norm > 0


def test_a_closure_without_backward_is_refused_in_a_step_of_one_pass(backend):
    model = mlp()
    opt, before = at_a_cheap_step(model), snapshot(model)
    with pytest.raises(RuntimeError, match=r"no parameter has a gradient; call backward\(\) in it"):
        opt.step(lambda: losses_of(model)(*batches(1)[0]).mean())
    assert_same(model, before)


def test_zero_grad_inside_the_only_pass_reaches_what_a_needless_descent_puts_back(backend):
    model, (x, y) = mlp(), batches(1)[0]
    esam = ESAM(model.parameters(), SGD, beta=1e-9, gamma=1.0, lr=0.1)  # whose mask keeps nothing
    assert not esam.needs_second_pass
    losses_of(model)(x, y).mean().backward()
    with esam.ascent():
        esam.zero_grad()
        losses_of(model)(x, y).mean().backward()
    with esam.descent():
        losses_of(model)(x, y).mean().backward()
    expected = torch.autograd.grad(losses_of(model)(x, y).mean(), list(model.parameters()))
    for p, g in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, g)


def test_a_scale_of_a_dropped_step_is_not_the_next_ones(backend):
    kept, (x, y) = [], batches(1)[0]
    for is_dropped in (True, False):
        model = mlp()
        opt = LookSAM(model.parameters(), SGD, lr=0.0)
        if is_dropped:
            with opt.ascent(grad_scale=64.0):
                (64.0 * losses_of(model)(x, y).mean()).backward()
            with opt.descent():
                (64.0 * losses_of(model)(x, y).mean()).backward()
            opt.zero_grad()
        opt.step(closure_of(opt, model))
        kept.append([opt.state[p]["fastsam_g_v"] for p in model.parameters()])
    assert all(map(torch.equal, *kept))


# ESAM


def test_kept_tensors_without_a_gradient_perturb_nothing(backend):
    used, unused = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    esams = (ESAM([used, unused], SGD, norm="full", gamma=1.0, lr=0.1, seed=seed) for seed in range(50))
    opt, seen = next(esam for esam in esams if esam._kept() == [False, True]), []

    def losses(x):
        seen.append(used.detach().clone())
        return (used * x).sum(1)

    opt.step(losses, torch.ones(4, 3, dtype=torch.float64))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(unused, torch.ones_like(unused))


def test_an_estimated_norm_divides_each_groups_part_by_its_own_beta(backend):
    model, (x, y) = mlp(), batches(1)[0]
    betas = {0: 0.9, 2: 0.4}
    groups = [{"params": model[i].parameters(), "beta": beta} for i, beta in betas.items()]
    opt = ESAM(groups, SGD, norm="estimated", mask="tensor", gamma=1.0, lr=0.0, seed=0)
    gradients = torch.autograd.grad(losses_of(model)(x, y).mean(), list(model.parameters()))
    beta_of = [0.9, 0.9, 0.4, 0.4]
    kept = opt.needs_gradient()
    assert any(kept[:2])
    assert any(kept[2:])
    expected = sum((g**2).sum() / beta for g, beta, k in zip(gradients, beta_of, kept, strict=True) if k)
    opt.step(losses_of(model), x, y)
    torch.testing.assert_close(opt.last_grad_norm, expected.sqrt(), rtol=1e-12, atol=0)


def test_strict_without_selection_keeps_all_rows(backend):
    models = [mlp(), mlp()]
    for model, strict in zip(models, (True, False), strict=True):
        opt = ESAM(model.parameters(), SGD, gamma=1.0, strict=strict, lr=0.1)
        opt.step(losses_of(model), *batches(1)[0])
        assert opt.last_selected_fraction == 1
    assert_same(models[1], snapshot(models[0]))


# arguments


@pytest.mark.parametrize("cls", [SAM, ESAM, GSAM, LookSAM])
@pytest.mark.parametrize("rho", [10**400, 1e308, math.inf, math.nan, -1e-9], ids=["10^400", "1e308", "inf", "nan", "-"])
def test_a_radius_that_no_weight_can_have_is_named(cls, rho):
    with pytest.raises(ValueError, match="rho must be"):
        cls(mlp().parameters(), SGD, rho=rho, lr=0.1)


@pytest.mark.parametrize("flag", ["same_rng", "check_finite"])
@pytest.mark.parametrize("value", ["off", "no", 0, None])
def test_a_flag_is_true_or_false(flag, value):
    with pytest.raises(TypeError, match=f"{flag} must be True or False, got {value!r}"):
        MSAM(mlp().parameters(), SGD, num_shards=2, lr=0.1, **{flag: value})
