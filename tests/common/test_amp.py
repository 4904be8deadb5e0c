"""Mixed precision: GradScaler in ways 1 and 2, clipping, and real overflows."""

from functools import partial

import pytest
import torch
from methods import WAYS, by_loss_function
from pairwise import pairwise
from problems import batches, largest_difference, losses_of, mlp

from fastsam import ESAM, MSAM, SAM

BASES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.AdamW, {"lr": 0.01}),
    (torch.optim.AdamW, {"lr": 0.01, "foreach": True}),
    (torch.optim.RMSprop, {"lr": 0.01}),
]


def by_step(opt, scaler, losses, x, y, clip):
    opt.step(losses, x, y, scaler=scaler, clip_grad_norm=clip)


def by_contexts(opt, scaler, losses, x, y, clip):
    with opt.ascent():
        scaler.scale(losses(x, y).mean()).backward()
    with opt.descent():
        scaler.scale(losses(x, y).mean()).backward()
    if clip is not None:
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], clip)
    scaler.step(opt)
    opt.zero_grad()


AXES = ["torch", "triton"], BASES, [True, False], [None, 0.1], [by_step, by_contexts]


@pytest.mark.parametrize(("backend", "base", "enabled", "clip", "way"), pairwise(*AXES), indirect=["backend"])
def test_a_scaler_changes_nothing_but_the_scale(backend, base, enabled, clip, way):
    cls, kwargs = base
    model, plain = mlp(), mlp()
    opt, other = (SAM(m.parameters(), cls, rho=0.1, **kwargs) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=enabled)
    for x, y in batches():
        way(opt, scaler, losses_of(model), x, y, clip)
        scaler.update()
        other.step(losses_of(plain), x, y, clip_grad_norm=clip)
    assert largest_difference(model, plain) < 1e-9
    if enabled:
        assert scaler.get_scale() == 1024.0 * 2**5, "the growth tracker must tick once a step"


@pytest.mark.parametrize("way", [by_step, by_contexts])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(("cls", "kwargs"), BASES)
def test_a_real_overflow_skips_the_step_and_halves_the_scale(backend, cls, kwargs, clip, way):
    model, plain = mlp(torch.float32), mlp(torch.float32)
    opt, other = (SAM(m.parameters(), cls, rho=0.1, **kwargs) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    data = batches(3, dtype=torch.float32)

    def losses(x, y):
        return losses_of(model)(x, y) * (1e36 if overflowing else 1.0)

    for i, (x, y) in enumerate(data):
        overflowing = i == 1
        before = [p.detach().clone() for p in model.parameters()]
        state = {k: {n: t.clone() for n, t in s.items()} for k, s in opt.state_dict()["state"].items()}
        way(opt, scaler, losses, x, y, clip)
        scaler.update()
        if overflowing:
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
            for k, entries in state.items():
                assert all(torch.equal(t, opt.state_dict()["state"][k][n]) for n, t in entries.items())
            assert scaler.get_scale() == 2.0**14
        else:
            other.step(losses_of(plain), x, y, clip_grad_norm=clip)
    assert opt.skipped_steps == 1
    assert largest_difference(model, plain) < 1e-5


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
def test_training_under_autocast(backend, dtype):
    model = mlp(torch.float32)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)

    def losses(x, y):
        with torch.autocast("cpu", dtype=dtype):
            return losses_of(model)(x, y)

    data = batches(40, dtype=torch.float32) * 3
    history = []
    for x, _ in data:
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        history.append(opt.step(losses, x, y, scaler=scaler).item())
        scaler.update()
    assert sum(history[-20:]) < 0.6 * sum(history[:20])


@pytest.mark.parametrize(
    ("build", "way"),
    [
        *((SAM, way) for way in WAYS.values()),
        (partial(ESAM, beta=1.0), by_loss_function),
        (partial(MSAM, num_shards=3), by_loss_function),
        (partial(MSAM, num_shards=3, execution="batched"), by_loss_function),
    ],
)
def test_autocast_may_be_inside_the_loss_function_or_around_the_steps(backend, build, way):
    """Autocast keeps its casts of the weights until it is left; a pass must not see those of another's weights."""
    models = mlp(torch.float32), mlp(torch.float32)
    inside, around = (build(m.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, model=m) for m in models)

    def losses(x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return losses_of(models[0])(x, y)

    data = batches(2, dtype=torch.float32)
    for x, y in data:
        way(inside, losses, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x, y in data:
            way(around, losses_of(models[1]), x, y)
    assert largest_difference(*models) == 0
