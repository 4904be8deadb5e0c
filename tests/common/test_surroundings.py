"""What surrounds a step: torch's default dtype, and base optimizers that do not look like torch's own."""

import copy
import pickle

import pytest
import torch
from laws import law
from odd_bases import ODD_BASES, Averaged
from problems import assert_same, batches, losses_of, mlp, snapshot
from torch.optim import SGD
from training import Training

from fastsam import ESAM, MSAM, SAM, LookSAM

BOTH = ("torch", "triton")
DEFAULTS = ((torch.float64, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float64))
"""A default dtype, and a dtype of weights."""


def trained(cell, default, dtype):
    """What three steps leave, and a fourth whose gradient is not finite."""
    model = mlp(dtype, batchnorm=True)
    torch.set_default_dtype(default)
    try:
        training = Training(cell, dtype=dtype, model=model)
        returned = [training.step() for _ in range(3)]
        training.step(lambda *batch: training.losses(*batch) * float("nan"))
    finally:
        torch.set_default_dtype(torch.float32)
    state = training.state()
    entries = [entry for of_param in state["opt"]["state"].values() for entry in of_param.values()]
    records = training.loss.state_dict() if training.loss else {}
    tensors = [*returned, *state["model"].values(), *entries, records.pop("_extra_state", {}).get("history")]
    return [*tensors, *records.values(), getattr(training.opt, "skipped_steps", None)]


@law(skips={"strict=True raises where no row's loss rises": lambda cell: cell.options.get("strict")}, backends=BOTH)
def test_torchs_default_dtype_changes_no_number(cell):
    """Weights, moments, records and losses, bit for bit."""
    for default, dtype in DEFAULTS[1:2] if cell.backend == "triton" else DEFAULTS:
        found, expected = trained(cell, default, dtype), trained(cell, torch.float32, dtype)
        # torch's own bases keep their counters in the default dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, check_dtype=False)


# base optimizers


def around(name, cls, model, **options):
    opt = cls.wrap(ODD_BASES[name](list(model.parameters())), model=model, **options)
    if hasattr(opt, "train"):
        opt.train()
    return opt


def train(opt, model, data):
    for x, y in data:
        opt.step(losses_of(model), x, y)
    return snapshot(model)


@pytest.mark.parametrize("name", ODD_BASES)
def test_an_odd_base_takes_its_own_steps(name):
    ours, theirs = mlp(), mlp()
    base = ODD_BASES[name](list(theirs.parameters()))
    if hasattr(base, "train"):
        base.train()
    for x, y in batches(5):
        theirs.zero_grad()
        losses_of(theirs)(x, y).mean().backward()
        base.step()
    assert_same(theirs, train(around(name, SAM, ours, rho=0.0), ours, batches(5)))


@pytest.mark.parametrize("cls", [SAM, ESAM, LookSAM])
@pytest.mark.parametrize("name", ODD_BASES)
def test_an_odd_base_is_copied_saved_and_loaded(name, cls):
    """Bit for bit; LookSAM has state of its own for every parameter, ESAM a counter."""
    model, data = mlp(), batches(8)
    opt = around(name, cls, model, rho=0.1)
    train(opt, model, data[:4])
    saved, weights = copy.deepcopy(opt.state_dict()), snapshot(model)
    copied_model, copied = copy.deepcopy((model, opt))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, opt)))
    expected = train(opt, model, data[4:])
    train(copied, copied_model, data[4:])
    assert_same(copied_model, expected, "copied")
    train(pickled, pickled_model, data[4:])
    assert_same(pickled_model, expected, "pickled")
    loaded_model = mlp(seed=9)
    loaded_model.load_state_dict(weights)
    loaded = around(name, cls, loaded_model, rho=0.4)
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["rho"] == 0.1
    train(loaded, loaded_model, data[4:])
    assert_same(loaded_model, expected, "loaded")


def test_a_schedule_free_base_is_switched_through_ours():
    model = mlp()
    opt = around("schedule-free", SAM, model)
    train(opt, model, batches(2))
    at_y = snapshot(model)
    opt.eval()
    assert any(not torch.equal(t, at_y[name]) for name, t in model.state_dict().items())
    opt.train()
    with opt.ascent():
        losses_of(model)(*batches(1)[0]).mean().backward()
    with opt.descent(), pytest.raises(RuntimeError, match=r"eval\(\) cannot be called inside descent\(\)"):
        opt.eval()
    opt.restore()
    assert not hasattr(SAM(mlp().parameters(), SGD, lr=0.1), "eval")


class Adahessian(SGD):
    pass


class OverlappingZeRO(SGD):
    _overlap_with_ddp = True


REFUSED = [(Adahessian, r"needs backward\(create_graph=True\)"), (OverlappingZeRO, "use overlap_with_ddp=False")]


@pytest.mark.parametrize(("base", "reason"), REFUSED)
def test_a_base_that_cannot_follow_two_passes_is_refused(base, reason):
    with pytest.raises(ValueError, match=reason):
        SAM(mlp().parameters(), base, lr=0.1)


def test_a_setting_of_an_inner_optimizer_is_not_taken_for_an_option():
    opt = SAM.wrap(Averaged(torch.optim.Adadelta(mlp().parameters(), rho=0.8)), rho=0.2)
    assert (opt.param_groups[0]["rho"], opt.param_groups[0]["sam_rho"]) == (0.8, 0.2)


def test_a_base_is_wrapped_anew_once_its_wrapper_is_gone():
    """As in a notebook's cell that is run again; in a cycle the wrapper waits for the garbage collector."""
    model, fresh = mlp(), mlp()
    base = SGD([{"params": model[0].parameters(), "rho": 0.3}, {"params": model[2].parameters()}], lr=0.1)
    opt = LookSAM.wrap(base, rho=0.05, seed=1)
    opt.itself = opt
    with pytest.raises(ValueError, match="part of a fastsam optimizer already"):
        SAM.wrap(base, rho=0.1)
    train(opt, model, batches(2))
    model.load_state_dict(fresh.state_dict())
    del opt
    opt = SAM.wrap(base, rho=0.1, seed=2)
    assert [group["rho"] for group in base.param_groups] == [0.3, 0.1]
    assert "k" not in base.param_groups[0]
    assert opt.state_dict()["param_groups"][0]["fastsam_seed"] == 2
    assert not any(str(name).startswith("fastsam") for entries in opt.state.values() for name in entries)
    other = SGD([{"params": fresh[0].parameters(), "rho": 0.3}, {"params": fresh[2].parameters()}], lr=0.1)
    expected = train(SAM.wrap(other, rho=0.1, seed=2), fresh, batches(3))
    train(opt, model, batches(3))
    assert_same(model, expected)


# copies and checkpoints


def test_setstate_takes_what_torchs_does():
    model = mlp()
    opt = SAM(model.parameters(), SGD, model=model, lr=0.1, momentum=0.9)
    train(opt, model, batches(2))
    state = {p: {"momentum_buffer": torch.ones_like(p)} for p in model.parameters()}
    opt.__setstate__({"state": state})
    assert opt.state is opt.base_optimizer.state is state
    train(opt, model, batches(1))


def test_skipped_steps_are_counted_on_in_copies():
    model = mlp()
    opt = SAM(model.parameters(), SGD, model=model, lr=0.1)
    opt.step(lambda x, y: losses_of(model)(x, y) * float("nan"), *batches(1)[0])
    for again in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert again.skipped_steps == 1
        again.skipped_steps.add_(1)
    assert opt.skipped_steps == 1


# what else is around a step


def test_a_compiled_training_step_is_the_same():
    """The optimizer's step is left out of the graph, in which batches of shards and torch's bases took other ways."""
    compiled, eager = mlp(), mlp()
    ours, theirs = (MSAM(model.parameters(), SGD, model=model, num_shards=2, lr=0.1) for model in (compiled, eager))
    step = torch.compile(lambda x, y: ours.step(losses_of(compiled), x, y), backend="eager")
    for x, y in batches(2):
        step(x, y)
    torch._dynamo.reset()
    assert_same(compiled, train(theirs, eager, batches(2)))


@pytest.mark.parametrize("way", ["scaler.step(opt)", "step(scaler=)"])
def test_a_scaler_that_has_seen_no_gradient_says_what_torch_says(way):
    model, scaler = mlp(torch.float32), torch.amp.GradScaler("cpu")
    opt = SAM(model.parameters(), SGD, lr=0.1)
    scaler.scale(torch.ones(()))
    nothing, batch = torch.zeros(12, requires_grad=True), batches(1, dtype=torch.float32)[0]
    call = {
        "scaler.step(opt)": lambda: scaler.step(opt),
        "step(scaler=)": lambda: opt.step(lambda x, y: nothing, *batch, scaler=scaler),
    }[way]
    with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer"):
        call()
    train(opt, model, batches(1, dtype=torch.float32))
