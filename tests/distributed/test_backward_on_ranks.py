"""`opt.backward` with several processes: accumulation under no_sync(), and a caller's backward that arms DDP itself."""

from contextlib import nullcontext

import pytest
import torch
from ddp_steps import assert_equal_on_ranks, rows_of_rank, wrap
from problems import batches, losses_of, mlp

from fastsam import ESAM, GSAM, MSAM, SAM, LookSAM

METHODS = {
    "sam": (SAM, {"rho": 0.2}),
    "esam": (ESAM, {"rho": 0.2, "seed": 4}),
    "msam": (MSAM, {"rho": 0.2, "num_shards": 2}),
    "gsam": (GSAM, {"rho": 0.2}),
    "looksam": (LookSAM, {"rho": 0.2, "k": 2}),
}


def build(name, params, **keywords):
    cls, options = METHODS[name]
    return cls(params, torch.optim.SGD, lr=0.1, momentum=0.9, **options, **keywords)


def assert_close(some, other):
    for p, q in zip(some.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.ranks(2)
def test_micro_batches_under_no_sync_are_those_of_one_process():
    """As accelerate and the like accumulate: all but the last micro-batch leave gradients on their ranks."""
    model, other = mlp(), mlp()
    ddp = wrap(model)
    opt, one = build("sam", ddp.parameters(), model=ddp), build("sam", other.parameters())
    for step in range(3):
        for i, batch in enumerate(batches(2, seed=step)):
            with ddp.no_sync() if i == 0 else nullcontext():
                opt.backward(losses_of(ddp), *rows_of_rank(batch), backward=lambda loss: (loss / 2).backward())
            one.backward(losses_of(other), *batch, backward=lambda loss: (loss / 2).backward())
        for o in (opt, one):
            o.step()
            o.zero_grad()
        assert_equal_on_ranks(model.parameters())
        assert_close(model, other)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", METHODS)
def test_a_backward_that_arms_ddp_itself_is_the_step_of_ddps_forward(name):
    """As Lightning's manual optimization: the loss calls the module inside, and backward prepares the reducer."""
    model, other = mlp(), mlp()
    ddp, ddp_of_other = wrap(model), wrap(other)
    opt, expected = build(name, ddp.parameters(), model=ddp), build(name, ddp_of_other.parameters(), model=ddp_of_other)

    def arming(loss):
        if ddp.require_backward_grad_sync:
            ddp.reducer._rebuild_buckets()
            ddp.reducer.prepare_for_backward([])
        loss.backward()

    for batch in batches(4):
        opt.backward(losses_of(model), *rows_of_rank(batch), backward=arming)
        opt.step()
        opt.zero_grad()
        expected.step(losses_of(ddp_of_other), *rows_of_rank(batch))
        assert_equal_on_ranks(model.parameters())
        assert_close(model, other)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["sam", "msam"])
def test_a_wrapper_that_comes_later_than_the_optimizer(name):
    model, other = mlp(), mlp()
    opt = build(name, model.parameters())
    ddp, ddp_of_other = wrap(model), wrap(other)
    opt.bind(ddp)
    expected = build(name, ddp_of_other.parameters(), model=ddp_of_other)
    for batch in batches(3):
        opt.backward(losses_of(ddp), *rows_of_rank(batch))
        opt.step()
        opt.zero_grad()
        expected.step(losses_of(ddp_of_other), *rows_of_rank(batch))
        assert_equal_on_ranks(model.parameters())
        assert_close(model, other)


@pytest.mark.ranks(2)
def test_methods_that_combine_refuse_no_sync():
    ddp = wrap(mlp())
    opt = build("gsam", ddp.parameters(), model=ddp)
    with ddp.no_sync(), pytest.raises(RuntimeError, match=r"backward\(\) inside no_sync\(\): GSAM combines"):
        opt.backward(losses_of(ddp), *rows_of_rank(batches(1)[0]))
