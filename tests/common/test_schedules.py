"""The laws of schedules: `when=` says which steps perturb; the others are the base optimizer's, at its price."""

import math

import pytest
import torch
import torch.nn.functional as F
from laws import PLAIN, Subject, law
from methods import WAYS, Step, plain
from problems import assert_same, batches, largest_difference, losses_of, mlp, snapshot
from test_resume import assert_same_states, through_a_file
from training import STEPS, Training, Truth, data

from fastsam import ESAM, GSAM, MSAM, SAM, LookSAM, Weighted
from fastsam.graph.plain_step import PlainOptimizerStep
from fastsam.schedule import Every, First, Last
from fastsam.testing import check_step
from fastsam.two_pass.restore_step import steps_in_a_kernel

SGD = torch.optim.SGD
START = 3
"""Where the last half of a training's steps begins."""
OF_NO_PAIR = {"a batch is a step of its own": lambda cell: cell.way not in ("backward", "contexts")}
REMEMBERS = {"losses that remember are seen more often": lambda cell: cell.subject.loss is not None}
UNEQUAL = {
    "between contexts nobody says how many rows a shard has": lambda cell: (
        cell.subject.row == "msam" and cell.way == "contexts"
    )
}
IN_ONE_CALL = {"whole steps have no needless pass": lambda cell: cell.way not in ("contexts", "two_steps")}
RADIUS_BY_RATE = {"rho_min is a radius, whatever rho is": lambda cell: cell.subject.variant == "radius by rate"}


class Scale:
    """Perturbs as far as a list says, in each step by one number of it, or as one number says in all."""

    def __init__(self, *scales):
        self.scales = scales

    def scale(self, step):
        return self.scales[step] if len(self.scales) > 1 else self.scales[0]

    def __repr__(self):
        return f"Scale{self.scales}"


def counting(training):
    """The training's losses, and how often they and a backward from them have run."""
    seen = {"forwards": 0, "backwards": 0}

    def count(gradient):
        seen["backwards"] += 1

    def losses(*batch):
        seen["forwards"] += 1
        found = training.losses(*batch)
        if found.requires_grad:
            found.register_hook(count)
        return found

    return losses, seen


def take_what_is_needed(training, losses):
    """A step in the cell's way, without the second pass of contexts and two calls where it is not needed."""
    opt, batch = training.opt, training.batch
    if training.cell.way == "contexts" and not opt.needs_second_pass:
        with opt.ascent():
            losses(*batch).mean().backward()
        opt.step()
        opt.zero_grad()
    elif training.cell.way == "two_steps" and not opt.needs_second_pass:
        losses(*batch).mean().backward()
        opt.step()
        opt.zero_grad()
    else:
        return WAYS[training.cell.way](opt, losses, *batch)
    return None


def by_what_is_needed(training, losses):
    training.begin()
    returned = take_what_is_needed(training, losses)
    training.taken += 1
    return returned


def plain_step(training, losses):
    """A step of a plain torch optimizer in a plain loop, in our kernel where that takes the steps of both."""
    training.begin()
    if training.cell.backend == "triton" and steps_in_a_kernel(training.opt):
        PlainOptimizerStep(training.opt, fused=True).step(losses, *training.batch)
    else:
        training.opt.zero_grad()
        losses(*training.batch).mean().backward()
        training.opt.step()
    training.taken += 1


def base_of(cell, **keywords):
    """The same training by the base optimizer alone."""
    subject = Subject(cell.subject.row, cell.subject.variant) if cell.subject.loss else Subject("sgd")
    return Training(cell._replace(subject=subject, way="loss_fn"), **keywords)


def counters(training):
    return {name: training.opt.param_groups[0][f"fastsam_{name}"] for name in ("step", "taken", "active")}


def assert_same_base(ours, base):
    """Whether weights, statistics and moments are the same, bit for bit."""
    assert_same(ours.model, snapshot(base.model))
    for p, q in zip(ours.model.parameters(), base.model.parameters(), strict=True):
        kept = {k: v for k, v in ours.opt.state.get(p, {}).items() if not k.startswith("fastsam_")}
        assert_same_states(kept, dict(base.opt.state.get(q, {})))


@law(skips=PLAIN, backends=("torch", "triton"))
def test_an_inactive_step_is_the_bases_bit_for_bit_and_at_its_price(cell):
    torch.manual_seed(5)
    ours = Training(cell, dropout=0.3, when=Scale(0.0))
    losses, seen = counting(ours)
    for _ in range(STEPS):
        assert not ours.opt.needs_second_pass
        by_what_is_needed(ours, losses)
    draws = torch.get_rng_state()
    torch.manual_seed(5)
    base = base_of(cell, dropout=0.3)
    for _ in range(STEPS):
        plain_step(base, base.losses)
    assert_same_base(ours, base)
    assert torch.equal(draws, torch.get_rng_state())
    assert seen == {"forwards": STEPS, "backwards": STEPS}
    assert counters(ours) == {"step": 0, "taken": STEPS, "active": 0}
    assert ours.opt.last_grad_norm is None
    assert not any(name.startswith("fastsam_") for state in ours.opt.state.values() for name in state)


@law(skips=PLAIN | RADIUS_BY_RATE, backends=("torch", "triton"))
def test_a_step_of_radius_zero_is_inactive(cell):
    trainings = Training(cell, rho=0.0), Training(cell, when=Scale(0.0))
    (losses, seen), *_ = map(counting, trainings)
    for _ in range(STEPS):
        assert not trainings[0].opt.needs_second_pass
        by_what_is_needed(trainings[0], losses)
        by_what_is_needed(trainings[1], trainings[1].losses)
    assert seen == {"forwards": STEPS, "backwards": STEPS}
    assert_same(trainings[0].model, snapshot(trainings[1].model))
    assert counters(trainings[0]) == counters(trainings[1])


@law(skips=PLAIN | IN_ONE_CALL)
def test_a_needless_second_pass_is_paid_and_changes_nothing(cell):
    """At weights that nothing perturbs; without dropout, which two calls draw anew."""
    ours, base = Training(cell, when=Scale(0.0)), base_of(cell)
    losses, seen = counting(ours)
    for _ in range(STEPS):
        batch = ours.batch
        # a loop that cuts the batch itself, as mSAM's does, accumulates it
        parts = [pair.batch for pair in ours.opt.passes(batch)] if cell.way == "contexts" else [batch]
        weights = [pair.weight for pair in ours.opt.passes(batch)] if cell.way == "contexts" else [1.0]
        ours.step(losses)
        base.begin()
        base.opt.zero_grad()
        for part, weight in zip(parts, weights, strict=True):
            (base.losses(*part).mean() * weight).backward()
        base.opt.step()
        base.taken += 1
    assert_same_base(ours, base)
    assert seen["forwards"] == seen["backwards"] == 2 * STEPS * len(parts)


@law(skips=PLAIN, backends=("torch", "triton"))
def test_from_its_start_on_a_schedule_is_the_method_bit_for_bit(cell):
    """And the base before; T + (T - start) passes, but for LookSAM's and ESAM's steps of one pass."""
    torch.manual_seed(5)
    scheduled = Training(cell, dropout=0.3, when=Last(0.5, STEPS))
    for _ in range(START):
        by_what_is_needed(scheduled, scheduled.losses)
    always = Training(cell, dropout=0.3).load(through_a_file(scheduled.state()))
    losses, seen = counting(always)
    always.train(0)
    draws = torch.get_rng_state()
    for _ in range(STEPS - START):
        always.step(losses)
    torch.set_rng_state(draws)
    own, seen_own = counting(scheduled)
    for _ in range(STEPS - START):
        scheduled.step(own)
    assert_same(scheduled.model, snapshot(always.model))
    assert_same_states(scheduled.state(), always.state())
    assert seen == seen_own
    if cell.subject.row in ("sam", "asam", "gsam"):
        assert seen_own["forwards"] == 2 * (STEPS - START)


RAMPED = (0.0, 1.0, 0.25, 0.0, 0.5, 1.0)


class ScheduledTruth(Truth):
    """The same training by the oracles, which perturb as far as RAMPED says."""

    active = 0

    def step(self):
        batch, self.first = (*data(torch.float64)[self.taken], torch.arange(len(self.batch_rows))), None
        lr = self.base.param_groups[0]["lr"] = self.lr * (1 - self.taken / 20)
        scale, options = RAMPED[self.taken], {**self.options, "lr": lr}
        options |= {name: scale * options[name] for name in ("rho", "rho_min") if name in options}
        step = Step(self.model, self.losses, batch, options, self.active, self.memory)
        oracle = self.oracle if scale else plain
        for p, d_n in zip(self.model.parameters(), oracle(step), strict=True):
            p.grad = d_n
        self.base.step()
        if self.past is not None:
            self.past.after_step(self.first, batch[2], self.taken + 1)
        self.taken += 1
        self.active += scale > 0
        return torch.cat(step.seen).mean()

    @property
    def batch_rows(self):
        return data(torch.float64)[self.taken][1]


@law(skips=PLAIN, backends=("torch", "triton"))
def test_a_scaled_radius_is_that_of_the_equations(cell):
    truth, ours = ScheduledTruth(cell), Training(cell, when=Scale(*RAMPED))
    for _ in range(STEPS):
        expected, loss = truth.step(), by_what_is_needed(ours, ours.losses)
        if cell.way == "loss_fn":
            assert abs(loss - expected) < 1e-10
    assert largest_difference(ours.model, truth.model) < 1e-10
    assert counters(ours)["active"] == truth.active


@law(skips=PLAIN)
def test_a_schedule_resumes_in_its_phase_bit_for_bit(cell):
    """Before the start, in the ramp, and after it."""
    when = Last(0.8, STEPS, ramp=3)
    whole, saved = Training(cell, dropout=0.3, when=when), {}
    for _ in range(STEPS):
        saved[whole.taken] = through_a_file(whole.state())
        whole.step()
    assert [when.scale(t) for t in range(STEPS)] == [0, 1 / 3, 2 / 3, 1, 1, 1]
    for taken in (0, 1, 2, 5):
        resumed = Training(cell, dropout=0.3, when=when, rho=0.7).load(saved[taken]).train(STEPS - taken)
        assert_same(resumed.model, snapshot(whole.model), f"resumed after {taken} steps:")
        assert_same_states(resumed.state(), whole.state())


@law(skips=PLAIN | OF_NO_PAIR | REMEMBERS)
def test_all_micro_batches_of_a_step_are_in_one_phase(cell):
    """Every second step perturbs; the others add up plain gradients, bit for bit."""
    ours, base = Training(cell, when=Every(2)), base_of(cell)
    parts = [slice(0, 8), slice(8, 14)]
    losses, seen = counting(ours)
    for t in range(4):
        before = dict(seen)
        ours.begin()
        ours.opt.zero_grad()
        base.model.load_state_dict(ours.model.state_dict())
        base.opt.zero_grad()
        base.begin()
        for i, part in enumerate(parts):
            batch = [b[part] for b in ours.batch]
            assert ours.opt.needs_second_pass == (t % 2 == 0) or cell.subject.row in ("looksam", "esam")
            if cell.way == "backward":
                ours.opt.backward(losses, *batch)
            else:
                for pair in ours.opt.passes(batch) if t % 2 == 0 else [(batch,)]:
                    with ours.opt.ascent():
                        losses(*pair[0]).mean().backward()
                    if ours.opt._run.stage.name == "ASCENDED":
                        with ours.opt.descent(sync=i == 1):
                            losses(*pair[0]).mean().backward()
            base.losses(*batch).mean().backward()
        if t % 2:
            assert [seen[name] - before[name] for name in seen] == [len(parts)] * 2
            grads = [(p.grad, q.grad) for p, q in zip(ours.model.parameters(), base.model.parameters(), strict=True)]
            assert all(torch.equal(*pair) for pair in grads)
            assert all(map(torch.equal, ours.model.buffers(), base.model.buffers()))
        ours.opt.step()
        ours.taken += 1
        base.taken += 1
    assert counters(ours)["taken"] == 4
    assert counters(ours)["active"] == 2


@law(skips=PLAIN | {"strict=True raises where no loss is a number": lambda cell: cell.subject.variant == "strict"})
def test_a_skipped_step_counts_in_every_phase(cell):
    """As a step that the schedule's length holds, whether inf or NaN was found or not."""
    training = Training(cell, when=Last(0.5, STEPS))
    for t in range(STEPS):
        before = training.weights()
        poisoned = lambda *batch, t=t: training.losses(*batch) * (math.nan if t % 3 == 2 else 1.0)  # noqa: E731
        training.step(poisoned)
        assert all(map(torch.equal, before, training.weights())) == (t % 3 == 2)
    assert training.opt.skipped_steps == 2
    assert counters(training)["taken"] == STEPS
    assert counters(training)["active"] == STEPS - START


@law(skips=PLAIN | REMEMBERS | UNEQUAL)
def test_check_step_knows_schedules(cell):
    training = Training(cell, when=Scale(*RAMPED))
    for _ in range(STEPS):
        training.begin()
        check_step(
            training.opt,
            training.losses,
            *training.batch,
            take_step=lambda: take_what_is_needed(training, training.losses),
        )
        by_what_is_needed(training, training.losses)


# the schedules themselves


@pytest.mark.parametrize(
    ("when", "active"),
    [
        (Every(1), range(10)),
        (Every(4), (0, 4, 8)),
        (Last(0.3, 10), (7, 8, 9)),
        (Last(0.25, 10), (8, 9)),  # (1 - f) T + 0.5 = 8
        (Last(1.0, 10), range(10)),
        (First(0.3, 10), (0, 1, 2)),
        (First(0.25, 10), (0, 1, 2)),  # 2.5 rounds up
        (First(1, 10), range(10)),
        (Last(0.5, total_epochs=3, steps_per_epoch=3), range(6, 9)),  # 1.5 epochs round up
        (First(0.5, total_epochs=3, steps_per_epoch=3), range(6)),
        (First(0.2, total_epochs=5, steps_per_epoch=2), (0, 1)),
    ],
    ids=repr,
)
def test_which_steps_perturb(when, active):
    length = getattr(when, "total_steps", 10)
    assert [t for t in range(length) if when.scale(t)] == list(active)
    assert {when.scale(t) for t in range(length)} <= {0.0, 1.0}


def test_a_ramp_grows_by_equal_amounts():
    assert [Last(0.5, 8, ramp=4).scale(t) for t in range(9)] == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert Last(0.5, 8, 4).scale(4) == 0.25


@pytest.mark.parametrize("build", [lambda: Last(0.3), lambda: First(0.3), lambda: Last(0.3, total_epochs=3)])
def test_a_part_of_a_run_of_unknown_length_is_refused(build):
    with pytest.raises(
        ValueError, match="needs the length of the run, total_steps or else total_epochs with steps_per"
    ):
        build()


def test_a_bad_scale_is_named_before_anything_changes():
    model, (x, y) = mlp(), batches(1)[0]
    opt = SAM(model.parameters(), SGD, when=Scale(1.0, 1.5, math.nan), lr=0.1)
    opt.step(losses_of(model), x, y)
    before = snapshot(model)
    losses_of(model)(x, y).mean().backward()
    calls = [
        lambda: opt.step(losses_of(model), x, y),
        lambda: opt.backward(losses_of(model), x, y),
        opt.step,
        opt.ascent,
        opt.first_step,
        lambda: opt.needs_second_pass,
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=r"scale\(1\) of when=Scale\(1.0, 1.5, nan\) must be finite and in \[0, 1\]"
        ):
            call()
    opt.when = object()
    with pytest.raises(TypeError, match=r"when must be None or a schedule, an object with scale\(step\), got <object"):
        opt.step(losses_of(model), x, y)
    assert_same(model, before)
    opt.when = None
    opt.step(losses_of(model), x, y)


@pytest.mark.parametrize("when", [Last(0.5, 2), First(0.5, 2)])
def test_a_run_longer_than_its_schedule_is_told_once(when):
    model, (x, y) = mlp(), batches(1)[0]
    opt = SAM(model.parameters(), SGD, when=when, lr=0.1)
    for _ in range(2):
        opt.step(losses_of(model), x, y)
    opt.state_dict()
    with pytest.warns(UserWarning, match=r"this is step 3 of a run that is to have total_steps=2.*Pass the length"):
        opt.step(losses_of(model), x, y)
    opt.step(losses_of(model), x, y)
    assert opt.needs_second_pass == isinstance(when, Last)


def test_a_schedule_that_never_became_active_says_so_once():
    model, (x, y) = mlp(), batches(1)[0]
    opt = SAM(model.parameters(), SGD, rho=0.0, when=Last(0.5, 4), lr=0.1)
    for _ in range(4):
        opt.state_dict()
        opt.step(losses_of(model), x, y)
    with pytest.warns(UserWarning, match="4 steps are taken, and none of them was perturbed: rho was 0"):
        opt.state_dict()
    opt.state_dict()


# methods


def test_the_hybrids_of_msam():
    """mSAM first and SGD then, and the reverse (mSAM, Appendix A): optimizer and statistics carry over untouched."""
    for when in (First(0.5, STEPS), Last(0.5, STEPS)):
        model, other = mlp(batchnorm=True), mlp(batchnorm=True)
        options = {"lr": 0.1, "momentum": 0.9}
        opt = MSAM(model.parameters(), SGD, num_shards=3, when=when, model=model, **options)
        base = SGD(other.parameters(), **options)
        msam = MSAM.wrap(base, num_shards=3, model=other)
        for t, (x, y) in enumerate(batches(STEPS)):
            opt.step(losses_of(model), x, y)
            if when.scale(t):
                msam.step(losses_of(other), x, y)
            else:
                base.zero_grad()
                F.cross_entropy(other(x), y).backward()
                base.step()
            assert_same(model, snapshot(other), f"{when} after step {t}:")


def test_an_inactive_step_of_esam_uses_all_rows():
    model, (x, y) = mlp(), batches(1)[0]
    opt = ESAM(model.parameters(), SGD, beta=1.0, gamma=0.5, when=Scale(1.0, 0.0, 1.0), lr=0.1)
    shares = []
    for _ in range(3):
        opt.step(losses_of(model), x, y)
        shares.append((opt.last_selected_fraction, opt.last_selection is None, opt.last_perturbed_loss is None))
    assert shares == [(0.5, False, False), (1.0, True, True), (0.5, False, False)]


@pytest.mark.parametrize("rows", [1, 2])
def test_an_inactive_step_of_msam_takes_batches_that_no_shards_can_be_cut_from(rows):
    model, (x, y) = mlp(), batches(1)[0]
    opt = MSAM(model.parameters(), SGD, num_shards=4, when=Scale(0.0, 1.0), lr=0.1)
    opt.step(losses_of(model), x[:rows], y[:rows])
    with pytest.raises(ValueError, match="num_shards=4 is more than"):
        opt.step(losses_of(model), x[:rows], y[:rows])


@pytest.mark.parametrize("cls", [SAM, MSAM, ESAM])
def test_an_inactive_step_has_the_objective_of_a_plain_one(cls):
    """That of weights over all rows, whatever shards and rows an active step would take."""
    model, other, (x, y) = mlp(), mlp(), batches(1)[0]
    weights = torch.linspace(0.0, 2.0, len(x), dtype=torch.float64)
    own = {"num_shards": 3, "weighting": "uniform"} if cls is MSAM else {}
    opt, base = cls(model.parameters(), SGD, when=Scale(0.0), lr=0.1, **own), SGD(other.parameters(), lr=0.1)
    loss = opt.step(lambda x, y: Weighted(losses_of(model)(x, y), weights), x, y)
    expected = (losses_of(other)(x, y) * weights).sum() / weights.sum()
    expected.backward()
    base.step()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-14, atol=0)
    assert largest_difference(model, other) < 1e-15


def test_looksams_vector_and_period_stand_still_in_inactive_steps():
    model, data_of_steps = mlp(), batches(7)
    opt = LookSAM(model.parameters(), SGD, k=2, when=Scale(0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0), lr=0.1, momentum=0.9)
    kinds, vectors = [], []
    for x, y in data_of_steps:
        kinds.append(opt.needs_second_pass)
        opt.step(losses_of(model), x, y)
        vectors.append(opt.states_of(list(model.parameters()), "g_v")[0].clone())
    assert kinds == [False, True, False, False, False, True, False]
    assert not vectors[0].any()
    assert vectors[1].any()
    assert all(torch.equal(vectors[1], v) for v in vectors[2:5])
    assert not torch.equal(vectors[4], vectors[5])


def test_gsams_radius_by_rate_is_scaled():
    model = mlp()
    opt = GSAM(model.parameters(), SGD, rho=0.2, rho_min=0.1, lr_max=1.0, lr=0.5, when=Scale(0.5))
    assert opt.radius(opt.param_groups[0]) == pytest.approx(0.5 * 0.15)
    opt = GSAM(model.parameters(), SGD, rho=0.0, rho_min=0.1, lr_max=1.0, lr=0.5)
    assert opt.needs_second_pass


def test_contexts_made_ahead_of_an_inactive_step():
    model, (x, y) = mlp(), batches(1)[0]
    opt = SAM(model.parameters(), SGD, when=Scale(0.0), lr=0.1)
    for context in (opt.ascent(), opt.descent()):
        with context:
            losses_of(model)(x, y).mean().backward()
    opt.step()


def test_a_step_that_only_makes_state_is_none_of_the_schedules():
    """As torch.distributed.checkpoint takes one at a rate of 0, whenever SGD without momentum has no gradients."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, (x, y) = mlp(), batches(1)[0]
    opt = SAM(model.parameters(), SGD, when=Last(0.5, 4), lr=0.1)
    opt.step(losses_of(model), x, y)
    opt.zero_grad()
    state = get_optimizer_state_dict(model, opt)
    assert opt.param_groups[0]["fastsam_taken"] == 1
    assert state["param_groups"][0]["fastsam_taken"] == 1
    for kind in (False, True, True):
        assert opt.needs_second_pass == kind
        opt.step(losses_of(model), x, y)
