"""Random orders of calls: every call does what plain torch does, or says what to do instead and changes nothing."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from methods import BASES
from mirror import ASCENDED, ASCENT, DATA, DESCENT, FIRST, IDLE, METHODS_AND_OPTIONS, Mirror, Net, losses_of
from surroundings import FIGURES, budget, changes, picture

from fastsam.methods import METHODS

WAYS_OUT = re.compile(
    r"zero_grad\(\)|restore\(\)|second_step\(\)|leave |run `with|opt\.step\(|backward\(\)|first_step\(\) first"
)
"""One of these stands in every refusal."""
batch_numbers = st.integers(0, len(DATA) - 1)
COUNTS = FIGURES["orders of calls"]


class CrashError(Exception):
    """Raised by user code within a pass."""


class Orders(RuleBasedStateMachine):
    """One model and optimizer, and beside it the mirror that takes the same calls in plain torch."""

    method = base = None

    @initialize()
    def build(self):
        torch.manual_seed(0)
        self.model = Net()
        row, options = METHODS_AND_OPTIONS[self.method]
        base_cls, base_options = BASES[self.base]
        params = list(self.model.body.parameters())
        self.opt = METHODS[row].build(params, base_cls, model=self.model, base_options=base_options, **options)
        self.context = None
        self.mirror = Mirror(self.method, self.base, torch.get_rng_state())
        # building the mirror's model has drawn
        torch.set_rng_state(self.mirror.draws)
        self.states = []
        COUNTS["orders"] += 1

    # how calls are made

    @property
    def counter(self):
        return self.opt.param_groups[0]["fastsam_step"]

    def call(self, name, act):
        """Make a call if it is legal, and return whether it was; else hold its refusal to the law."""
        COUNTS["calls"] += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.mirror.may(name, self.counter):
                act()
                return True
            before, stage = picture(self.model, self.opt), self.opt._run.stage
            with pytest.raises(RuntimeError) as caught:
                act()
        assert type(caught.value) is RuntimeError
        assert WAYS_OUT.search(str(caught.value)), f"no way out is named: {caught.value}"
        assert not changes(before, picture(self.model, self.opt)), name
        assert self.opt._run.stage is stage
        COUNTS["refused calls"] += 1
        return False

    @invariant()
    def everything_is_the_truths(self):
        if not hasattr(self, "mirror"):
            return
        mirror = self.mirror
        names = [name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())]
        ours = [*self.model.parameters(), *self.model.buffers()]
        truth = [*mirror.model.parameters(), *mirror.model.buffers()]
        for name, a, b in zip(names, ours, truth, strict=True):
            if mirror.stage == FIRST and not isinstance(a, torch.nn.Parameter):
                continue  # the second pass starts from what the last second_step left, where there was one
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), f"{name} is off by {(a - b).abs().max()}"
        if mirror.grads_known:
            for (name, p), q in zip(self.model.named_parameters(), mirror.model.parameters(), strict=True):
                zero = torch.zeros_like(p)
                a, b = (zero if t.grad is None else t.grad for t in (p, q))
                assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), f"grad of {name} is off by {(a - b).abs().max()}"
        assert torch.equal(torch.get_rng_state(), mirror.draws), "random numbers"
        params = mirror.params
        own = [p for group in self.opt.param_groups for p in group["params"]]
        for p, q in zip(own, params, strict=True):
            entries = self.opt.state.get(p, {})
            kept = {name: value for name, value in entries.items() if not name.startswith("fastsam_")}
            plain = mirror.base.state.get(q, {})
            assert kept.keys() == plain.keys(), "moments"
            for name, value in kept.items():
                same = value is plain[name] or torch.allclose(value, plain[name], rtol=1e-8, atol=1e-12)
                assert same, f"{name} is off by {(value - plain[name]).abs().max()}"
        if mirror.row == "looksam":
            for p, g_v in zip(own, mirror.kept, strict=True):
                found = self.opt.states_of([p], "g_v")[0]
                assert torch.allclose(found, g_v, rtol=1e-8, atol=1e-12), "g_v"
        for group in self.opt.param_groups:
            assert group["fastsam_taken"] == mirror.taken, "steps taken"
            assert group["fastsam_active"] == mirror.active, "steps that perturbed"
            assert group["fastsam_step"] == self.counter
        assert [g["lr"] for g in self.opt.param_groups] == [g["lr"] for g in mirror.base.param_groups]
        assert self.opt._run.stage.name == mirror.stage.upper()
        assert self.opt.skipped_steps == 0

    def settle(self):
        """After a step: rounding may differ, and is not to add up."""
        self.everything_is_the_truths()
        self.mirror.adopt(self.model, self.opt)

    def teardown(self):
        """Leave no pass open, wherever the order ended: losses of later tests would find it under way."""
        if hasattr(self, "opt"):
            if self.opt._run.stage.name in ("ASCENT", "DESCENT"):
                self.context.__exit__(CrashError, CrashError(), None)
            self.opt.restore()

    # whole steps

    def losses(self, fails=0):
        """The loss function; it raises in its so-manieth call. Notes the counter of the random draws."""
        calls = []

        def losses(x, y):
            calls.append(self.counter)
            found = losses_of(self.model)(x, y)
            if len(calls) == fails:
                raise CrashError
            return found

        return losses, calls

    @rule(number=batch_numbers, fails=st.sampled_from([0, 0, 0, 1, 2]))
    def step_on_batch(self, number, fails):
        losses, calls = self.losses(fails)
        before = self.counter
        try:
            taken = self.call("step(losses)", lambda: self.opt.step(losses, *DATA[number]))
        except CrashError:
            self.mirror.start_afresh()
            self.mirror.draws = torch.get_rng_state()
            return
        if taken:
            self.mirror.step_on_batch(DATA[number], self.first_counter(before, calls))
            self.settle()

    def first_counter(self, before, calls):
        assert calls
        assert before <= calls[0] <= before + 1
        return calls[0]

    @rule(number=batch_numbers, zeroes=st.booleans(), fails=st.sampled_from([0, 0, 0, 1, 2]))
    def step_by_closure(self, number, zeroes, fails):
        losses, calls = self.losses(fails)
        mirror = self.mirror
        before = self.counter

        def closure():
            if zeroes:
                self.opt.zero_grad()
            loss = losses(*DATA[number]).mean()
            loss.backward()
            return loss

        if mirror.stage == FIRST:
            # refused as the next one is, which tests of their own show
            return
        if mirror.may("step(closure)", self.counter) and mirror.pairs:
            # a framework's closure may do nothing then; this one changes p.grad, and the step has failed
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with pytest.raises((RuntimeError, CrashError)):
                    self.opt.step(closure)
            mirror.forget_buffers()
            mirror.start_afresh()
            mirror.draws = torch.get_rng_state()
            return
        try:
            taken = self.call("step(closure)", lambda: self.opt.step(closure))
        except CrashError:
            mirror.start_afresh()
            mirror.draws = torch.get_rng_state()
            return
        if taken:
            mirror.step_on_batch(DATA[number], self.first_counter(before, calls))
            self.settle()

    @rule()
    def step(self):
        t = self.counter
        if self.call("step()", self.opt.step):
            self.mirror.step(t)
            self.settle()

    @rule()
    def base_step(self):
        if not self.mirror.grads_known:
            return
        if self.call("base step", self.opt.base_optimizer.step):
            self.mirror.base_step()
            self.settle()

    @rule(number=batch_numbers, way=st.sampled_from(["loss_fn", "contexts", "unscaled contexts"]))
    def scaled_step(self, number, way):
        mirror = self.mirror
        if mirror.stage != IDLE or (way != "loss_fn" and mirror.selects):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.take_scaled_step(number, way)

    def take_scaled_step(self, number, way):
        mirror = self.mirror
        scaler, batch = torch.amp.GradScaler("cpu", init_scale=8.0), DATA[number]
        self.zero_grad(True)
        t = self.counter
        if way == "loss_fn":
            self.opt.step(losses_of(self.model), *batch, scaler=scaler)
            mirror.step_on_batch(batch, t)
        else:
            for context in (self.opt.ascent, self.opt.descent):
                is_first = context == self.opt.ascent
                with context(grad_scale=scaler.get_scale()) if is_first else context():
                    scaler.scale(losses_of(self.model)(*batch).mean()).backward()
                if is_first and mirror.has_second(t) is False:
                    break
            if way == "unscaled contexts":
                scaler.unscale_(self.opt)
            scaler.step(self.opt)
            mirror.pair(batch, t)
            mirror.update(True)
        scaler.update()
        COUNTS["calls"] += 1
        self.settle()

    # passes

    @rule()
    def enter_ascent(self):
        t = self.counter

        def enter():
            context = self.opt.ascent()
            context.__enter__()
            self.context = context

        if self.call("ascent", enter):
            self.mirror.enter_ascent(t)

    @rule()
    def enter_descent(self):
        t = self.counter

        def enter():
            context = self.opt.descent()
            context.__enter__()
            self.context = context

        if self.call("descent", enter):
            self.mirror.enter_descent(t)

    @rule(fails=st.sampled_from([False, False, False, True]), number=batch_numbers)
    def leave_pass(self, fails, number):
        mirror = self.mirror
        if mirror.stage not in (ASCENT, DESCENT):
            return
        COUNTS["calls"] += 1
        if fails:
            error = CrashError()
            assert not self.context.__exit__(CrashError, error, None)
            mirror.fail()
            return
        self.backward(number)
        self.context.__exit__(None, None, None)
        mirror.leave_ascent() if mirror.stage == ASCENT else mirror.leave_descent()

    def go_on(self, number):
        """What a loop would do next, so that orders get somewhere."""
        if self.mirror.stage in (ASCENT, DESCENT):
            self.leave_pass(False, number)
        elif self.mirror.stage == ASCENDED:
            self.enter_descent()
        elif self.mirror.stage == FIRST:
            self.backward(number)
            self.second_step(True)
        elif self.mirror.pairs:
            self.step()
        elif number:
            self.enter_ascent()
        else:
            self.backward(number)
            self.first_step(True)

    # of equally likely rules
    go_on_1 = rule(number=batch_numbers)(go_on)
    go_on_2 = rule(number=batch_numbers)(go_on)
    go_on_3 = rule(number=batch_numbers)(go_on)
    go_on_4 = rule(number=batch_numbers)(go_on)

    @rule(number=batch_numbers)
    def backward(self, number):
        if not self.mirror.grads_known:
            return
        losses_of(self.model)(*DATA[number]).mean().backward()
        self.mirror.backward(DATA[number])

    @rule(zero_grad=st.booleans())
    def first_step(self, zero_grad):
        t = self.counter
        if self.call("first_step", lambda: self.opt.first_step(zero_grad=zero_grad)):
            self.mirror.first_step(zero_grad, t)

    @rule(zero_grad=st.booleans())
    def second_step(self, zero_grad):
        if self.call("second_step", lambda: self.opt.second_step(zero_grad=zero_grad)):
            self.mirror.second_step(zero_grad)
            self.settle()

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        COUNTS["calls"] += 1
        self.opt.zero_grad(set_to_none)
        self.mirror.zero_grad(set_to_none)

    @rule()
    def restore(self):
        if self.call("restore", self.opt.restore):
            self.mirror.restore()

    # around the steps

    @rule()
    def needs_second_pass(self):
        if self.mirror.stage == IDLE:
            assert self.opt.needs_second_pass == self.mirror.has_second(self.counter)

    @rule(factor=st.sampled_from([0.5, 1.5]), rho=st.sampled_from([0.05, 0.1, 0.3]))
    def set_options(self, factor, rho):
        for group in self.opt.param_groups:
            group["rho"] = rho
            group["lr"] *= factor
        for group in self.mirror.base.param_groups:
            group["lr"] *= factor
        self.mirror.options["rho"] = rho

    @rule()
    def schedule(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for opt in (self.opt, self.mirror.base):
                scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
                scheduler.step()

    @rule()
    def state_dict(self):
        def save():
            self.states = [copy.deepcopy(self.opt.state_dict()), copy.deepcopy(self.mirror.base.state_dict())]
            self.states += [self.mirror.taken, self.mirror.active, self.mirror.kept]

        self.call("state_dict", save)

    @rule()
    def load_state_dict(self):
        mirror = self.mirror
        if not self.states or len(self.states[0]["param_groups"]) != len(self.opt.param_groups):
            return
        if self.call("load_state_dict", lambda: self.opt.load_state_dict(copy.deepcopy(self.states[0]))):
            mirror.base.load_state_dict(copy.deepcopy(self.states[1]))
            mirror.taken, mirror.active, mirror.kept = self.states[2:]
            mirror.options["rho"] = self.states[0]["param_groups"][0]["rho"]

    @rule()
    def add_param_group(self):
        shift = self.model.shift
        if len(self.opt.param_groups) == 2:
            return
        was_trained = shift.requires_grad
        lr = self.opt.param_groups[0]["lr"]

        def add():
            self.opt.add_param_group({"params": [shift], "rho": self.mirror.options["rho"]})
            shift.requires_grad_(True)

        assert not was_trained
        if self.call("add_param_group", add):
            self.mirror.add_group()
            assert lr == self.opt.param_groups[0]["lr"]

    @rule(by_pickle=st.booleans())
    def copy(self, by_pickle):
        def make():
            pair = self.model, self.opt
            self.copied = pickle.loads(pickle.dumps(pair)) if by_pickle else copy.deepcopy(pair)

        if self.call("copy", make) and self.mirror.stage == IDLE and not self.mirror.failed and not self.mirror.pairs:
            self.model, self.opt = self.copied
            self.mirror.forget_copy()


CELLS = [
    (method, base)
    for i, method in enumerate(METHODS_AND_OPTIONS)
    for base in [list(BASES)[i % 3], list(BASES)[(i + 1) % 3]]
]


@pytest.mark.parametrize(("method", "base"), CELLS)
def test_orders_of_calls(method, base):
    machine = type(f"Orders of {method} around {base}", (Orders,), {"method": method, "base": base})
    run_state_machine_as_test(machine, settings=budget(4, 143, stateful_step_count=30))
