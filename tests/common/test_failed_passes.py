"""After a pass that failed, and a step whose gradients nobody checks."""

import pytest
import torch
from methods import by_contexts
from problems import assert_same, batches, losses_of, mlp, snapshot

from fastsam import SAM


def prepared(cls, kwargs, dtype=torch.float32):
    """Model and optimizer after one step, so that state and scratch exist."""
    model = mlp(dtype, batchnorm=True, dropout=0.3)
    opt = SAM(model.parameters(), cls, rho=0.5, model=model, **kwargs)
    (x, y), *_ = batches(1, dtype=dtype)
    opt.step(losses_of(model), x, y)
    return model, opt, x, y


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


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
    by_contexts(opt, losses_of(model), x, y)
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


def test_without_the_finite_check_the_step_is_the_base_optimizers(backend):
    model = mlp(torch.float64)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, check_finite=False)
    x, y = batches(1)[0]
    opt.step(lambda x, y: losses_of(model)(x, y) * float("nan"), x, y)
    assert not torch.isfinite(model[0].weight).any()
    assert opt.skipped_steps == 0


def test_a_closure_that_fails_on_pairs_which_restore_has_let_go_moves_no_statistics(backend):
    model, opt, x, y = prepared(torch.optim.SGD, {"lr": 0.1})
    opt.zero_grad()
    for context in (opt.ascent, opt.descent):
        with context():
            losses_of(model)(x, y).mean().backward()
    opt.restore()
    before = snapshot(model)

    def closure():
        losses_of(model)(x, y)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opt.step(closure)
    assert_same(model, before)
