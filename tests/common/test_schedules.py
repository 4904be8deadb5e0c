"""The laws of schedules: `when=` says which steps perturb; the others are the base optimizer's, at its price."""

import copy
import warnings

import pytest
import torch
from kernel_cases import DEVICE, kernels
from laws import PLAIN, Subject, law
from methods import ALL_BASES, BASES
from problems import assert_same, batches, losses_of, mlp, snapshot
from test_resume import assert_same_states, through_a_file
from training import STEPS, Training, Truth, moments

from fastsam import ESAM, GSAM, MSAM, SAM, LookSAM, graph_step
from fastsam.graph import recorder as recorders
from fastsam.schedule import Every, First, Last
from fastsam.testing import check_step

SGD = torch.optim.SGD
START = 3
"""Half of a training's steps."""


class Never:
    """Perturbs in no step."""

    def scale(self, step):
        return 0.0

    def __repr__(self):
        return "Never()"


class Counted:
    """Losses of a training that are counted, with the order of what happened."""

    def __init__(self, training):
        self.training, self.forwards, self.backwards = training, 0, 0
        for p in training.model.parameters():
            if p.shape == (3,):
                p.register_hook(self._count)

    def _count(self, _):
        self.backwards += 1

    def __call__(self, *batch):
        self.forwards += 1
        return self.training.losses(*batch)


def plain_twin(cell):
    """The base optimizer alone, with a plain loop."""
    subject = Subject("sgd") if cell.subject.loss is None else Subject(cell.subject.row, cell.subject.variant)
    return Training(cell._replace(subject=subject, way="loss_fn"), dropout=0.3)


def counted_step(training):
    counted = Counted.__new__(Counted)
    del counted


@law(skips=PLAIN, backends=("torch", "triton"))
def test_an_inactive_step_is_the_bases_bit_for_bit(cell):
    torch.manual_seed(5)
    ours = Training(cell, dropout=0.3, when=Never()).train(STEPS)
    draws = torch.get_rng_state()
    torch.manual_seed(5)
    base = plain_twin(cell).train(STEPS)
    if cell.way != "two_steps":
        assert torch.equal(draws, torch.get_rng_state())
        assert_same(ours.model, snapshot(base.model))
