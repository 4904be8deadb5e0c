"""The laws of parameters: groups, frozen and unused ones, ones that are not perturbed, tied ones."""

import torch
from laws import PLAIN, law
from problems import largest_difference, mlp
from torch import nn
from training import STEPS, Training, Truth


def in_two_groups(model):
    params = list(model.parameters())
    return [{"params": params[:2]}, {"params": params[2:]}]


def assert_alike(some, other, tolerance=1e-12):
    for p, q in zip(some.weights(), other.weights(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@law()
def test_a_cut_into_groups_changes_nothing(cell):
    whole, cut = Training(cell).train(), Training(cell, groups=in_two_groups).train()
    assert len(cut.opt.param_groups) == 2
    assert_alike(whole, cut)


SIDE_BY_SIDE = {"shards run side by side at copies of the weights": lambda cell: cell.subject.variant == "batched"}


def weights_of_forwards(training, first):
    """The model's weights in every forward of a step that starts after so many."""
    training.train(first)
    seen = []

    def losses(*batch):
        seen.append(training.weights())
        return training.losses(*batch)

    training.step(losses)
    return seen


ALL_EQUAL = {
    "strict=True raises where the mask leaves nothing perturbed": lambda cell: cell.subject.variant == "strict"
}


@law(skips=PLAIN | SIDE_BY_SIDE | ALL_EQUAL)
def test_a_group_may_stay_out_of_the_perturbation(cell):
    for option in ({"perturb": False}, {"rho": 0.0}):

        def groups(model, option=option):
            first, second = in_two_groups(model)
            return [first, {**second, **option}]

        training = Training(cell, groups=groups)
        before, *later = weights_of_forwards(training, first=3)
        assert all(torch.equal(p, q) for seen in later for p, q in zip(before[2:], seen[2:], strict=True)), option
        if cell.subject.row != "esam":  # whose mask may leave out the others in this step
            assert any(not torch.equal(before[0], seen[0]) for seen in later)
        assert not torch.equal(training.weights()[2], before[2]), "the group is trained all the same"


@law()
def test_a_frozen_parameter_counts_as_if_the_optimizer_did_not_have_it(cell):
    def without_the_last(model):
        return list(model.parameters())[:-1]

    frozen, without = Training(cell), Training(cell, groups=without_the_last)
    for training in (frozen, without):
        training.model[-1].bias.requires_grad_(False)
        training.train()
    assert torch.equal(frozen.weights()[-1], mlp(batchnorm=True)[-1].bias)
    assert frozen.model[-1].bias.grad is None
    assert_alike(frozen, without)


@law()
def test_a_parameter_without_a_gradient_stays_and_changes_nothing(cell):
    model, ones = mlp(batchnorm=True), torch.ones(3, dtype=torch.float64)
    used = list(model.parameters())
    model.unused = nn.Parameter(ones.clone())
    Training(cell, model=model, groups=lambda model: [*used, model.unused]).train()
    assert torch.equal(model.unused, ones), "weight decay is for parameters with a gradient"
    assert model.unused.grad is None
    for p, q in zip(used, Training(cell).train().weights(), strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-12)


class Tied(nn.Sequential):
    """A net with batch norm of which two layers share a weight."""

    def __init__(self):
        torch.manual_seed(2)
        inner = [nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6)]
        super().__init__(*inner, nn.Tanh(), nn.Linear(6, 3))
        self[3].weight = self[0].weight
        self.double()


@law()
def test_tied_weights_count_once(cell):
    truth, ours = Truth(cell, model=Tied()), Training(cell, model=Tied()).train()
    for _ in range(STEPS):
        truth.step()
    assert ours.model[3].weight is ours.model[0].weight
    assert largest_difference(ours.model, truth.model) < 1e-10
