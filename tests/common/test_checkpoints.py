"""Checkpoints: exact resume, exchange with the plain base, other formats, copies."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from oracle import Davda54SAM
from problems import assert_same, batches, largest_difference, losses_of, mlp, snapshot
from test_exactness import BASES, with_two_steps
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fastsam import SAM

STATEFUL = {name: BASES[name] for name in ("sgd", "damped", "adamw", "amsgrad", "rmsprop")}


def build(base, model, **keywords):
    cls, kwargs = BASES[base]
    return SAM(model.parameters(), cls, model=model, **{"rho": 0.1, **kwargs, **keywords})


def train(opt, model, data):
    for x, y in data:
        opt.step(losses_of(model), x, y)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", STATEFUL)
def test_resume_goes_on_bit_for_bit(backend, base, dtype):
    data = batches(8, dtype=dtype)
    whole = mlp(dtype)
    opt = build(base, whole, seed=5)
    train(opt, whole, data)

    half = mlp(dtype)
    opt = build(base, half, seed=5)
    train(opt, half, data[:4])
    saved, weights = through_a_file(opt.state_dict()), snapshot(half)

    resumed = mlp(dtype, seed=9)
    resumed.load_state_dict(weights)
    opt = build(base, resumed, rho=0.7, lr=9.0)  # the checkpoint's options count; bf16 draws go on where they were
    opt.load_state_dict(saved)
    train(opt, resumed, data[4:])
    assert_same(resumed, snapshot(whole))


@pytest.mark.parametrize("load_on_base", [False, True])
@pytest.mark.parametrize("base", STATEFUL)
def test_a_plain_bases_checkpoint_loads(backend, base, load_on_base):
    cls, kwargs = BASES[base]
    plain = mlp()
    base_opt = cls(plain.parameters(), **kwargs)
    for x, y in batches(3):
        base_opt.zero_grad()
        losses_of(plain)(x, y).mean().backward()
        base_opt.step()
    saved = through_a_file(base_opt.state_dict())
    base_opt.zero_grad()
    wrapped = SAM.wrap(base_opt, rho=0.3)

    model = mlp(seed=9)
    model.load_state_dict(plain.state_dict())
    groups = [{"params": list(model.parameters()), "rho": 0.3}]
    opt = SAM(groups, cls, rho=0.1, **kwargs)
    (opt.base_optimizer if load_on_base else opt).load_state_dict(saved)
    assert opt.param_groups[0]["rho"] == 0.3, "a group keeps its own option"
    assert opt.param_groups is opt.base_optimizer.param_groups
    data = batches(3, seed=1)
    train(opt, model, data)
    train(wrapped, plain, data)
    assert_same(model, snapshot(plain))


@pytest.mark.parametrize("base", STATEFUL)
def test_a_plain_base_loads_a_sam_checkpoint(backend, base):
    cls, kwargs = BASES[base]
    model = mlp()
    opt = build(base, model)
    train(opt, model, batches(3))
    plain = mlp(seed=9)
    plain.load_state_dict(model.state_dict())
    base_opt = cls(plain.parameters(), **kwargs)
    base_opt.load_state_dict(through_a_file(opt.state_dict()))
    x, y = batches(1, seed=1)[0]
    opt.zero_grad()
    for m in (model, plain):
        losses_of(m)(x, y).mean().backward()
    base_opt.step()
    with pytest.warns(UserWarning, match="plain"):
        opt.step()
    assert largest_difference(model, plain) < 1e-12


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_a_davda54_checkpoint_loads(backend, cls):
    theirs, ours = mlp(), mlp()
    old = Davda54SAM(theirs.parameters(), cls, rho=0.4, adaptive=True, lr=0.01)
    for x, y in batches(2):
        with_two_steps(old, losses_of(theirs), x, y)
    saved = through_a_file(old.state_dict())
    assert any("old_p" in entries for entries in saved["state"].values())
    opt = SAM(ours.parameters(), cls, lr=0.5)
    opt.load_state_dict(saved)
    group = opt.param_groups[0]
    assert (group["rho"], group["adaptive"], group["lr"]) == (0.4, True, 0.01)
    assert not any("old_p" in entries for entries in opt.state.values())
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


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("base", STATEFUL)
def test_copies_go_on_by_themselves(backend, base, copier):
    model = mlp(batchnorm=True)
    opt = build(base, model)
    train(opt, model, batches(3))
    twin, twin_opt = copier((model, opt))
    assert twin_opt.param_groups is twin_opt.base_optimizer.param_groups
    assert twin_opt.param_groups[0]["params"][0] is next(twin.parameters())
    before = snapshot(model)
    train(twin_opt, twin, batches(3, seed=1))
    assert_same(model, before)
    train(opt, model, batches(3, seed=1))
    assert_same(model, snapshot(twin))
    twin_opt.load_state_dict(opt.state_dict())


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
