"""A step is skipped wherever its flag is not 0, whatever the flag's value and whoever has set it."""

import pytest
import torch
from problems import assert_same, batches, losses_of, mlp, snapshot

from fastsam import ESAM, SAM

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "adam fused": (torch.optim.Adam, {"lr": 0.01, "fused": True}),
    "adamw hooked": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
}


def build(cls, base, **keywords):
    base_cls, options = BASES[base]
    model = mlp(torch.float32)
    opt = cls(model.parameters(), base_cls, model=model, **keywords, **options)
    if base == "adamw hooked":  # takes torch's own step, with flags on the device
        opt.base_optimizer.register_step_post_hook(lambda *_: None)
    opt.step(losses_of(model), *batches(1, dtype=torch.float32)[0])
    return model, opt


def states(opt):
    return [t.clone() for s in opt.base_optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0, torch.inf])
@pytest.mark.parametrize("base", BASES)
def test_a_flag_of_any_value_skips(backend, base, value):
    model, opt = build(SAM, base)
    x, y = batches(1, dtype=torch.float32)[0]
    for context in (opt.ascent, opt.descent):
        with context():
            losses_of(model)(x, y).mean().backward()
    before, moments = snapshot(model), states(opt)
    opt.grad_scale, opt.found_inf = None, torch.tensor(value)  # as GradScaler.step sets them
    opt.step()
    if value:
        assert_same(model, before)
        assert all(map(torch.equal, states(opt), moments))
        assert opt.skipped_steps == 1
    else:
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("base", BASES)
def test_esam_survives_a_batch_that_is_not_finite(backend, base, gamma, bad):
    """Its own flag and that of the final gradient meet."""
    model, opt = build(ESAM, base, gamma=gamma, beta=1.0)
    x, y = batches(1, dtype=torch.float32)[0]
    before, moments = snapshot(model), states(opt)
    one_row = torch.ones(len(x)).index_fill(0, torch.tensor([3]), bad)
    for factor in (torch.full_like(one_row, bad), one_row):
        opt.step(lambda x, y, factor: losses_of(model)(x, y) * factor, x, y, factor)
        assert_same(model, before)
        assert all(map(torch.equal, states(opt), moments))
    assert opt.skipped_steps == 2
