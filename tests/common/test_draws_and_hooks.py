"""The laws of side effects: random draws of a step are its first pass's, hooks fire once, flags stay as they were."""

import pickle
import random
from operator import eq

import numpy as np
import torch
from laws import PLAIN, law
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from training import Training

TAKEN = 3
"""Steps before: LookSAM's next step has a second pass."""


@law(
    skips=PLAIN | {"the first pass draws before any call of ours": lambda cell: cell.way == "two_steps"},
)
def test_all_passes_draw_the_same_numbers_and_the_first_ones_draws_count(cell):
    own = [torch.Generator(), random.Random(0), np.random.default_rng(0), np.random.RandomState(0)]
    training = Training(cell, dropout=0.5, generators=own).train(TAKEN)

    def states():
        numpy_states = (np.random.get_state(legacy=False), own[2].bit_generator.state, own[3].get_state(legacy=False))
        torch_states = (torch.get_rng_state().tolist(), own[0].get_state().tolist())
        return [pickle.dumps(s) for s in (*torch_states, random.getstate(), own[1].getstate(), *numpy_states)]

    def draw(*_):
        torch.rand(3, generator=own[0]), own[1].random(), own[2].random(), own[3].randn()
        # an odd number of normal draws, of which NumPy makes two at once
        random.gauss(), np.random.randn(3)

    side_by_side = cell.subject.variant == "batched" and cell.way == "loss_fn"
    pairs = 1 if side_by_side else len(training.opt.passes(training.batch))
    before, after = [], []
    training.model.register_forward_pre_hook(lambda *_: before.append(states()))
    training.model.register_forward_hook(draw)
    training.model.register_forward_hook(lambda *_: after.append(states()))
    training.step()
    forwards = len(before) // pairs
    assert forwards >= 2
    for first in range(0, len(before), forwards):
        assert all(found == before[first] for found in before[first : first + forwards])
        assert not any(map(eq, after[first], before[first])), "nothing was drawn"
        if first:
            assert before[first] == after[first - forwards], "a pair goes on from the first pass before it"
    assert states() == after[len(before) - forwards]


@law(skips=PLAIN)
def test_hooks_fire_once_in_order(cell):
    training, fired = Training(cell), []
    note = lambda name: lambda *_: fired.append(name)  # noqa: E731
    training.opt.register_step_pre_hook(note("pre"))
    training.opt.register_step_post_hook(note("post"))
    training.opt.base_optimizer.register_step_pre_hook(note("base pre"))
    training.opt.base_optimizer.register_step_post_hook(note("base post"))
    everywhere = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        training.step()
    finally:
        for handle in everywhere:
            handle.remove()
    assert sorted(fired) == ["base post", "base pre", "global post", "global pre", "post", "pre"]
    assert fired.index("pre") < fired.index("base pre") < fired.index("base post") < fired.index("post")


@law()
def test_flags_modes_and_storage_stay(cell):
    """In every forward, too, what user code can see of requires_grad is what it set."""
    training = Training(cell, dropout=0.3)
    training.model[1].eval()
    training.model[3].p = 0.2
    training.model[4].bias.requires_grad_(False)

    def flags():
        modules = [(module.training, len(module._forward_hooks)) for module in training.model.modules()]
        return modules, [(p.requires_grad, p.data_ptr(), p.dtype) for p in training.model.parameters()]

    before = flags()
    for _ in range(2):
        training.step()
        assert flags() == before
    assert torch.is_grad_enabled()


@law(
    skips=PLAIN | {"the caller runs backward without our help": lambda cell: cell.way in ("contexts", "two_steps")},
)
def test_a_callers_no_grad_does_not_reach_into_the_passes(cell):
    some, other = Training(cell), Training(cell)
    some.step()
    with torch.no_grad():
        other.step()
    assert all(map(torch.equal, some.weights(), other.weights()))
