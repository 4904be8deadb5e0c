"""Faults that tests plant in a step: exceptions in passes, hooks and at call boundaries, and losses that overflow."""

import sys
from contextlib import contextmanager


class PlantedError(Exception):
    """What a planted fault raises."""


class Losses:
    """The losses of a training, with a fault in one call.

    Args:
        training: whose losses they are.
        call: the number of the call, from 1; 0 for none, to count them all.
        error: raised after that call's forward; None for nothing.
        factor: what its losses are multiplied by.
    """

    def __init__(self, training, call=0, error=None, factor=1.0):
        self.training, self.call, self.error, self.factor, self.calls = training, call, error, factor, 0

    def __call__(self, *batch):
        self.calls += 1
        losses = self.training.losses(*batch)
        if self.calls != self.call:
            return losses
        if self.error is not None:
            raise self.error
        return losses * self.factor


@contextmanager
def fault_after(holder, name, call=0, error=None):
    """Raise after the given call of a method; yields a list with one entry for each call."""
    method, calls = getattr(holder, name), []

    def patched(*args, **keywords):
        result = method(*args, **keywords)
        calls.append(1)
        if len(calls) == call:
            raise error
        return result

    setattr(holder, name, patched)
    try:
        yield calls
    finally:
        delattr(holder, name)


@contextmanager
def fault_in_base_step(opt, error):
    """Raise when the base optimizer's own step begins."""

    def fail(*_):
        raise error

    handle = opt.base_optimizer.register_step_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def _inside_a_kernel(frame):
    """Whether Triton's interpreter is running a kernel: on a GPU no interrupt comes half-way through one."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "triton.runtime.interpreter":
            return True
        frame = frame.f_back
    return False


class Interrupt:
    """Raises at the n-th call or return in the library's own code, or in what its contexts are made of.

    Args:
        n: 1 for the first; 0 only counts them.
        then: raise once more at this call of a Python function after the first fault; 0 does not.
        error: what is raised.
    """

    def __init__(self, n=0, then=0, error=KeyboardInterrupt):
        self.n, self.then, self.error, self.seen, self.swallowed = n, then, error, 0, 0

    @staticmethod
    def _is_ours(frame):
        # what is raised while Python disposes of a generator it swallows itself; most are generator expressions
        module = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "<genexpr>" or _inside_a_kernel(frame):
            return False
        if module in ("contextlib", "threading"):
            # where the library called them
            return frame.f_back is not None and "fastsam" in frame.f_back.f_globals.get("__name__", "")
        return "fastsam" in module

    def _profile(self, frame, event, arg):
        # no signal arrives between the return of __enter__ and the with block
        if not self._is_ours(frame) or (event == "return" and frame.f_code.co_name == "__enter__"):
            return
        self.seen += 1
        if self.seen == self.n:
            sys.setprofile(None)
            raise self.error(f"{event} at {frame.f_code.co_name}:{frame.f_lineno}")

    def _trace(self, frame, event, arg):
        """Python drops a function that raises, so the second fault is another one's."""
        if not 0 < self.n <= self.seen or not self._is_ours(frame):
            return
        self.then -= 1
        if self.then == 0:
            sys.settrace(None)
            raise self.error(f"again, {event} at {frame.f_code.co_name}:{frame.f_lineno}")

    def _note_swallowed(self, unraisable):
        assert isinstance(unraisable.exc_value, self.error), unraisable
        self.swallowed += 1

    def __enter__(self):
        self._tracer, self._hook, sys.unraisablehook = sys.gettrace(), sys.unraisablehook, self._note_swallowed
        if self.then:
            sys.settrace(self._trace)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)
        if self.then:
            sys.settrace(self._tracer)
        sys.unraisablehook = self._hook
