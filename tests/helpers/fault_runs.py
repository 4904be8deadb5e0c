"""Steps cut short by planted exceptions and real signals, and what each has left: the state of before, or of after."""

import os
import signal
import time
from collections import Counter

import pytest
import torch
from faults import Interrupt
from training import Training

from fastsam.two_pass.stage import Stage, under_way

MEND = ("zero_grad", "restore", "state_dict")
"""Calls of the optimizer that put right what two faults in a row have left."""


class StepsCutShort:
    """One step of a training, cut short again and again.

    Args:
        cell: of the laws.
        taken: how many steps come before; 0 for a step that makes the optimizer's state.
        dtype: of the model.
    """

    def __init__(self, cell, taken, dtype=torch.float32):
        self.cell, self.training = cell, Training(cell, dtype=dtype, dropout=0.3).train(taken)
        self.saved = self.training.state()
        # scratch and state that the first step makes
        self.training.step()
        self.training.taken = self.saved["taken"]
        self._back()
        with Interrupt() as count:
            self.training.step()
        self.training.taken = self.saved["taken"]
        self.after, self.calls = self._state(), count.seen
        self._back()
        self.before = self._state()
        self.outcomes = Counter()
        assert self._difference(self.before, self.after)

    def _back(self):
        opt, base = self.training.opt, self.training.opt.base_optimizer
        opt.restore()
        opt.zero_grad()
        base.state.clear()
        self.training.load(self.saved).begin()
        opt.skipped_steps.zero_()

    def _state(self):
        """Everything that a step changes, by name; copies."""
        training, opt = self.training, self.training.opt
        # in two calls the first forward is the caller's
        is_moved = self.cell.way == "two_steps"
        parts = training.model.named_parameters() if is_moved else training.model.state_dict().items()
        state = {f"model.{name}": t for name, t in parts}
        state |= {
            f"state.{i}.{name}": value
            for i, p in enumerate(training.model.parameters())
            for name, value in opt.base_optimizer.state.get(p, {}).items()
        }
        names = {id(p): i for i, p in enumerate(training.model.parameters())}
        state |= {f"state.{names[i]}.fastsam_{name}": t for (i, name), t in opt._run.deferred_state.items()}
        state |= {f"group.{i}.{k}": v for i, g in enumerate(opt.param_groups) for k, v in g.items() if k != "params"}
        if training.loss is not None:
            state |= _flat("loss", training.loss.state_dict())
        state |= {f"trains.{i}": p.requires_grad for i, p in enumerate(training.model.parameters())}
        state |= {"skipped": opt.skipped_steps, "under way": under_way() is not None}
        state |= {"grad mode": torch.is_grad_enabled(), "handler": signal.getsignal(signal.SIGINT)}
        state |= {f"base has {name}": name in vars(opt.base_optimizer) for name in ("grad_scale", "found_inf")}
        return {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}

    @staticmethod
    def _difference(some, others):
        """The first name of what differs, or nothing."""
        if some.keys() != others.keys():
            return f"there are {sorted(some.keys() ^ others.keys())}"
        for name, value in some.items():
            same = torch.equal(value, others[name]) if isinstance(value, torch.Tensor) else value == others[name]
            if not same:
                return name
        return None

    def check(self, what, mend=None):
        """Assert that the state is that of before or after, and that the step can be taken again.

        Args:
            what: the fault, for messages.
            mend: the name of a call that may come first.
        """
        opt = self.training.opt
        is_foreign = opt._run.base_failed
        # what fails between the calls is the caller's to handle, who drops the pass or the pairs
        if opt._run.stage is Stage.FIRST or (opt._run.pairs and not opt._run.failed):
            mend = "restore"
        if mend is None:
            assert opt._run.stage in (Stage.IDLE, Stage.ASCENDED), f"{self.cell}, {what}: a pass is open"
        else:
            getattr(opt, mend)()
            if signal.getsignal(signal.SIGINT) is not self.before["handler"]:
                # the next signal finds that nobody holds it back, as two faults have kept the first one from
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
        opt.restore()
        if is_foreign:
            self.outcomes["inside the base's own step"] += 1
        else:
            now = self._state()
            # a step that failed, or finished pairs that are dropped, may have used random numbers up
            counts = {name: count for name, count in self.before.items() if name.endswith("fastsam_step")}
            assert all(now[name] >= count for name, count in counts.items())
            wrong = self._difference(now | counts, self.before), self._difference(now, self.after)
            assert None in wrong, f"{self.cell}, {what}: neither before nor after: {wrong}"
            self.outcomes["before" if wrong[0] is None else "after"] += 1
        self._back()
        again = self._difference(self._state(), self.before)
        assert again is None, f"{self.cell}, {what}: the optimizer cannot go back: {again}"

    def take_again(self, what):
        """Assert that the step, taken from the beginning, gives what it gave at first."""
        self.training.step()
        wrong = self._difference(self._state(), self.after)
        assert wrong is None, f"{self.cell}, {what}: taken again, it differs: {wrong}"
        self._back()

    def plant(self, n, then=0, error=KeyboardInterrupt, mend=None):
        """Cut the step short at its n-th call or return, and `then` calls later once more."""
        what = f"{error.__name__} at {n}" + (f" and {then} later, then {mend}" if then else "")
        interrupt = Interrupt(n, then, error)
        try:
            with interrupt:
                self.training.step()
        except error as raised:
            what += f": {raised}"
        self.training.taken = self.saved["taken"]
        self.check(what, mend)

    def send_signal(self, seconds):
        """Send SIGINT to this process after so many seconds of the step."""
        # The timer may run out just when it is stopped, where nobody would catch what it raises.
        is_under_way = [True]

        def interrupt(*_):
            if is_under_way:
                os.kill(os.getpid(), signal.SIGINT)

        handlers = [signal.signal(signal.SIGALRM, interrupt), signal.signal(signal.SIGINT, signal.default_int_handler)]
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
            self.training.step()
            is_under_way.clear()
            outcome = "too late"
        except KeyboardInterrupt:
            outcome = None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handlers[0])
            signal.signal(signal.SIGINT, handlers[1])
        self.training.taken = self.saved["taken"]
        if outcome is None:
            self.check(f"SIGINT after {seconds * 1e6:.0f} us")
        else:
            self._back()
        return outcome is None

    def seconds(self):
        """How long a step takes."""
        start = time.perf_counter()
        self.training.step()
        seconds = time.perf_counter() - start
        self._back()
        return seconds


def _flat(name, value):
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in _flat(f"{name}.{key}", part).items()}
    return {name: value}
