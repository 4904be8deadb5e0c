"""A captured step is the step that it was captured from: bit for bit, whatever changes between replays."""

import copy
import gc
import math
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, kernels
from problems import assert_same, snapshot
from torch import nn

from fastsam import ESAM, GSAM, MESA, MSAM, SAF, SAM, LookSAM, Weighted, graph_step, whole
from fastsam.graph import guards
from fastsam.graph import recorder as recorders
from fastsam.graph.plain_step import PlainOptimizerStep
from fastsam.graph.recorder import _Draws
from fastsam.schedule import Every, First, Last

if kernels is None:
    pytest.skip("triton is not installed", allow_module_level=True)

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
ROWS, CLASSES, BATCHES = 8, 3, 4
draws_of = torch.cuda if DEVICE == "cuda" else torch


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = (
        nn.Linear(6, 8, bias=False),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(8, CLASSES, bias=False),
    )
    return nn.Sequential(*layers).to(DEVICE, dtype)


def data(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCHES * ROWS, 6, generator=generator).to(DEVICE, dtype)
    y = torch.randint(0, CLASSES, (len(x),), generator=generator).to(DEVICE)
    ids = torch.arange(len(x), device=DEVICE)
    return list(zip(x.split(ROWS), y.split(ROWS), ids.split(ROWS), strict=True))


class Problem:
    """A model, an optimizer, a loss, and what changes from step to step."""

    def __init__(self, model, opt, losses=None, scaler=None, set_epoch=None, **options):
        self.model, self.opt, self.scaler, self.set_epoch, self.options = model, opt, scaler, set_epoch, options
        self.losses = losses or (lambda x, y, ids: F.cross_entropy(model(x), y, reduction="none"))

    def train(self, take, steps, first=0):
        found = []
        for i in range(first, first + steps):
            if i % BATCHES == 0 and self.set_epoch:
                self.set_epoch(1 + i // BATCHES)
            for j, group in enumerate(self.opt.param_groups):
                group["lr"] = 0.1 * (j + 1) * (1 + math.cos(math.pi * i / 60))
                if "rho" in group and i % 7 == 0:
                    group["rho"] = 0.05 * (1 + i % 3) * (j + 1)
                if i % 11 == 0 and "momentum" in group:
                    group["momentum"] = 0.9 - i / 1000
            batch = data(i // BATCHES, next(self.model.parameters()).dtype)[i % BATCHES]
            found.append(take(*batch))
            if self.scaler is not None:
                self.scaler.update()
        return found

    def eager(self):
        stepper = self.opt if hasattr(self.opt, "base_optimizer") else PlainOptimizerStep(self.opt, fused=True)
        return lambda *batch: stepper.step(self.losses, *batch, scaler=self.scaler, **self.options)

    def graphed(self, **options):
        example = data(dtype=next(self.model.parameters()).dtype)[0]
        return graph_step(self.opt, self.losses, *example, scaler=self.scaler, **self.options, **options)


def of(method, base=torch.optim.SGD, options=SGD, dtype=torch.float32, **keywords):
    def build():
        model = net(dtype=dtype)
        groups = [{"params": list(model[:2].parameters())}, {"params": list(model[2:].parameters())}]
        return Problem(model, method(groups, base, model=model, **options, **keywords))

    return build


def scaled(method=SAM):
    def build():
        model = net()
        opt = method(model.parameters(), torch.optim.SGD, model=model, **SGD)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0, growth_interval=5)
        return Problem(model, opt, scaler=scaler, clip_grad_norm=0.5)

    return build


def saf(opt_of=lambda model: torch.optim.SGD(model.parameters(), **SGD)):
    def build():
        model = net()
        loss = SAF(BATCHES * ROWS, CLASSES, lag=2, start_epoch=3, reduction="none")
        return Problem(model, opt_of(model), lambda x, y, ids: loss(model(x), y, ids), set_epoch=loss.set_epoch)

    return build


def mesa(opt_of=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01), dropout=True):
    def build():
        model = net()
        opt = opt_of(model)
        loss = MESA(model, decay=0.9, start_epoch=2, reduction="none")
        loss.attach(opt)
        problem = Problem(model, opt, lambda x, y, ids: loss(model(x), y, x), set_epoch=loss.set_epoch)
        problem.teacher = loss.teacher
        return problem

    return build


def sam_of(model):
    return SAM(model.parameters(), torch.optim.SGD, model=model, **SGD)


# methods, variants and bases as they are: the law in test_captures.py; here is what changes while they train
PROBLEMS = {
    "sam": of(SAM),
    "sam, unchecked": of(SAM, check_finite=False),
    "sam, new masks": of(SAM, same_rng=False),
    "sam, nesterov": of(SAM, options={**SGD, "nesterov": True}),
    "sam, bf16 weights": of(SAM, dtype=torch.bfloat16, options={"lr": 0.1, "momentum": 0.9}),
    "sam, scaler": scaled(),
    "esam": of(ESAM),
    "esam, elements": of(ESAM, mask="element"),
    "esam, full norm": of(ESAM, norm="full", gamma=0.8),
    "msam": of(MSAM, num_shards=3),
    "looksam": of(LookSAM, k=4),
    "saf": saf(),
    "mesa": mesa(),
}


@pytest.fixture
def recorder(monkeypatch, choose):
    """What records: on the CPU a stand-in for CUDA graphs."""
    choose("triton")
    if DEVICE == "cuda":
        return None
    from recorded_work import RecordedWork

    made = RecordedWork()
    monkeypatch.setattr(recorders, "recorder_for", lambda params, batch: made)
    return made


def both(build):
    """The same problem twice, for the eager optimizer and for replays."""
    torch.manual_seed(5)
    one = build()
    torch.manual_seed(5)
    return one, build()


def assert_trained_alike(expected, problem, losses, found):
    assert torch.equal(torch.stack(found), torch.stack(losses))
    assert_same(problem.model, snapshot(expected.model))
    assert_same_state(problem.opt.state_dict(), expected.opt.state_dict())


def assert_same_state(some, other):
    assert some["param_groups"] == other["param_groups"]
    for key, entry in other["state"].items():
        assert all(torch.equal(some["state"][key][name], value) for name, value in entry.items())


@pytest.mark.parametrize("name", PROBLEMS)
def test_steps_are_those_of_the_eager_optimizer_bit_for_bit(recorder, name):
    # radii change in every 7th step and momentum in every 11th; a loss with a past is active from the 9th or 13th on
    longer = name.startswith(("esam", "looksam")) or name in ("sam", "msam", "saf", "mesa")
    steps = 24 if longer else 12
    expected, problem = both(PROBLEMS[name])
    torch.manual_seed(6)
    losses = expected.train(expected.eager(), steps)
    step = problem.graphed()
    torch.manual_seed(6)
    found = problem.train(step, steps)
    assert step.captured
    # what runs as usual: a step in each epoch of a loss, a mask that perturbs nothing, LookSAM's SAM steps
    assert step.replays >= (steps // 2 if problem.set_epoch or name.startswith(("esam", "looksam")) else steps - 3)
    assert_trained_alike(expected, problem, losses, found)
    if hasattr(problem, "teacher"):
        assert_same(problem.teacher, snapshot(expected.teacher))


def test_batches_of_another_size_run_without_a_graph_in_between(recorder):
    expected, problem = both(PROBLEMS["esam"])
    step, eager = problem.graphed(), expected.eager()

    def partial_every_third(take):
        taken = 0

        def cut(*batch):
            nonlocal taken
            taken += 1
            return take(*(t[:5] for t in batch)) if taken % 3 == 0 else take(*batch)

        return cut

    torch.manual_seed(6)
    losses = expected.train(partial_every_third(eager), 20)
    torch.manual_seed(6)
    found = problem.train(partial_every_third(step), 20)
    assert 0 < step.replays <= 20 - 6 - 3
    assert_trained_alike(expected, problem, losses, found)


def test_what_a_step_leaves_is_what_the_eager_step_leaves(recorder):
    expected, problem = both(PROBLEMS["sam"])
    step, eager = problem.graphed(), expected.eager()
    for i in range(6):
        for take, p in ((eager, expected), (step, problem)):
            torch.manual_seed(i)
            take(*data()[0])
            p.opt.zero_grad() if i % 2 else None
        assert torch.equal(problem.opt.last_grad_norm, expected.opt.last_grad_norm)
        for p, q in zip(problem.model.parameters(), expected.model.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) == bool(i % 2)
            assert p.grad is None or torch.equal(p.grad, q.grad)
    assert step.replays == 3
    with pytest.raises(RuntimeError, match="needs fresh gradients"):
        problem.opt.first_step()


def test_gradients_that_are_not_finite_skip_the_step_in_a_replay_too(recorder):
    expected, problem = both(PROBLEMS["sam"])
    bad = data()[0][0].clone().fill_(torch.inf), *data()[0][1:]
    for take, p in ((expected.eager(), expected), (problem.graphed(), problem)):
        torch.manual_seed(6)
        for i in range(8):
            if i == 6:
                before = snapshot(p.model)
                take(*bad)
                for name, value in p.model.named_parameters():
                    assert torch.equal(value, before[name])
            else:
                take(*data()[i % BATCHES])
        assert p.opt.skipped_steps == 1
    assert_same_state(problem.opt.state_dict(), expected.opt.state_dict())


def test_a_checkpoint_in_between_goes_on_bit_for_bit(recorder):
    expected, problem = both(PROBLEMS["esam, elements"])
    step = problem.graphed()
    torch.manual_seed(6)
    expected.train(expected.eager(), 6)
    torch.manual_seed(6)
    problem.train(step, 6)
    assert step.captured
    draws, state = draws_of.get_rng_state(), copy.deepcopy(problem.opt.state_dict())
    weights = snapshot(problem.model)
    problem.train(step, 3, first=6)  # goes astray
    problem.model.load_state_dict(weights)
    problem.opt.load_state_dict(state)
    assert not step.captured
    draws_of.set_rng_state(draws)
    losses = expected.train(expected.eager(), 5, first=6)
    draws_of.set_rng_state(draws)
    assert_trained_alike(expected, problem, losses, problem.train(step, 5, first=6))
    assert step.captured


def without_dropout(opt_of):
    def build():
        model = net()
        model[3].p = 0.0
        return Problem(model, opt_of(model))

    return build


def changed_between_warm_up_and_capture(problem, take, change):
    take(*data()[0])
    change(problem)
    return [take(*data()[i]) for i in range(BATCHES)]


BETWEEN = {
    "a state dict": lambda p: p.opt.load_state_dict({**p.opt.state_dict(), "state": {}}),
    "a group": lambda p: p.opt.add_param_group({"params": list(p.model[4].parameters())}),
    "the state": lambda p: p.opt.state.clear(),
    "dropout": lambda p: p.model.eval(),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_changes_between_warm_up_and_capture_is_warmed_up_first(recorder, name):
    def opt_of(model):
        return SAM(model[:2].parameters(), torch.optim.SGD, model=model, **SGD)

    expected, problem = both(without_dropout(opt_of))
    step = problem.graphed(warmup=1)
    losses = changed_between_warm_up_and_capture(expected, expected.eager(), BETWEEN[name])
    found = changed_between_warm_up_and_capture(problem, step, BETWEEN[name])
    assert step.replays == BATCHES - 1
    assert_trained_alike(expected, problem, losses, found)


def test_epochs_that_begin_between_warm_up_and_capture(recorder):
    expected, problem = both(PROBLEMS["saf"])
    for take, p in ((expected.eager(), expected), (problem.graphed(warmup=1), problem)):
        torch.manual_seed(6)
        take(*data()[0])
        p.set_epoch(2)
        for batch in data():
            take(*batch)
    assert_same(problem.model, snapshot(expected.model))


def test_objects_in_a_batch_are_those_of_the_capture_or_there_is_no_replay(recorder):
    def losses_of(problem):
        return lambda x, y, ids, scale: F.cross_entropy(problem.model(x), y, reduction="none") * float(scale[0])

    expected, problem = both(without_dropout(sam_of))
    step = graph_step(problem.opt, losses_of(problem), *data()[0], whole([1.0]), warmup=1)
    kept = Holder(1.0)
    for i in range(12):
        for take, losses in ((expected.opt.step, losses_of(expected)), (None, None)):
            scale = kept if i % 3 == 0 else Holder(i / 10)  # a new object may lie where an old one lay
            take(losses, *data()[0], whole(scale)) if take else step(*data()[0], whole(scale))
    assert_same(problem.model, snapshot(expected.model))


class Holder:
    def __init__(self, value):
        self.value = value

    def __getitem__(self, index):
        return self.value


def test_numbers_in_a_batch_may_be_tensors(recorder):
    def losses_of(problem):
        return lambda x, y, ids, scale: F.cross_entropy(problem.model(x), y, reduction="none") * scale

    expected, problem = both(without_dropout(sam_of))
    scales = [torch.tensor(1.0 + i, device=DEVICE) for i in range(8)]
    step = graph_step(problem.opt, losses_of(problem), *data()[0], scales[0], warmup=1)
    for scale in scales:
        loss = expected.opt.step(losses_of(expected), *data()[0], scale)
        assert torch.equal(step(*data()[0], scale), loss)
    assert step.replays == 7


def test_frozen_tensors_do_not_hide_that_a_mask_perturbs_nothing(recorder):
    def opt_of(model):
        frozen = [nn.Parameter(torch.zeros(1, device=DEVICE), requires_grad=False) for _ in range(200)]
        groups = [{"params": frozen}, {"params": list(model.parameters())}]
        return ESAM(groups, torch.optim.SGD, model=model, beta=0.3, **SGD)

    expected, problem = both(without_dropout(opt_of))
    step = problem.graphed(warmup=1)
    losses = expected.train(expected.eager(), 16)
    assert_trained_alike(expected, problem, losses, problem.train(step, 16))
    assert 0 < step.replays < 15


def test_a_teacher_attached_later_follows_from_then_on(recorder):
    problem = PROBLEMS["sam"]()
    step = problem.graphed(warmup=1)
    problem.train(step, 3)
    loss = MESA(problem.model, decay=0.5)
    handle, before = loss.attach(problem.opt), snapshot(loss.teacher)
    problem.train(step, 4)
    assert not torch.equal(loss.teacher[0].weight, before["0.weight"])
    assert step.captured
    handle.remove()
    step(*data()[0])
    before = snapshot(loss.teacher)
    problem.train(step, 3)
    assert_same(loss.teacher, before)


def test_hooks_that_come_later_are_refused(recorder):
    problem = PROBLEMS["sam"]()
    step = problem.graphed(warmup=1)
    problem.train(step, 2)
    problem.opt.register_step_pre_hook(lambda *_: None)
    step(*data()[0])  # as usual, with the hook
    with pytest.raises(RuntimeError, match="SAM has step hooks"):
        step(*data()[0])


@pytest.mark.skipif(DEVICE == "cuda", reason="of the CPU's bfloat16")
def test_an_autocast_around_the_steps_uses_new_weights_in_between(recorder):
    problem = without_dropout(sam_of)()
    step, x = problem.graphed(warmup=1), data()[0][0]
    with torch.autocast("cpu", torch.bfloat16):
        for i in range(5):
            step(*data()[i % BATCHES])
            with torch.no_grad():
                found = problem.model.eval()(x)
                problem.model.train()
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                    assert torch.equal(found, problem.model.eval()(x))
                problem.model.train()
    assert step.replays == 4


def test_batch_norm_that_is_frozen_below_the_model_is_noticed(recorder):
    expected, problem = both(without_dropout(sam_of))
    step, eager = problem.graphed(warmup=1), expected.eager()
    for take, p in ((eager, expected), (step, problem)):
        p.train(take, 3)
        p.model[1].eval()
        p.train(take, 3, first=3)
    assert_same(problem.model, snapshot(expected.model))
    assert step.replays == 4


def test_norms_that_are_kept_stay_what_they_were(recorder):
    problem = PROBLEMS["sam"]()
    step = problem.graphed(warmup=1)
    norms = []
    for i in range(5):
        step(*data()[i % BATCHES])
        norms.append((problem.opt.last_grad_norm, problem.opt.last_grad_norm.item()))
    assert all(norm.item() == value for norm, value in norms)
    assert len({value for _, value in norms}) == 5


def change_group(key, value):
    return lambda problem: problem.opt.param_groups[0].update({key: value})


CHANGES = {
    "check": (lambda problem: setattr(problem.opt, "check_finite", False), "the optimizer's check_finite"),
    "state": (lambda problem: problem.opt.state.clear(), "the optimizer's state"),
    "gamma": (change_group("gamma", 1.0), "gamma of group 0"),
    "momentum": (change_group("momentum", 0.0), "whether group 0 has momentum"),
    "mode": (lambda problem: problem.model.eval(), "the mode of the model"),
    "frozen": (lambda problem: problem.model[0].weight.requires_grad_(False), "requires_grad of the parameters"),
    "groups": (
        lambda problem: problem.opt.add_param_group({"params": [nn.Parameter(torch.ones(3, device=DEVICE))]}),
        "lr of group 1",
    ),
    "lr": (
        lambda problem: problem.opt.param_groups[0].update(lr=torch.tensor(0.1, device=DEVICE)),
        "the kind of lr of group 0",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed_and_captured_anew(recorder, name):
    change, what = CHANGES[name]

    def build():
        model = net()
        return Problem(model, ESAM(model.parameters(), torch.optim.SGD, model=model, mask="element", **SGD))

    expected, problem = both(build)
    step, eager = problem.graphed(), expected.eager()
    for take, p in ((eager, expected), (step, problem)):
        torch.manual_seed(6)
        for i in range(9):
            if i == 5:
                change(p)
                if p is problem:
                    recorded = step._captured_step
                    assert what.removeprefix("lr of group 1") in (recorded.change() or "")
            take(*data()[i % BATCHES])
    assert step.replays == 2 + 3
    assert_same(problem.model, snapshot(expected.model))


def test_what_changes_in_every_step_ends_the_captures_with_a_warning(recorder):
    problem = of(ESAM, mask="element")()
    step = problem.graphed(warmup=1)

    def train():
        for i in range(12):
            if i % 2:
                problem.opt.param_groups[0]["gamma"] = 0.5 + i / 100
            step(*data()[0])

    with pytest.warns(UserWarning, match=r"without a graph: gamma of group 0 changes so often"):
        train()
    assert not step.captured


def test_losses_that_read_the_device_are_refused_and_nothing_has_happened(recorder):
    expected, problem = both(PROBLEMS["sam"])
    reads = False

    def losses(x, y, ids):
        found = F.cross_entropy(problem.model(x), y, reduction="none")
        if reads:
            found.sum().item()
        return found

    problem.losses = losses
    step = problem.graphed(warmup=2)
    torch.manual_seed(6)
    expected.train(expected.eager(), 2)
    torch.manual_seed(6)
    problem.train(step, 2)
    reads = True
    draws = draws_of.get_rng_state()
    with pytest.raises(RuntimeError, match=r"the step cannot be captured: .*Nothing was run") as raised:
        step(*data()[2])
    assert raised.value.__cause__ is not None
    assert torch.equal(draws_of.get_rng_state(), draws)
    assert_same(problem.model, snapshot(expected.model))
    assert_same_state(problem.opt.state_dict(), expected.opt.state_dict())
    reads = False
    losses = expected.train(expected.eager(), 6, first=2)
    draws_of.set_rng_state(draws)
    assert_trained_alike(expected, problem, losses, problem.train(step, 6, first=2))
    assert step.replays == 6


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2])
def test_an_exception_while_capturing_leaves_weights_and_statistics(recorder, error, call):
    problem, calls = PROBLEMS["msam"](), 0

    def losses(x, y, ids):
        nonlocal calls
        calls += 1
        if calls == 6 * 2 + call:  # three shards in two passes, two steps before
            raise error("planted")
        return F.cross_entropy(problem.model(x), y, reduction="none")

    problem.losses = losses
    step = problem.graphed(warmup=2)
    problem.train(step, 2)
    before, state = snapshot(problem.model), problem.opt.state_dict()["param_groups"]
    with pytest.raises(RuntimeError if error is ValueError else KeyboardInterrupt, match="planted"):
        step(*data()[2])
    assert_same(problem.model, before)
    assert problem.opt.state_dict()["param_groups"] == state
    problem.opt.step(problem.losses, *data()[2])
    problem.train(step, 3)
    assert step.replays == 3


def test_a_forgotten_update_of_the_scaler_is_noticed(recorder):
    problem = PROBLEMS["sam, scaler"]()
    step = problem.graphed()
    problem.train(step, 5)
    step(*data()[0])
    with pytest.raises(RuntimeError, match=r"since the GradScaler's last update\(\)"):
        step(*data()[0])


def test_a_scaler_that_is_off_is_none(recorder):
    problem = PROBLEMS["sam, scaler"]()
    problem.scaler = torch.amp.GradScaler(DEVICE, enabled=False)
    step = problem.graphed()
    problem.train(step, 6)
    assert step.replays == 3


def test_a_teacher_does_not_follow_a_skipped_step(recorder):
    problem = mesa(lambda model: torch.optim.SGD(model.parameters(), **SGD))()
    problem.scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0)
    step = problem.graphed()
    problem.set_epoch(3)
    for i in range(6):
        before = snapshot(problem.teacher)
        x, y, ids = data()[0]
        step(torch.full_like(x, torch.inf) if i in (1, 5) else x, y, ids)
        problem.scaler.update()
        moved = not torch.equal(problem.teacher[0].weight, before["0.weight"])
        assert moved == (i not in (1, 5))
    assert step.replays == 3


def test_a_step_that_nobody_holds_frees_its_graph(recorder):
    problem = PROBLEMS["sam"]()
    step = problem.graphed()
    problem.train(step, 4)
    gone = weakref.ref(step)
    del step
    gc.collect()
    assert gone() is None
    problem.opt.load_state_dict(problem.opt.state_dict())
    copy.deepcopy(problem.opt)


def test_a_plain_optimizer_steps_as_torch_does(recorder):
    def build():
        model = net()
        return Problem(model, torch.optim.SGD(model.parameters(), nesterov=True, **SGD))

    expected, problem = both(build)
    torch.manual_seed(6)
    losses = expected.train(lambda *b: PlainOptimizerStep(expected.opt).step(expected.losses, *b), 20)
    step = problem.graphed()
    torch.manual_seed(6)
    found = problem.train(step, 20)
    assert step.replays == 17
    torch.testing.assert_close(torch.stack(found), torch.stack(losses), rtol=1e-4, atol=1e-5)


def with_hook(model):
    opt = sam_of(model)
    opt.register_step_post_hook(lambda *_: None)
    return opt


def with_cumulative_norm(model):
    model[1].momentum = None
    return sam_of(model)


def test_a_key_that_is_gone_is_a_change_too():
    assert guards.change({"a": 1}, {"a": 1, "b": 2}) == "b"
    assert guards.change({"a": 1, "b": 2}, {"a": 1}) == "b"
    assert guards.change({"a": 1}, {"a": 1}) is None


REFUSED = [
    (with_hook, "SAM has step hooks"),
    (with_cumulative_norm, "momentum=None reads its counter"),
    (lambda m: SAM(m.parameters(), torch.optim.SGD, generators=[torch.Generator()], **SGD), "generators= are not part"),
    (lambda m: ESAM(m.parameters(), torch.optim.SGD, model=m, strict=True, **SGD), "strict=True reads"),
    (lambda m: SAM(m.parameters(), torch.optim.RMSprop, model=m), "the base step is RMSprop's own"),
    (lambda m: SAM(m.parameters(), torch.optim.SGD, lr=0.1, foreach=True), "the base step is SGD's own"),
    (lambda m: torch.optim.Adagrad(m.parameters()), "the base step is Adagrad's own"),
]


@pytest.mark.parametrize(("opt_of", "match"), REFUSED)
def test_steps_that_cannot_be_captured_are_refused(recorder, opt_of, match):
    with pytest.raises(ValueError, match=match):
        graph_step(opt_of(net()), lambda x, y, ids: None, *data()[0])


@pytest.mark.parametrize(
    ("act", "match"),
    [
        (lambda m: m.register_buffer("extra", m.extra + 1), "puts another tensor in the place of 'extra'"),
        (lambda m: random.random(), "draws from Python's random"),
        (lambda m: np.random.randn(), "draws from NumPy's global generator"),
    ],
)
def test_what_python_does_in_a_forward_is_refused_before_a_replay_would_leave_it_out(recorder, act, match):
    problem = PROBLEMS["sam"]()
    model = problem.model
    model.register_buffer("extra", torch.zeros(3, device=DEVICE))
    model.register_forward_hook(lambda *_: act(model) and None)
    step, before = problem.graphed(warmup=1), snapshot(model)
    with pytest.raises(RuntimeError, match=match):
        step(*data()[0])
    assert_same(model, before)


def test_a_buffer_in_another_place_is_noticed(recorder):
    problem = PROBLEMS["sam"]()
    step = problem.graphed()
    problem.train(step, 4)
    problem.model[1].running_mean = torch.zeros_like(problem.model[1].running_mean)
    problem.train(step, 3, first=4)
    assert problem.model[1].running_mean.any()


def test_amsgrad_is_refused_when_it_is_captured(recorder):
    problem = of(SAM, torch.optim.AdamW, {"lr": 0.01, "amsgrad": True})()
    step = problem.graphed(warmup=1)
    step(*data()[0])
    with pytest.raises(RuntimeError, match=r"cannot be captured: a parameter of shape .*amsgrad"):
        step(*data()[0])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((), {}, TypeError, "holds no tensor"),
        ((torch.ones(3), torch.ones(4)), {}, ValueError, "different leading sizes"),
        ((torch.ones(3),), {"warmup": 0}, ValueError, "warmup must be at least 1, got 0"),
        ((torch.ones(3),), {"warmup": 1.5}, TypeError, r"warmup must be an integer, got 1\.5"),
        ((torch.ones(3),), {"clip_grad_norm": -1}, ValueError, "clip_grad_norm must be positive, got -1"),
    ],
)
def test_bad_arguments(arguments, options, error, match):
    model = net()
    with pytest.raises(error, match=match):
        graph_step(sam_of(model), lambda *_: None, *arguments, **options)
    with pytest.raises(TypeError, match="opt must be a torch optimizer, got Sequential"):
        graph_step(model, lambda *_: None, torch.ones(3))
    with pytest.raises(TypeError, match="loss_fn must be a function of the batch, got int"):
        graph_step(sam_of(model), 3, torch.ones(3))


@pytest.mark.skipif(DEVICE == "cuda", reason="of the CPU")
@pytest.mark.parametrize("name", ["sam", "saf"])
def test_on_the_cpu_steps_are_eager(choose, name):
    choose("torch")
    expected, problem = both(PROBLEMS[name])
    torch.manual_seed(6)
    eager = expected.eager() if name == "sam" else lambda *b: PlainOptimizerStep(expected.opt).step(expected.losses, *b)
    losses = expected.train(eager, 10)
    step = problem.graphed()
    torch.manual_seed(6)
    assert_trained_alike(expected, problem, losses, problem.train(step, 10))
    assert (step.captured, step.replays) == (False, 0)


# random numbers of CUDA graphs, on a generator that is made up


class State:
    """What a CUDA generator's state does: in a capture it counts from 0, to be placed anew in every replay."""

    def __init__(self, seed, offset):
        self.seed, self.offset, self.within = seed, offset, None


class Generator:
    """The parts of torch.Generator that take part; `draw` returns which numbers a kernel would draw."""

    def __init__(self, state):
        self.state = state

    def draw(self, n):
        """In a capture, return a function that says it for a replay."""
        state = self.state
        if state.within is None:
            state.offset += n
            return state.seed, state.offset - n
        state.within += n
        return lambda within=state.within - n: (state.seed, state.placed + within)

    def get_offset(self):
        assert self.state.within is None
        return self.state.offset

    def set_offset(self, offset):
        assert self.state.within is None
        self.state.offset = offset

    def initial_seed(self):
        return self.state.seed

    def manual_seed(self, seed):
        self.state.seed, self.state.offset = seed, 0

    def clone_state(self):
        return Generator(State(self.state.seed, self.state.offset))

    def graphsafe_get_state(self):
        return Generator(self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state


class Graph:
    """Registers states as torch.cuda.CUDAGraph does, the default generator's among them."""

    def __init__(self, default):
        self.default, self.states = default, []

    def register_generator_state(self, generator):
        self.states.append(generator.state)

    def capture(self, run):
        self.states.append(self.default.state)
        for state in self.states:
            state.within = 0
        drawn = run()
        self.increments = [state.within for state in self.states]
        for state in self.states:
            state.within = None
        return drawn

    def replay(self, drawn):
        for state, increment in zip(self.states, self.increments, strict=True):
            state.placed = state.offset
            state.offset += increment
        return [numbers() for numbers in drawn]


@pytest.mark.parametrize("dropout", [8, 0])
def test_a_graph_draws_the_numbers_of_the_eager_step(dropout):
    def step(generator, mark, rewind):
        """mSAM of two shards with ESAM's two forwards in the second pass."""
        drawn = []
        for _ in range(2):
            start = mark()
            drawn += [generator.draw(dropout), generator.draw(2 * dropout)]  # first pass
            after = mark()
            for _ in range(2):
                rewind(start)
                drawn += [generator.draw(dropout), generator.draw(2 * dropout)]
            rewind(after)
        return [*drawn, generator.draw(dropout)]

    eager = Generator(State(7, 40))

    def eager_step():
        return step(eager, eager.get_offset, eager.set_offset)

    generator = Generator(State(7, 40))
    draws = _Draws(generator)
    with draws.warm_up():
        marks = []  # an eager step puts the generator where it was by itself

        def mark():
            marks.append(generator.get_offset())
            return draws.mark()

        def rewind(number):
            draws.rewind(number)
            generator.set_offset(marks[number])

        first = step(generator, mark, rewind)
    assert first == eager_step()
    graph = Graph(generator)
    with draws.recording(graph):
        drawn = graph.capture(lambda: step(generator, draws.mark, draws.rewind))
    assert len(graph.states) == (7 if dropout else 1)
    for i in range(4):
        if i == 2:
            eager.manual_seed(9)
            generator.manual_seed(9)
        with draws.replay():
            found = graph.replay(drawn)
        expected = eager_step()
        assert found == expected or not dropout  # nobody asks where nothing is drawn
        assert generator.get_offset() == eager.get_offset()
        assert generator.draw(4) == eager.draw(4)  # somebody else's


def test_a_capture_that_draws_in_another_order_fails_and_hands_the_generator_back():
    generator = Generator(State(7, 40))
    draws = _Draws(generator)
    with draws.warm_up():
        mark = draws.mark()
        generator.draw(4)
        draws.rewind(mark)
    own = generator.state
    recording = draws.recording(Graph(generator))
    recording.__enter__()
    assert generator.state is not own  # which a capture that fails would spoil
    draws.mark()
    with pytest.raises(RuntimeError, match="in another order"):
        recording.__exit__(None, None, None)
    assert generator.state is own
    assert (own.seed, own.offset, own.within) == (7, 44, None)


def test_captures_refuse_given_masks_and_keep_the_selection_of_a_replay(recorder):
    found = []
    expected, problem = both(of(ESAM, seed=4))
    for one in (expected, problem):
        torch.manual_seed(6)
        step = one.graphed(warmup=1) if one is problem else one.eager()
        for batch in data():
            step(*batch)
            found.append(one.opt.last_selection)
        if one is problem:
            assert step.replays > 1
            one.opt.given_mask = [True] * len(list(one.model.parameters()))
            with pytest.raises(ValueError, match="given_mask"):
                graph_step(one.opt, one.losses, *data()[0])
            before = snapshot(one.model)
            with pytest.raises(RuntimeError, match="given_mask is set, but a captured step draws its masks"):
                step(*data()[0])
            assert_same(one.model, before)
            one.opt.given_mask = None
            step(*data()[0])
    for a, b in zip(found[: len(data())], found[len(data()) :], strict=True):
        assert a.mask == b.mask
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.after, b.after)


@pytest.mark.parametrize("method", [SAM, ESAM, LookSAM, of(MSAM, num_shards=3)], ids=["sam", "esam", "looksam", "msam"])
@pytest.mark.parametrize("total", [None, "tensor", "number"])
def test_weighted_losses_are_captured_with_their_total(recorder, method, total):
    """A total among the batch's arguments is followed: a 0-dim tensor by replays, a number by other captures."""
    build = of(method) if isinstance(method, type) else method
    found = []
    expected, problem = both(build)
    for one in (expected, problem):
        torch.manual_seed(6)

        def losses(x, y, t, one=one):
            rows = F.cross_entropy(one.model(x), y, reduction="none")
            return Weighted(rows, 1.0 + (y == 0), t)

        step = graph_step(one.opt, losses, *data()[0][:2], total_of(total, 1), warmup=1) if one is problem else None
        for i, (x, y, _) in enumerate(data()):
            t = total_of(total, 4 + i)
            found.append(step(x, y, t) if step else one.opt.step(losses, x, y, t))
    half = len(found) // 2
    assert torch.equal(torch.stack(found[:half]), torch.stack(found[half:]))
    assert_same(problem.model, snapshot(expected.model))
    if total != "number":
        assert step.replays > 0


def total_of(kind, value):
    return None if kind is None else torch.tensor(float(value), device=DEVICE) if kind == "tensor" else float(value)


# schedules


class Ramp:
    """Nothing for five steps, a radius that grows for five, and nothing for the others."""

    def scale(self, step):
        return (step - 4) / 5 if 5 <= step < 10 else 0.0


SCHEDULED = {
    "sam": (SAM, {}),
    "esam": (ESAM, {}),
    "msam": (MSAM, {"num_shards": 3}),
    "gsam, radius by rate": (GSAM, {"rho": 0.2, "rho_min": 0.05, "lr_max": 0.2}),
    "looksam": (LookSAM, {"k": 2}),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_capture_stands_for_one_phase_and_follows_the_ramp(recorder, name):
    cls, options = SCHEDULED[name]
    expected, problem = both(of(cls, when=Ramp(), **options))
    torch.manual_seed(6)
    losses = expected.train(expected.eager(), 14)
    step = problem.graphed(warmup=1)
    torch.manual_seed(6)
    found = problem.train(step, 14)
    assert_trained_alike(expected, problem, losses, found)
    if recorder is not None and name != "looksam":
        assert recorder.recordings == 3
    # one step of each phase runs as usual; of LookSAM's active ones those of two passes too
    assert step.replays == (8 if name == "looksam" else 11)


def test_a_radius_of_zero_is_another_phase(recorder):
    expected, problem = both(of(SAM))
    step, eager = problem.graphed(warmup=1), expected.eager()
    torch.manual_seed(6)
    losses = [step_of(expected, eager, i) for i in range(9)]
    torch.manual_seed(6)
    found = [step_of(problem, step, i) for i in range(9)]
    assert_trained_alike(expected, problem, losses, found)
    assert step.replays == 6


def step_of(problem, take, i):
    for group in problem.opt.param_groups:
        group["rho"] = 0.0 if 3 <= i < 6 else 0.1 + i / 100
    return problem.train(take, 1, first=i + 1)[0] if i % 7 != 6 else problem.train(take, 1, first=i + 2)[0]


def test_steps_that_perturb_every_fifth_time_run_as_usual_between_replays(recorder):
    expected, problem = both(of(SAM, when=Every(5)))
    torch.manual_seed(6)
    losses = expected.train(expected.eager(), 15)
    step = problem.graphed(warmup=1)
    torch.manual_seed(6)
    assert_trained_alike(expected, problem, losses, problem.train(step, 15))
    assert step.replays == 3 * 3


@pytest.mark.parametrize("when", [Last(0.5, 6), First(0.5, 6)])
def test_replays_beyond_the_run_are_told_once(recorder, when):
    _, problem = both(of(SAM, when=when))
    step = problem.graphed(warmup=1)
    problem.train(step, 6)
    with pytest.warns(UserWarning, match="this is step 7 of a run that is to have total_steps=6"):
        problem.train(step, 1)
    problem.train(step, 2)
    assert step.captured
