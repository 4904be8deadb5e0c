"""The laws of mixed precision: loss scales, clipping, overflows, autocast."""

import copy

import pytest
import torch
from faults import Losses
from laws import PLAIN, law, takes_plain_steps
from problems import batches, largest_difference, losses_of, mlp
from training import Training, moments

from fastsam import GSAM, SAM
from fastsam.graph.plain_step import as_stepper
from fastsam.methods import METHODS, WAYS

NO_SCALER = {
    "scaler.step(opt, closure) is refused, of all optimizers": lambda cell: cell.way == "closure",
    "the two calls have no place for a scaler": lambda cell: cell.way == "two_steps",
}


def scaled_step(training, scaler, clip=None, losses=None):
    """A step with a GradScaler, in the cell's way."""
    training.begin()
    opt, losses, batch = training.opt, losses or training.losses, training.batch
    if training.cell.way == "loss_fn":
        as_stepper(opt).step(losses, *batch, scaler=scaler, clip_grad_norm=clip)
    elif training.cell.way == "backward":
        opt.backward(losses, *batch, backward=lambda loss: scaler.scale(loss).backward())
        finish(training, scaler, clip)
    else:
        for pair in opt.passes(batch):
            with opt.ascent(grad_scale=scaler.get_scale()):
                scaler.scale(losses(*pair.batch).mean()).backward()
            with opt.descent():
                scaler.scale(losses(*pair.batch).mean() * pair.weight).backward()
        finish(training, scaler, clip)
    scaler.update()
    training.taken += 1


def finish(training, scaler, clip):
    """What a loop does when its passes are over."""
    if clip is not None:
        scaler.unscale_(training.opt)
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), clip)
    scaler.step(training.opt)
    training.opt.zero_grad()


def clipped_step(training, clip):
    """Likewise without a scaler."""
    training.begin()
    if training.cell.way == "loss_fn":
        as_stepper(training.opt).step(training.losses, *training.batch, clip_grad_norm=clip)
    else:
        scaled_step(training, torch.amp.GradScaler("cpu", enabled=False), clip)
        return
    training.taken += 1


@law(skips=NO_SCALER, backends=("torch", "triton"))
def test_a_scaler_changes_nothing_but_the_scale(cell):
    """In steps that clip, and in those between; `last_grad_norm` does not have it either."""
    training, plain = Training(cell), Training(cell)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for clip in (None, 0.1, None, 0.1):
        scaled_step(training, scaler, clip)
        clipped_step(plain, clip)
        norms = [getattr(t.opt, "last_grad_norm", None) for t in (training, plain)]
        assert (norms[0] is None) == (norms[1] is None)
        if norms[0] is not None:
            torch.testing.assert_close(*norms, rtol=1e-9, atol=0.0)
    assert largest_difference(training.model, plain.model) < 1e-9
    assert scaler.get_scale() == 1024.0 * 2**2, "the growth tracker must tick once a step"


@law(skips={"the caller clips, between the passes and step()": lambda cell: cell.way != "loss_fn"})
def test_clipping_limits_the_final_gradient_alone(cell):
    some, clipped = Training(cell), Training(cell)
    some.step()
    clipped_step(clipped, 0.01)
    d = [p.grad for p in some.model.parameters()]
    norm = torch.sqrt(sum((d_n**2).sum() for d_n in d))
    assert norm > 0.02
    for p, d_n in zip(clipped.model.parameters(), d, strict=True):
        torch.testing.assert_close(p.grad, d_n * 0.01 / (norm + 1e-6), rtol=1e-10, atol=1e-14)


def last_call(training):
    """The number of the last call of the losses in the next step."""
    saved, counted = training.state(), Losses(training)
    training.step(counted)
    training.load(saved)
    return counted.calls


def assert_skipped(training, step):
    """Whether a step leaves weights, moments and a teacher's weights alone, and counts as skipped."""
    before, kept = training.weights(), moments(training)
    teacher = [p.clone() for p in getattr(training.loss, "teacher", torch.nn.Identity()).parameters()]
    step()
    assert all(map(torch.equal, training.weights(), before))
    assert moments(training).keys() == kept.keys()
    assert all(torch.equal(moments(training)[name], value) for name, value in kept.items())
    if teacher:
        assert all(map(torch.equal, training.loss.teacher.parameters(), teacher))
    if training.cell.subject.optimizer:
        assert training.opt.skipped_steps == 1


FACTORS = dict(zip(WAYS, (torch.inf, torch.inf, torch.nan, torch.nan, torch.inf), strict=True))


@law(skips=PLAIN, backends=("torch", "triton"))
def test_a_final_gradient_that_is_not_finite_skips_the_step(cell):
    training = Training(cell).train(3)
    losses = Losses(training, last_call(training), factor=FACTORS[cell.way])
    assert_skipped(training, lambda: training.step(losses))
    before = training.weights()
    training.step()  # and goes on
    assert not torch.equal(training.weights()[0], before[0])
    assert training.opt.skipped_steps == 1


TEACHES = {
    "a plain optimizer's hooks know of no scaler": lambda cell: takes_plain_steps(cell) and cell.subject.row == "mesa"
}


@law(skips=NO_SCALER | TEACHES, backends=("torch", "triton"))
def test_an_overflow_under_a_scaler_skips_the_step_and_halves_the_scale(cell):
    training = Training(cell, torch.float32).train(3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    losses = Losses(training, last_call(training), factor=1e36)
    assert_skipped(training, lambda: scaled_step(training, scaler, losses=losses))
    assert scaler.get_scale() == 2.0**14
    before = training.weights()
    scaled_step(training, scaler)
    assert not torch.equal(training.weights()[0], before[0])


UNPERTURBED = {
    "ESAM skips a step without a direction": lambda cell: cell.subject.row == "esam",
    "a shard by itself stays unperturbed, see test_msam": lambda cell: cell.subject.row == "msam",
}


@law(skips=PLAIN | UNPERTURBED)
def test_an_ascent_gradient_that_is_not_finite_means_the_bases_step(cell):
    training = Training(cell).train(3)
    params, witness = list(training.model.parameters()), copy.deepcopy(training)
    witness.begin()
    d = torch.autograd.grad(witness.losses(*witness.batch).mean(), list(witness.model.parameters()))
    training.step(Losses(training, 1, factor=torch.nan))
    assert training.opt.skipped_steps == 0
    assert not torch.isfinite(training.opt.last_grad_norm)
    if cell.way in ("loss_fn", "closure"):  # the other ways clear it
        for p, d_n in zip(params, d, strict=True):
            torch.testing.assert_close(p.grad, d_n, rtol=1e-12, atol=1e-15)


MIXED = {"torch's vmap has no batch norm of mixed precision": lambda cell: cell.subject.variant == "batched"}


@law(skips=PLAIN | MIXED)
def test_autocast_may_be_inside_the_loss_function_or_around_the_steps(cell):
    """Autocast keeps its casts of the weights until it is left; a pass must not see those of another's weights."""
    inside, around = (Training(cell, torch.float32) for _ in range(2))

    def losses(*batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inside.losses(*batch)

    for _ in range(4):
        inside.step(losses)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around.train(4)
    assert largest_difference(inside.model, around.model) == 0
    assert largest_difference(inside.model, Training(cell, torch.float32).train(4).model) > 1e-6, "nothing was cast"


# what is not for every method


def test_an_overflow_in_the_first_step_of_all(backend):
    model = mlp(torch.float32)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, dampening=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batches(1, dtype=torch.float32)[0]
    for _ in range(3):
        opt.step(lambda x, y: losses_of(model)(x, y) * 100, x, y, scaler=scaler)
        scaler.update()
        if opt.skipped_steps == 1 and scaler.get_scale() == 2.0**126:
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert opt.skipped_steps >= 1


def test_a_base_that_skips_by_itself_gets_scale_and_finding(backend):
    model, plain = mlp(torch.float32), mlp(torch.float32)
    base = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    base.register_step_post_hook(lambda *_: None)  # keeps fastsam from stepping in its place
    opt = SAM.wrap(base, rho=0.1)
    other = SAM(plain.parameters(), torch.optim.AdamW, rho=0.1, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, (x, y) in enumerate(batches(4, dtype=torch.float32)):
        factor = 1e38 if i == 2 else 1.0
        opt.step(lambda x, y, f=factor: losses_of(model)(x, y) * f, x, y, scaler=scaler)
        scaler.update()
        if i != 2:
            other.step(losses_of(plain), x, y)
    assert opt.skipped_steps == 1
    assert largest_difference(model, plain) < 1e-6


def test_a_closure_under_a_scaler_is_refused(backend):
    model = mlp()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    x, y = batches(1)[0]

    def closure():
        opt.zero_grad()
        scaler.scale(losses_of(model)(x, y).mean()).backward()

    closure()
    with pytest.raises(RuntimeError, match=r"scaler.step\(opt, closure\) cannot unscale.*scaler=scaler.*opt.ascent"):
        scaler.step(opt, closure)
    scaler.update()
    opt.step(losses_of(model), x, y, scaler=scaler)  # the refusal leaves nothing behind
    scaler.update()
    opt.step(losses_of(model), x, y)


NOT_TOLD = {
    "only contexts may not be told the scale": lambda cell: cell.way != "contexts",
    "a method that keeps a gradient has to be told": lambda cell: (
        cell.subject.optimizer and METHODS[cell.subject.optimizer].cls.state_holds_scale
    ),
}


@law(skips=PLAIN | NOT_TOLD)
def test_a_norm_is_without_a_scale_that_contexts_were_not_told(cell):
    """It is found in `scaler.step`; after `scaler.unscale_` nobody knows it, and then there is no norm."""
    training, plain = Training(cell), Training(cell)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for unscales in (False, True):
        opt = training.opt
        training.begin()
        for pair in opt.passes(training.batch):
            with opt.ascent():
                scaler.scale(training.losses(*pair.batch).mean()).backward()
            with opt.descent():
                scaler.scale(training.losses(*pair.batch).mean() * pair.weight).backward()
        if unscales:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        training.taken += 1
        plain.step()
        if unscales or plain.opt.last_grad_norm is None:
            assert opt.last_grad_norm is None
        else:
            torch.testing.assert_close(opt.last_grad_norm, plain.opt.last_grad_norm, rtol=1e-9, atol=0.0)


def test_final_gradients_are_left_unscaled(backend):
    for cls in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop):
        model, plain = mlp(), mlp()
        x, y = batches(1)[0]
        opt, other = (SAM(m.parameters(), cls, rho=0.1, lr=0.01) for m in (model, plain))
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
        opt.step(losses_of(model), x, y, scaler=scaler)
        other.step(losses_of(plain), x, y)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_under_autocast(dtype):
    model = mlp(torch.float32)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)

    def losses(x, y):
        with torch.autocast("cpu", dtype=dtype):
            return losses_of(model)(x, y)

    data = batches(20, dtype=torch.float32) * 3
    history = []
    for x, _ in data:
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        history.append(opt.step(losses, x, y, scaler=scaler).item())
        scaler.update()
    assert sum(history[-10:]) < 0.6 * sum(history[:10])


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("cls", [SAM, GSAM])
def test_two_steps_under_a_scaler(choose, cls, unscales):
    """Both gradients hold the scale, which a method that combines them needs; else it may be taken out before."""
    choose("torch")
    model, other = mlp(torch.float32), mlp(torch.float32)
    opt = cls(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    expected = cls(other.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in batches(3, dtype=torch.float32):
        scaler.scale(losses_of(model)(x, y).mean()).backward()
        opt.first_step(zero_grad=True)
        scaler.scale(losses_of(model)(x, y).mean()).backward()
        if unscales:
            scaler.unscale_(opt)
        if unscales and cls is GSAM:
            with pytest.raises(RuntimeError, match=r"unscale_\(\) has taken the scale out of the second one alone"):
                scaler.step(opt)
            opt.restore()
            return
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        expected.step(losses_of(other), x, y)
        assert opt.last_grad_norm is None if unscales else opt.last_grad_norm < 10
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
