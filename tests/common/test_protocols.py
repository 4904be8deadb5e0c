"""The order of calls: what may follow what, gradients that are already there, closures of frameworks."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from laws import PLAIN, law
from methods import by_closure, by_contexts, by_loss_function
from problems import batches, largest_difference, losses_of, mlp
from torch import nn
from torch.optim.lr_scheduler import ConstantLR
from training import Training

from fastsam import SAM
from fastsam.testing import check_step
from fastsam.two_pass.restore_step import is_fusable, steps_in_a_kernel
from fastsam.two_pass.stage import under_way

X, Y = batches(1)[0]


@pytest.fixture
def pair(backend):
    model = mlp()
    return model, SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)


def backward(model):
    losses_of(model)(X, Y).mean().backward()


def enter(context):
    with context:
        pass


@pytest.mark.parametrize(
    ("call", "needle"),
    [
        (lambda opt: enter(opt.descent()), r"descent\(\) cannot be called between steps; run `with opt.ascent"),
        (lambda opt: opt.second_step(), r"second_step\(\) cannot be called between steps; call first_step\(\) first"),
        (lambda opt: opt.first_step(), r"first_step\(\) needs fresh gradients; call backward\(\)"),
    ],
)
def test_a_call_that_comes_too_early_says_what_is_missing(pair, call, needle):
    model, opt = pair
    with pytest.raises(RuntimeError, match=needle):
        call(opt)
    by_loss_function(opt, losses_of(model), X, Y)  # and nothing is broken


INSIDE = {
    "ascent": lambda opt: enter(opt.ascent()),
    "descent": lambda opt: enter(opt.descent()),
    "step": lambda opt: opt.step(),
    "first_step": lambda opt: opt.first_step(),
    "second_step": lambda opt: opt.second_step(),
    "load_state_dict": lambda opt: opt.load_state_dict({}),
    "add_param_group": lambda opt: opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
}


@pytest.mark.parametrize("name", [*INSIDE, "restore"])
def test_nothing_else_may_happen_inside_ascent(pair, name):
    model, opt = pair
    with opt.ascent():
        with pytest.raises(RuntimeError, match=rf"{name}\(\) cannot be called inside ascent\(\); leave the ascent"):
            {**INSIDE, "restore": lambda opt: opt.restore()}[name](opt)
        backward(model)
    with opt.descent():
        backward(model)
    opt.step()


@pytest.mark.parametrize("name", [*INSIDE, "restore", "state_dict"])
def test_nothing_else_may_happen_inside_descent(pair, name):
    model, opt = pair
    with opt.ascent():
        backward(model)
    with opt.descent():
        perturbed = model[0].weight.detach().clone()
        calls = {**INSIDE, "restore": lambda opt: opt.restore(), "state_dict": lambda opt: opt.state_dict()}
        with pytest.raises(RuntimeError, match=rf"{name}\(\) cannot be called inside descent\(\); leave the descent"):
            calls[name](opt)
        assert torch.equal(model[0].weight, perturbed), "the refusal must not end the pass"
        backward(model)
    opt.step()


@pytest.mark.parametrize("name", [n for n in INSIDE if n != "descent"])
def test_an_ascent_waits_for_its_descent(pair, name):
    model, opt = pair
    with opt.ascent():
        backward(model)
    with pytest.raises(RuntimeError, match="after ascent"):
        INSIDE[name](opt)
    opt.state_dict()  # weights are true ones
    opt.restore()
    by_contexts(opt, losses_of(model), X, Y)


@pytest.mark.parametrize("name", [n for n in INSIDE if n not in ("second_step", "step")] + ["loss_fn", "state_dict"])
def test_a_first_step_waits_for_its_second(pair, name):
    model, opt = pair
    before = model[0].weight.detach().clone()
    backward(model)
    opt.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"cannot be called after first_step\(\)"):
        {
            **INSIDE,
            "loss_fn": lambda opt: opt.step(losses_of(model), X, Y),
            "state_dict": lambda opt: opt.state_dict(),
        }[name](opt)
    opt.restore()
    assert torch.equal(model[0].weight, before)


def test_copying_mid_step_is_refused(pair):
    import copy

    model, opt = pair
    backward(model)
    opt.first_step()
    with pytest.raises(RuntimeError, match="copying or pickling the optimizer cannot be called after first_step"):
        copy.deepcopy(opt)


def test_a_closure_after_a_backward_raises_and_names_the_ways_out(pair):
    model, opt = pair
    before = model[0].weight.detach().clone()

    def closure():  # davda54's snippet
        loss = losses_of(model)(X, Y).mean()
        loss.backward()
        return loss

    backward(model)
    gradient = model[0].weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"found gradients .*zero_grad\(\) first .*drop the backward.*opt\.ascent"):
        opt.step(closure)
    assert torch.equal(model[0].weight, before)
    assert torch.equal(model[0].weight.grad, gradient), "the user's gradient must survive the refusal"
    opt.zero_grad()
    opt.step(closure)  # a closure without zero_grad is as good
    other = mlp()
    by_loss_function(SAM(other.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9), losses_of(other), X, Y)
    assert largest_difference(model, other) < 1e-15


def test_gradients_filled_with_zeros_do_not_stop_a_closure(pair):
    model, opt = pair
    backward(model)
    model.zero_grad(set_to_none=False)
    by_closure(opt, losses_of(model), X, Y)


def test_gradients_already_there_are_discarded_by_a_loss_function(pair):
    model, opt = pair
    other = mlp()
    by_loss_function(SAM(other.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9), losses_of(other), X, Y)
    (100 * losses_of(model)(X, Y).sum()).backward()
    by_loss_function(opt, losses_of(model), X, Y)
    assert largest_difference(model, other) == 0


def test_a_first_step_after_pairs_is_refused(pair):
    """Their gradient is no ascent gradient."""
    model, opt = pair
    for context in (opt.ascent, opt.descent):
        with context():
            backward(model)
    before, gradient = model[0].weight.detach().clone(), model[0].weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"gradients of finished .* pairs.*call opt\.step\(\).*or zero_grad\(\)"):
        opt.first_step()
    assert torch.equal(model[0].weight, before)
    assert torch.equal(model[0].weight.grad, gradient)
    opt.step()
    torch.testing.assert_close(model[0].weight.detach(), before - 0.1 * gradient)


def zero_before(opt, model):
    opt.zero_grad()
    with opt.ascent():
        backward(model)
    with opt.descent():
        backward(model)
    opt.step()


def zero_never(opt, model):
    with opt.ascent():
        backward(model)
    with opt.descent():
        backward(model)
    opt.step()


def zero_inside(opt, model):
    with opt.ascent():
        model.zero_grad()
        backward(model)
    with opt.descent():
        backward(model)
    opt.step()


def zero_by_optimizer_inside(opt, model):
    with opt.ascent():
        opt.zero_grad()
        backward(model)
    with opt.descent():
        opt.zero_grad()
        backward(model)
    opt.step()


def zero_between(opt, model):
    with opt.ascent():
        backward(model)
    opt.zero_grad()
    with opt.descent():
        backward(model)
    opt.step()


def zero_after(opt, model):
    zero_never(opt, model)
    model.zero_grad(set_to_none=False)


@pytest.mark.parametrize(
    "loop", [zero_before, zero_never, zero_inside, zero_by_optimizer_inside, zero_between, zero_after]
)
def test_every_place_of_zero_grad_gives_the_same_numbers(pair, loop):
    model, opt = pair
    expected = mlp()
    other = SAM(expected.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    for _ in range(4):
        loop(opt, model)
        by_loss_function(other, losses_of(expected), X, Y)
    assert largest_difference(model, expected) < 1e-15


def test_optimizer_zero_grad_inside_the_first_ascent_clears_what_was_set_aside(pair):
    model, opt = pair
    (100 * losses_of(model)(X, Y).sum()).backward()
    zero_by_optimizer_inside(opt, model)
    expected = mlp()
    other = SAM(expected.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    by_loss_function(other, losses_of(expected), X, Y)
    assert largest_difference(model, expected) < 1e-15


def test_contexts_keep_gradients_that_are_being_accumulated(pair):
    model, opt = pair
    backward(model)
    earlier = [p.grad.clone() for p in model.parameters()]
    with opt.ascent():
        assert all(p.grad is None for p in model.parameters())
        backward(model)
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), earlier, strict=True))
    with opt.descent():
        backward(model)
    assert all(not torch.equal(p.grad, e) for p, e in zip(model.parameters(), earlier, strict=True))


def test_a_closure_on_top_of_a_finished_pair_runs_once(pair):
    model, opt = pair
    calls = []
    with opt.ascent():
        backward(model)
    with opt.descent():
        backward(model)
    assert opt.step(lambda: calls.append(1) or "loss") == "loss"
    assert calls == [1]
    expected = mlp()
    other = SAM(expected.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    by_loss_function(other, losses_of(expected), X, Y)
    assert largest_difference(model, expected) < 1e-15


def test_what_a_step_returns(pair):
    model, opt = pair
    before = losses_of(model)(X, Y).mean().item()
    loss = opt.step(losses_of(model), X, Y)
    assert loss.item() == pytest.approx(before)
    assert loss.dim() == 0
    assert not loss.requires_grad
    opt.zero_grad()
    assert opt.step(lambda: None) is None
    assert opt.step(lambda: {"anything": 1}) == {"anything": 1}


def plain_backward(training):
    training.begin()
    training.opt.zero_grad()
    training.losses(*training.batch).mean().backward()


@law(skips=PLAIN)
def test_a_step_that_would_be_the_bases_is_refused_and_changes_nothing(cell):
    """As the loops of frameworks take it that know nothing of two passes."""
    training, expected = Training(cell), Training(cell)
    if cell.subject.loss != "saf":
        # a plain pass of whose own SAF keeps a record
        plain_backward(training)
    else:
        F.cross_entropy(training.model(training.batch[0]), training.batch[1]).backward()
    training.load(expected.state())
    before, grads = training.weights(), [p.grad.clone() for p in training.model.parameters()]
    with pytest.raises(RuntimeError, match=r"a plain \w+ step: nothing is perturbed. Call opt.backward\(loss_fn"):
        training.opt.step()
    assert all(map(torch.equal, training.weights(), before))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(training.model.parameters(), grads, strict=True))
    training.opt.zero_grad()
    training.step()
    expected.step()
    assert all(map(torch.equal, training.weights(), expected.weights()))


@law(skips=PLAIN)
def test_gradients_that_a_step_has_used_are_not_stepped_with_again(cell):
    """As in a framework that steps once more after the user's own step."""
    training = Training(cell).train(1)
    # the ways that clear gradients themselves leave none to step with
    training.model(training.batch[0]).sum().backward()
    by_loss_function(training.opt, training.losses, *training.batch)
    while not training.opt.needs_second_pass:
        by_loss_function(training.opt, training.losses, *training.batch)
    before = training.weights()
    with pytest.raises(RuntimeError, match="and the gradients are those that the last step has used already"):
        training.opt.step()
    assert all(map(torch.equal, training.weights(), before))


@pytest.mark.parametrize("on_base_step", ["raise", "warn", "ignore"])
def test_a_step_without_passes_is_the_base_step_where_it_is_meant(backend, on_base_step):
    """After a step of two passes it warns once, in a loop that takes steps of both kinds."""
    model, plain = mlp(), mlp()
    settings = {"lr": 0.1, "momentum": 0.9}
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, on_base_step=on_base_step, **settings)
    base = torch.optim.SGD(plain.parameters(), **settings)
    if on_base_step == "raise":
        by_loss_function(opt, losses_of(model), X, Y)
        plain.load_state_dict(model.state_dict())
        base.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.zero_grad()
    for i in range(3):
        backward(model)
        losses_of(plain)(X, Y).mean().backward()
        if i == 0 and on_base_step != "ignore":
            with pytest.warns(UserWarning, match="a plain SGD step: nothing is perturbed"):
                opt.step()
        else:
            opt.step()
        opt.zero_grad()
        base.step()
        base.zero_grad()
    assert largest_difference(model, plain) < 1e-15


@pytest.mark.parametrize("on_base_step", ["raise", "warn"])
def test_steps_that_train_nothing_are_not_refused(pair, on_base_step):
    model, opt = pair
    opt.on_base_step = on_base_step
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    opt.param_groups[0]["lr"] = 0.0
    backward(model)
    opt.step()
    assert all(map(torch.equal, model.parameters(), before))


def test_final_gradients_stay_until_zero_grad(pair):
    model, opt = pair
    weight = model[0].weight.detach().clone()
    opt.step(losses_of(model), X, Y)
    torch.testing.assert_close(model[0].weight.detach(), weight - 0.1 * model[0].weight.grad)
    opt.zero_grad()
    assert model[0].weight.grad is None


def test_nested_batches_and_other_values_reach_the_loss_function(backend):
    model = mlp()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)

    def losses(batch, scale, names):
        assert names == "passes through"
        return losses_of(model)(batch["x"], batch["labels"][0]) * scale

    opt.step(losses, {"x": X, "labels": (Y, Y)}, 1.0, "passes through")
    expected = mlp()
    opt = SAM(expected.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    opt.step(losses_of(expected), X, Y)
    assert largest_difference(model, expected) == 0


def test_clipping_limits_the_final_gradient_alone(backend):
    model, plain = mlp(), mlp()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    other = SAM(plain.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    opt.step(losses_of(model), X, Y, clip_grad_norm=0.01)
    with other.ascent():
        backward(plain)
    with other.descent():
        backward(plain)
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
    assert norm > 0.1
    other.step()
    assert largest_difference(model, plain) == 0
    assert opt.last_grad_norm > 0.1


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_that_is_dropped_takes_its_unfinished_step_with_it(base):
    """Losses ask which step is under way; one that nobody can finish must not be the answer."""
    gc.collect()
    gc.disable()
    try:
        model = mlp()
        opt = SAM(model.parameters(), base, model=model, lr=0.1)
        opt.step(losses_of(model), X, Y, scaler=torch.amp.GradScaler("cpu", enabled=False))
        opt.load_state_dict(opt.state_dict())
        backward(model)
        opt.first_step()
        assert under_way() is opt._run
        kept = opt.base_optimizer
        del opt
        assert under_way() is None
        kept.load_state_dict(kept.state_dict())
    finally:
        gc.enable()


@law(skips=PLAIN | {"others leave nobody time": lambda cell: cell.way not in ("contexts", "two_steps")})
def test_a_step_of_the_base_from_perturbed_weights_is_refused(cell):
    """It would be undone with the perturbation, but for the moments."""
    training, calls = Training(cell).train(1), []

    def losses(*batch):
        calls.append(1)
        if under_way() is not None and training.opt._run.backup.valid:
            with pytest.raises(RuntimeError, match=r"while the weights are perturbed .*second_step\(\) or restore"):
                training.opt.base_optimizer.step()
            calls.append("refused")
        return training.losses(*batch)

    other = Training(cell).train(1)
    for _ in range(3):
        training.step(losses)
        other.step()
    assert "refused" in calls
    assert all(map(torch.equal, training.weights(), other.weights()))


@law(skips=PLAIN | {"gradients that are there concern closures": lambda cell: cell.way != "closure"})
def test_a_step_of_the_base_consumes_the_gradients(cell):
    """Whoever calls it; they are no leftovers then, and the fused step stays."""
    left, cleared = Training(cell), Training(cell)
    # torch's schedulers put a step of their own around the base's
    schedules = [ConstantLR(training.opt.base_optimizer, factor=1.0) for training in (left, cleared)]
    for _ in range(3):
        for training in (left, cleared):
            training.step()
            training.opt.zero_grad()
            training.begin()
            training.losses(*training.batch).mean().backward()
            training.opt.base_optimizer.step()
            if training is cleared:
                training.opt.zero_grad()
        for schedule in schedules:
            schedule.step()
    assert all(map(torch.equal, left.weights(), cleared.weights()))
    base = left.opt.base_optimizer
    assert is_fusable(base) == steps_in_a_kernel(base)
    left.begin()
    left.losses(*left.batch).mean().backward()
    with pytest.raises(RuntimeError, match=r"found gradients that no step has used.*zero_grad\(\) first"):
        left.step()


@pytest.mark.parametrize("copied", ["checkpoint", "deepcopy"])
def test_a_mixed_loop_goes_on_after_a_checkpoint_and_in_a_copy(pair, copied):
    model, opt = pair
    by_loss_function(opt, losses_of(model), X, Y)
    opt.zero_grad()
    if copied == "checkpoint":
        again = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
        again.load_state_dict(opt.state_dict())
    else:
        model, again = copy.deepcopy((model, opt))
    backward(model)
    with pytest.warns(UserWarning, match="a plain SGD step: nothing is perturbed"):
        again.step()


def test_gradients_that_wait_for_a_backward_are_not_taken_for_used(pair):
    """Zeros that were set, and a backward that leaves the tensor alone that is watched."""
    model, opt = pair
    by_loss_function(opt, losses_of(model), X, Y)
    opt.zero_grad(set_to_none=False)
    model[-1](torch.ones(1, model[-1].in_features).double()).sum().backward()
    with pytest.warns(UserWarning, match="a plain SGD step: nothing is perturbed$"):
        opt.step()


def test_check_step_takes_no_step_for_it(pair):
    model, opt = pair
    check_step(opt, losses_of(model), X, Y)
    backward(model)
    with pytest.raises(RuntimeError, match="a plain SGD step: nothing is perturbed"):
        opt.step()


class Proxy:
    """An optimizer as Lightning and Fabric hand it out: its class's methods, attributes of its own, another step."""

    def __init__(self, optimizer, clip=None):
        vars(self).update(_optimizer=optimizer, _clip=clip)
        self.__class__ = type("Proxy", (Proxy, type(optimizer)), {})

    def step(self, closure=None):
        def wrapped():
            returned = None if closure is None else closure()
            if self._clip is not None:
                torch.nn.utils.clip_grad_norm_(self._clip, 0.05)
            return returned

        return self._optimizer.step(wrapped)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


def needs_passes(cell):
    return cell.way not in ("backward", "contexts", "two_steps")


@law(skips=PLAIN | {"others run their passes in the step": needs_passes})
def test_a_closure_of_a_framework_may_clip_what_passes_have_left(cell):
    """Through a proxy, whose step brings a closure of its own, also in second_step()."""
    by_proxy, by_hand = Training(cell), Training(cell)
    by_proxy.opt = Proxy(by_proxy.opt, clip=list(by_proxy.model.parameters()))
    clip = torch.nn.utils.clip_grad_norm_
    by_hand.opt.base_optimizer.register_step_pre_hook(lambda *_: clip(by_hand.model.parameters(), 0.05) and None)
    for _ in range(4):
        by_proxy.step()
        by_hand.step()
    for some, other in zip(by_proxy.weights(), by_hand.weights(), strict=True):
        torch.testing.assert_close(some, other, rtol=1e-12, atol=1e-12)


@law(skips=PLAIN | {"others do not call first_step()": lambda cell: cell.way != "two_steps"})
def test_step_after_first_step_is_second_step(cell):
    """As timm's scaler and the like end a loop's step, also with a closure that they bring."""
    expected = Training(cell).train(4)
    for end in (lambda opt: opt.step(), lambda opt: opt.step(lambda: None)):
        training = Training(cell)
        training.opt.second_step = lambda zero_grad, training=training, end=end: (
            end(training.opt),
            training.opt.zero_grad(),
        )
        training.train(4)
        assert all(map(torch.equal, training.weights(), expected.weights()))


@pytest.mark.parametrize("zeroes", [True, False])
def test_a_closure_that_zeroes_or_adds_to_second_steps_gradient_is_refused(pair, zeroes):
    model, opt = pair
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    opt.first_step(zero_grad=True)
    backward(model)
    with pytest.raises(RuntimeError, match=r"the closure changed p\.grad"):
        opt.step((lambda: opt.zero_grad(set_to_none=False)) if zeroes else (lambda: backward(model)))
    assert all(map(torch.equal, model.parameters(), before))
    opt.zero_grad()
    by_loss_function(opt, losses_of(model), X, Y)


def test_a_proxy_goes_by_the_model_that_is_named_later(choose):
    """On the proxy or on the optimizer itself, whichever takes the steps."""
    choose("torch")
    for bind_proxy in (True, False):
        model, expected = mlp(batchnorm=True), mlp(batchnorm=True)
        opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
        other = SAM(expected.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, model=expected)
        proxy = Proxy(opt)
        (proxy if bind_proxy else opt).bind(model)
        assert proxy.model is opt.model is model
        for x, y in batches(3):
            proxy.backward(losses_of(model), x, y)
            proxy.step()
            other.step(losses_of(expected), x, y)
        assert largest_difference(model, expected) < 1e-12


CACHES = {"_checked", "_loading"}
"""Attributes of which a proxy may have its own: what `check_groups` has seen, and what waits while a dict is loaded."""


@law(skips=PLAIN | {"one way shows it": lambda cell: cell.way != "backward"})
def test_nothing_that_an_optimizer_sets_has_a_default_in_its_class(cell):
    """A framework's proxy is of the optimizer's class, and would find that in its place."""
    opt = Training(cell).train(2).opt
    assert [name for name in vars(opt) if name not in CACHES and hasattr(type(opt), name)] == []
