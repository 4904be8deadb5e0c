"""What keeps an interrupt from leaving things half done: Ctrl-C held back, and contexts whose end is sure."""

# several times faster than `signal` itself, which looks for names of what it returns
import _signal  # type: ignore[import-not-found]
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from types import FrameType, TracebackType
from typing import Any

import torch


def held_back(call: Callable[[], None]) -> None:
    """Run a call in the main thread while SIGINT waits; its handler runs right after it.

    In other threads, which no signal interrupts, and where Python has no handler for it, this is the call alone.
    """
    handler = _signal.getsignal(signal.SIGINT) if threading.get_ident() == threading.main_thread().ident else None
    if isinstance(handler, _Waiting):
        if not _is_inside(held_back, sys._getframe(1)):
            handler.give_way()
        handler = None
    if not callable(handler):
        call()
        return
    waiting = _Waiting(handler)
    _signal.signal(signal.SIGINT, waiting)
    try:
        call()
    finally:
        try:
            waiting.give_way()
        finally:
            # where an exception of another kind came in between
            waiting.give_way()


class _Waiting:
    """A handler that waits with the signal until the call that holds it back is over."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self._handler, self._came = handler, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        if not _is_inside(held_back, frame):
            # an exception of another kind has kept the call's end from giving way
            self.give_way()

    def give_way(self) -> None:
        """Put the handler back that was there before, and let it handle what has come since."""
        if _signal.getsignal(signal.SIGINT) is self:
            _signal.signal(signal.SIGINT, self._handler)
        came, self._came = self._came, False
        if came:
            self._handler(signal.SIGINT, sys._getframe(1))


def _is_inside(function: Any, frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame is not None


class Pass:
    """A context whose end is sure, also where an interrupt hits its first or its last line.

    Python keeps the `__exit__` that a `with` statement will call as long as its body runs, and drops it whatever
    happens. So each statement gets an object of its own for it: if that goes and the context has not ended, it has
    failed. Where even that is cut short, the next call of the optimizer finds out (`Attempt.mend`).

    Args:
        attempt: what the context does.
    """

    def __init__(self, attempt: "Attempt") -> None:
        self._attempt = attempt

    def __enter__(self) -> "Pass":
        self._attempt.begin(self)
        return self

    def _new_exit(self) -> Callable[..., None]:
        # tracebacks keep the arguments of the function, but not the partial
        exit_ = partial(Attempt.end, self._attempt)
        self._attempt.belongs_to(exit_)
        return exit_

    class _Exit:
        def __get__(self, context: "Pass | None", cls: type) -> Callable[..., None]:
            # contextlib.ExitStack asks the class, and keeps the context
            return _exit_of if context is None else context._new_exit()

    __exit__ = _Exit()


def _exit_of(context: Pass, *exception: Any) -> None:
    context._attempt.end(*exception)


class Attempt:
    """Something that ends well or is undone, once.

    Args:
        run: keeps the innermost attempt as `attempt`.
        check: raises where it may not begin, before anything changes.
        enter: begins it.
        leave: ends it well.
        fail: undoes it; idempotent.
    """

    def __init__(
        self,
        run: Any,
        check: Callable[[], None],
        enter: Callable[[], None],
        leave: Callable[[], None],
        fail: Callable[[], None],
    ) -> None:
        self._run, self._check, self._enter, self._leave, self._fail = run, check, enter, leave, fail
        self._holder: weakref.ref[Any] | None = None
        self._outer: Attempt | None = None
        self._is_open = False
        self._grad_mode = True

    def belongs_to(self, holder: Any) -> None:
        """Let the attempt fail where the holder goes before it has ended."""
        self._holder = weakref.ref(holder, self._lose)

    def begin(self, context: Pass) -> None:
        """Begin it, for the `with` statement that asked for an `__exit__`, or else as long as the context is held."""
        self._check()
        if self.is_lost:
            self.belongs_to(context)
        self._outer = self._run.attempt
        self._grad_mode = torch.is_grad_enabled()
        self._is_open, self._run.attempt = True, self
        self._enter()

    @property
    def is_lost(self) -> bool:
        """Whether nobody is left who would end it."""
        return self._holder is None or self._holder() is None

    def end(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        """End it, well or not."""
        held_back(self._succeed if kind is None else self._undo)

    def _succeed(self) -> None:
        self._leave()
        self._close()

    def _undo(self) -> None:
        # which an interrupt inside of torch.no_grad() itself may have left
        torch.set_grad_enabled(self._grad_mode)
        self.fail()

    def fail(self) -> None:
        """Undo it. Idempotent."""
        if self._is_open:
            self._fail()
        self._close()

    def _close(self) -> None:
        if self._run.attempt is self:
            self._run.attempt = self._outer
        self._is_open = False
        self._holder = self._outer = None

    def _lose(self, _: Any) -> None:
        if self._is_open:
            held_back(self._undo)
