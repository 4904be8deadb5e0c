"""The law of equations: a method's training is that of its oracle, the paper's equations in plain torch and float64."""

import pytest
from laws import Cell, Subject, law
from methods import ALL_BASES, BASES
from problems import largest_difference, mlp
from training import STEPS, Training, Truth


@law(backends=("torch", "triton"))
def test_training_equals_the_papers_equations(cell):
    truth, ours = Truth(cell), Training(cell)
    for _ in range(STEPS):
        expected, loss = truth.step(), ours.step()
        if cell.way == "loss_fn":
            assert abs(loss - expected) < 1e-10
    assert largest_difference(ours.model, truth.model) < 1e-10
    assert largest_difference(ours.model, mlp(batchnorm=True)) > 1e-2, "nothing was trained"


@pytest.mark.parametrize("subject", [Subject("sam"), Subject("asam")])
@pytest.mark.parametrize("base", sorted(set(ALL_BASES) - set(BASES)))
def test_further_bases_take_the_step(backend, base, subject):
    test_training_equals_the_papers_equations(Cell(subject, base, "loss_fn", backend))
