"""`norm_layer_groups`, and gradients of groups with perturb=False, which the first backward does not compute."""

import pytest
import torch
import torch.nn.functional as F
from laws import PLAIN, law
from methods import by_contexts
from problems import largest_difference
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training import Training

from fastsam import SAM, norm_layer_groups
from fastsam.norm_layers import is_norm_layer

NOT_OURS = {
    "the caller runs the backward": lambda cell: cell.way not in ("loss_fn", "backward"),
    "shards side by side run in torch.func": lambda cell: cell.options.get("execution") == "batched",
}


@law(skips=PLAIN | NOT_OURS)
def test_gradients_that_no_perturbation_needs_are_computed_once(cell):
    """In the second backward alone, and every step is as if both had computed them."""
    training = Training(cell, groups=norm_layer_groups)
    rest = training.opt.param_groups[1]["params"]
    computed = []
    for p in rest:
        p.register_post_accumulate_grad_hook(computed.append)
    for _ in range(4):
        computed.clear()
        pairs = len(training.opt.passes(training.batch))
        training.step()
        assert len(computed) == pairs * len(rest)
    whole = Training(cell, groups=norm_layer_groups)
    whole.opt._needed_in_ascent = lambda: None
    whole.train(4)
    assert largest_difference(training.model, whole.model) == 0


class RmsNorm(nn.Module):
    """As other libraries write them."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))


class NormalizedLinear(nn.Module):
    """No normalization layer, though its name holds the word."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n, n))
        self.bias = nn.Parameter(torch.ones(n))


LAYERS = [
    nn.BatchNorm2d(3),
    nn.SyncBatchNorm(3),
    nn.InstanceNorm1d(3, affine=True),
    nn.LayerNorm((2, 3)),
    nn.GroupNorm(1, 3),
    nn.RMSNorm(3),
    RmsNorm(3),
    nn.LazyBatchNorm1d(),
]
OTHERS = [nn.Linear(3, 3), NormalizedLinear(3), nn.BatchNorm2d(3, affine=False), nn.LocalResponseNorm(2), nn.Dropout()]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_these_are_normalization_layers(layer):
    assert is_norm_layer(layer)


@pytest.mark.parametrize("layer", OTHERS, ids=lambda layer: type(layer).__name__)
def test_these_are_not(layer):
    assert not is_norm_layer(layer)


def test_groups_hold_each_parameter_once_in_order():
    linear = nn.Linear(3, 3)
    model = nn.Sequential(linear, nn.LayerNorm(3), linear, nn.BatchNorm1d(3))
    norms, others = norm_layer_groups(model)
    assert [id(p) for p in norms["params"]] == [id(p) for p in (*model[1].parameters(), *model[3].parameters())]
    assert [id(p) for p in others["params"]] == [id(p) for p in linear.parameters()]
    assert norms["perturb"]
    assert not others["perturb"]
    assert len(norm_layer_groups(nn.Sequential(nn.LayerNorm(3)))) == 1
    chosen = norm_layer_groups(model, is_norm=lambda m: m is model[1])
    assert len(chosen[0]["params"]) == 2
    with pytest.raises(ValueError, match="Linear has no normalization layer with parameters; pass is_norm="):
        norm_layer_groups(linear)


def convolutions(layers=12):
    torch.manual_seed(0)
    blocks = [(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(*(layer for block in blocks for layer in block), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_step_costs_one_and_two_thirds_gradients(choose):
    """In floating-point operations of the passes; SAM's costs two."""
    choose("torch")
    model = convolutions()
    x, y = torch.randn(4, 16, 8, 8), torch.randint(0, 16, (4,))

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    def operations(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    gradient = operations(lambda: losses(x, y).mean().backward())
    model.zero_grad()
    for groups, cost in ((model.parameters(), 2.0), (norm_layer_groups(model), 5 / 3)):
        opt = SAM(groups, torch.optim.SGD, rho=0.5, model=model, lr=0.1)
        found = operations(lambda opt=opt: opt.step(losses, x, y)) / gradient
        # the first convolution has no gradient of its input
        assert found == pytest.approx(cost, rel=0.02)


def test_nothing_of_the_others_is_saved(choose):
    choose("torch")
    model = convolutions(2)
    opt = SAM(norm_layer_groups(model), torch.optim.SGD, rho=0.5, model=model, lr=0.1)
    x, y = torch.randn(4, 16, 8, 8), torch.randint(0, 16, (4,))
    by_contexts(opt, lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, y)
    assert {id(w) for w in opt._run.backup.weights} == {id(p) for p in opt.param_groups[0]["params"]}
