"""The laws of checkpoints: training goes on bit for bit from one, from the base optimizer's, and in copies."""

import copy
import io
import pickle

import pytest
import torch
from laws import PLAIN, Subject, law
from methods import BASES
from problems import assert_same, mlp, snapshot
from training import STEPS, Training, options_of

from fastsam.methods import METHODS


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def fresh(cell, dtype=torch.float64, dropout=0.0):
    """The training with other weights and, where there is one, another radius, which the checkpoint replaces."""
    other = {} if cell.subject.optimizer is None else {"rho": 0.7}
    return Training(cell, dtype, model=mlp(dtype, batchnorm=True, dropout=dropout, seed=9), **other)


def assert_same_states(some, others):
    """Whether checkpoints are the same, in whatever nesting."""
    if isinstance(others, torch.Tensor):
        assert torch.equal(some, others)
    elif isinstance(others, dict):
        assert some.keys() == others.keys()
        for key, value in others.items():
            assert_same_states(some[key], value)
    elif isinstance(others, (list, tuple)):
        assert len(some) == len(others)
        for a, b in zip(some, others, strict=True):
            assert_same_states(a, b)
    else:
        assert some == others


@law(backends=("torch", "triton"))
def test_training_resumes_bit_for_bit(cell):
    whole, saved = Training(cell, dropout=0.3), {}
    for _ in range(STEPS):
        saved[whole.taken] = through_a_file(whole.state())
        whole.step()
    for taken in (1, 2, 4) if cell.backend == "torch" else (4,):
        resumed = fresh(cell, dropout=0.3).load(saved[taken]).train(STEPS - taken)
        assert_same(resumed.model, snapshot(whole.model), f"resumed after {taken} steps:")
        assert_same_states(resumed.state(), whole.state())


@law()
def test_the_rounding_of_16_bit_weights_resumes_bit_for_bit(cell):
    whole = Training(cell, torch.bfloat16).train(3)
    saved = through_a_file(whole.state())
    whole.train(3)
    resumed = fresh(cell, torch.bfloat16).load(saved).train(3)
    assert_same(resumed.model, snapshot(whole.model))


@law(skips=PLAIN)
def test_the_bases_checkpoint_loads_as_if_its_optimizer_were_wrapped(cell):
    cls, options = BASES[cell.base]
    plain = Training(cell._replace(subject=Subject("sgd"), way="loss_fn")).train(2)
    saved = plain.opt.state_dict()
    trainings = [Training(cell, model=copy.deepcopy(plain.model)) for _ in range(3)]
    loaded, loaded_on_base, wrapped = trainings
    loaded.opt.load_state_dict(through_a_file(saved))
    loaded_on_base.opt.base_optimizer.load_state_dict(through_a_file(saved))
    base = cls(wrapped.model.parameters(), **options)
    base.load_state_dict(through_a_file(saved))
    row = METHODS[cell.subject.optimizer]
    own = {**row.options, **row.fixed, **options_of(cell.subject.optimizer, cell.subject.variant)}
    wrapped.opt = row.cls.wrap(base, model=wrapped.model, **own)
    wrapped.attach()
    for training in trainings:
        training.train(3)
        assert_same(training.model, snapshot(loaded.model))


@law(skips=PLAIN)
def test_a_plain_base_loads_the_checkpoint(cell):
    cls, options = BASES[cell.base]
    training = Training(cell).train(2)
    model = copy.deepcopy(training.model)
    base = cls(model.parameters(), **options)
    base.load_state_dict(through_a_file(training.opt.state_dict()))
    for p, q in zip(training.model.parameters(), model.parameters(), strict=True):
        own = {name: value for name, value in training.opt.state[p].items() if not name.startswith("fastsam_")}
        assert own.keys() <= base.state[q].keys()
        assert_same_states({name: base.state[q][name] for name in own}, own)
        q.grad = torch.ones_like(q)
    before = snapshot(model)
    base.step()
    assert not torch.equal(model[0].weight, before["0.weight"])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda training: pickle.loads(pickle.dumps(training))])
@law()
def test_copies_go_on_by_themselves(cell, copier):
    training = Training(cell).train(3)
    twin = copier(training)
    twin.attach()
    before = snapshot(training.model)
    if twin.cell.subject.optimizer:
        assert twin.opt.param_groups is twin.opt.base_optimizer.param_groups
    assert twin.opt.param_groups[0]["params"][0] is next(twin.model.parameters())
    twin.train(3)
    assert_same(training.model, before)
    assert_same(training.train(3).model, snapshot(twin.model))
    twin.opt.load_state_dict(training.opt.state_dict())
