"""Where a step is, and which pass a thread executes."""

import enum
import threading
import weakref
from typing import Any


class Stage(enum.Enum):
    """Where a step is."""

    IDLE = "between steps"
    ASCENT = "inside ascent()"
    ASCENDED = "after ascent(), before its descent()"
    DESCENT = "inside descent()"
    FIRST = "after first_step(), before second_step()"


EXECUTING = (Stage.ASCENT, Stage.DESCENT, Stage.FIRST)


class _Passes(threading.local):
    """The passes that a thread is in, the innermost last; an optimizer that is dropped takes its pass with it."""

    def __init__(self) -> None:
        self.steps: list[weakref.ref[Any]] = []


_passes = _Passes()


def under_way() -> Any:
    """Return the state of the step whose pass this thread executes, for losses that tell passes apart.

    Between the passes of a step, and in other threads, a forward is a plain one.
    """
    steps = (ref() for ref in reversed(_passes.steps))
    return next((step for step in steps if step is not None and step.stage in EXECUTING), None)


def execute(step: Any, stage: Stage) -> None:
    """Note which stage a step enters: a pass is the innermost of this thread until it is left."""
    others = [ref for ref in _passes.steps if ref() not in (None, step)]
    _passes.steps = [*others, weakref.ref(step)] if stage in EXECUTING else others


WAYS_OUT = {
    Stage.ASCENT: "leave the ascent() context first",
    Stage.ASCENDED: "run `with opt.descent(): ...` first, or drop the ascent with restore()",
    Stage.DESCENT: "leave the descent() context first",
    Stage.FIRST: "call second_step() or step() first, or undo first_step() with restore()",
}
WAYS_IN = {
    Stage.ASCENDED: "run `with opt.ascent(): ...` first",
    Stage.FIRST: "call first_step() first",
}
