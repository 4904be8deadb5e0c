"""The law of user code in a loss: it may hook, differentiate, penalize and checkpoint, and the step stays the method's.

In every pass requires_grad is what the user set, and gradients can be had, also in a forward that no backward follows.
"""

import pytest
import torch
from laws import law
from problems import largest_difference
from torch.utils.checkpoint import checkpoint
from training import Training, Truth

STEPS = 3


def hook_on_an_activation(model, losses, is_ours):
    """Doubles a gradient on its way; an activation without one cannot be hooked."""

    def hook(module, args, out):
        out.register_hook(lambda g: 2 * g)

    model[1].register_forward_hook(hook)
    return losses


def adaptive_weight(model, losses, is_ours):
    """The size of one layer's gradient, as a factor."""

    def weighted(*batch):
        rows = losses(*batch)
        (g,) = torch.autograd.grad(rows.mean(), model[0].weight, retain_graph=True)
        return rows * g.norm()

    return weighted


def gradient_of_the_inputs(model, losses, is_ours):
    """A step along it, as adversarial training takes one."""

    def attacked(x, *rest):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x)
        return losses((x + 0.1 * g).detach(), *rest)

    return attacked


def penalty_and_reentrant_checkpoint(model, losses, is_ours):
    """A checkpoint's weights have gradients from a backward of its own, beside those of the penalty."""
    if is_ours:
        layer = model[0].forward
        model[0].forward = lambda x: checkpoint(layer, x.detach().requires_grad_(), use_reentrant=True)

    def penalized(*batch):
        trainable = [p for p in model.parameters() if p.requires_grad]
        return losses(*batch) + 0.1 * sum(p.square().sum() for p in trainable)

    return penalized


USES = [
    hook_on_an_activation,
    adaptive_weight,
    gradient_of_the_inputs,
    penalty_and_reentrant_checkpoint,
]


def runs_side_by_side(cell):
    return cell.subject.variant == "batched" and cell.way == "loss_fn"


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@law(skips={"shards side by side run in torch.func, which has a backward of its own": runs_side_by_side})
def test_user_code_in_a_loss_finds_the_gradients_that_it_finds_without_us(cell, use):
    truth, ours = Truth(cell), Training(cell)
    losses = use(ours.model, ours.losses, True)
    truth.losses = use(truth.model, truth.losses, False)
    for _ in range(STEPS):
        truth.step()
        ours.step(losses)
    assert largest_difference(ours.model, truth.model) < 1e-10
