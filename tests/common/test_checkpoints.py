"""Checkpoints: other formats, options and hooks; that training resumes is a law, in test_resume.py."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from methods import ALL_BASES, by_two_steps
from oracle import Davda54SAM
from problems import assert_same, batches, losses_of, mlp, snapshot
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fastsam import SAM

STATEFUL = ("sgd", "damped", "adamw", "amsgrad", "rmsprop")


def build(base, model, **keywords):
    cls, kwargs = ALL_BASES[base]
    return SAM(model.parameters(), cls, model=model, **{"rho": 0.1, **kwargs, **keywords})


def train(opt, model, data):
    for x, y in data:
        opt.step(losses_of(model), x, y)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_a_davda54_checkpoint_loads(backend, cls):
    theirs, ours = mlp(), mlp()
    old = Davda54SAM(theirs.parameters(), cls, rho=0.4, adaptive=True, lr=0.01)
    for x, y in batches(2):
        by_two_steps(old, losses_of(theirs), x, y)
    saved = through_a_file(old.state_dict())
    assert any("old_p" in entries for entries in saved["state"].values())
    for entries in saved["state"].values():
        entries["e_w"] = torch.ones(3)  # as its first versions, of a shape that need not fit
    opt = SAM(ours.parameters(), cls, lr=0.5)
    opt.load_state_dict(saved)
    group = opt.param_groups[0]
    assert (group["rho"], group["adaptive"], group["lr"]) == (0.4, True, 0.01)
    assert not any({"old_p", "e_w"} & entries.keys() for entries in opt.state.values())
    train(opt, ours, batches(2))


def test_a_bad_option_in_a_checkpoint_is_refused_before_anything_changes(backend):
    model = mlp()
    opt = build("sgd", model)
    train(opt, model, batches(2))
    before = copy.deepcopy(opt.state_dict())
    bad = copy.deepcopy(before)
    bad["param_groups"][0]["rho"] = -1.0
    with pytest.raises(ValueError, match=r"rho must be finite and >= 0, got -1.0"):
        opt.load_state_dict(bad)
    assert opt.param_groups[0]["rho"] == 0.1
    assert torch.equal(opt.state_dict()["state"][0]["momentum_buffer"], before["state"][0]["momentum_buffer"])


def test_tensors_of_a_method_come_back_uncast(backend):
    """What later methods keep in state[p]["fastsam_*"] must not be cast to the parameter's dtype."""
    model = mlp(torch.bfloat16)
    opt = build("sgd", model)
    train(opt, model, batches(1, dtype=torch.bfloat16))
    vector, number = torch.randn(8, 6), torch.tensor(2**40 + 1)
    opt.state[model[0].weight].update(fastsam_vector=vector, fastsam_number=number)
    saved = through_a_file(opt.state_dict())
    other = mlp(torch.bfloat16)
    loaded = build("sgd", other)
    loaded.load_state_dict(saved)
    assert torch.equal(loaded.state[other[0].weight]["fastsam_vector"], vector)
    assert torch.equal(loaded.state[other[0].weight]["fastsam_number"], number)
    plain = torch.optim.AdamW(mlp().parameters())
    plain.load_state_dict(build("adamw", mlp()).state_dict())


def test_options_that_the_base_uses_too_get_a_prefix(backend):
    model = mlp()
    opt = SAM(model.parameters(), torch.optim.Adadelta, rho=0.2, lr=1.0)
    group = opt.param_groups[0]
    assert (group["rho"], group["sam_rho"]) == (0.9, 0.2)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "sam_rho": 0.4})
    assert (opt.param_groups[1]["rho"], opt.param_groups[1]["sam_rho"]) == (0.9, 0.4)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.8's own use of it
@pytest.mark.parametrize("base", STATEFUL)
def test_distributed_checkpoint_round_trip(backend, base, tmp_path):
    data = batches(8)
    whole, half, resumed = mlp(), mlp(), mlp(seed=9)
    opt = build(base, whole)
    train(opt, whole, data)

    opt = build(base, half)
    train(opt, half, data[:4])
    opt.zero_grad()
    state = {"model": half.state_dict(), "optimizer": get_optimizer_state_dict(half, opt)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)

    opt = build(base, resumed)
    state = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, opt)}  # steps with lr 0
    assert opt.param_groups[0]["fastsam_step"] == 0
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    resumed.load_state_dict(state["model"])
    set_optimizer_state_dict(resumed, opt, state["optimizer"])
    assert opt.param_groups[0]["fastsam_step"] == 4
    train(opt, resumed, data[4:])
    assert_same(resumed, snapshot(whole))


def test_a_scheduler_before_a_copy_does_not_tie_the_copy_to_the_original(backend):
    model = mlp()
    opt = build("sgd", model)
    torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    twin, twin_opt = copy.deepcopy((model, opt))
    before = snapshot(model)
    train(twin_opt, twin, batches(1))
    assert_same(model, before)


def test_add_param_group_on_either_object(backend):
    for on_base in (False, True):
        model, extra = mlp(), mlp(seed=2)
        opt = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1)
        train(opt, model, batches(1))
        (opt.base_optimizer if on_base else opt).add_param_group({"params": extra.parameters(), "lr": 0.5})
        assert opt.param_groups[1]["rho"] == 0.3
        assert opt.param_groups[1]["perturb"] is True
        x, y = batches(1)[0]
        before = snapshot(extra)

        def losses(x, y, model=model, extra=extra):
            return losses_of(model)(x, y) + losses_of(extra)(x, y)

        opt.step(losses, x, y)
        assert not torch.equal(extra[0].weight, before["0.weight"])
        assert opt.param_groups[0]["fastsam_step"] == opt.param_groups[1]["fastsam_step"]


def test_state_dict_hooks_fire_once(backend):
    model, fired = mlp(), []
    opt = build("sgd", model)
    for target, name in ((opt, "outer"), (opt.base_optimizer, "base")):
        target.register_state_dict_pre_hook(lambda *_, n=name: fired.append(f"{n} save pre"))
        target.register_state_dict_post_hook(lambda *_, n=name: fired.append(f"{n} save post"))
        target.register_load_state_dict_pre_hook(lambda *_, n=name: fired.append(f"{n} load pre"))
        target.register_load_state_dict_post_hook(lambda *_, n=name: fired.append(f"{n} load post"))
    opt.load_state_dict(opt.state_dict())
    assert len(fired) == len(set(fired)) == 8
