"""Landscapes: directions, known surfaces, lines between models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from problems import batches, cnn, losses_of, mlp
from torch import nn
from torch.func import functional_call

from fastsam.sharpness import landscape, line
from fastsam.sharpness.directions import orthogonal_pair


def filters(tensor):
    return tensor.flatten(1) if tensor.dim() >= 2 else tensor.reshape(1, -1)


@pytest.mark.parametrize("scale_vectors", [False, True])
def test_directions_are_orthogonal_and_as_long_as_each_filter(scale_vectors):
    params = list(cnn().parameters())
    first, second = orthogonal_pair(params, seed=3, scale_vectors=scale_vectors)
    for p, d1, d2 in zip(params, first, second, strict=True):
        # the bias of batch norm is zero at the start
        length = filters(p.detach()).norm(dim=1) if p.dim() >= 2 or scale_vectors else torch.zeros(1)
        torch.testing.assert_close(filters(d1).norm(dim=1), length)
        torch.testing.assert_close(filters(d2).norm(dim=1), length)
        cosines = (filters(d1) * filters(d2)).sum(1)
        assert (cosines.abs() <= 1e-5 * length.square() + 1e-12).all()


def test_models_of_one_architecture_move_along_the_same_numbers():
    model = cnn()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(7)
    for ours, theirs in zip(
        orthogonal_pair(list(model.parameters()), 0), orthogonal_pair(list(other.parameters()), 0), strict=True
    ):
        for d, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(7 * d, e)
    again = orthogonal_pair(list(model.parameters()), 1)
    assert not torch.equal(orthogonal_pair(list(model.parameters()), 0)[0][0], again[0][0])


def test_filters_of_one_entry_have_no_second_direction():
    first, second = orthogonal_pair([nn.Parameter(torch.tensor([[2.0], [3.0]]))], 0)
    assert first[0].abs().flatten().tolist() == [2, 3]
    assert second[0].abs().sum() == 0


@pytest.mark.parametrize("dimensions", [1, 2])
def test_losses_are_those_of_a_plain_loop(dimensions):
    model, parts = mlp(), [*batches(1), *batches(1, rows=5, seed=3)]
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    found = landscape(model, losses_of(model), parts, dimensions=dimensions, points=3, extent=0.7, pairs=2, seed=4)
    assert found.at.tolist() == pytest.approx([-0.7, 0, 0.7])
    assert found.losses.shape == (2, *[3] * dimensions)
    assert (found.samples, found.missing, found.forwards) == (17, 0, 2 * 3**dimensions)
    for pair in range(2):
        directions = orthogonal_pair(list(model.parameters()), 4 + pair)
        for index in torch.cartesian_prod(*[torch.arange(3)] * dimensions).reshape(-1, dimensions).tolist():
            steps = [found.at[i] for i in index]
            moved = {
                name: p + sum(a * d[n] for a, d in zip(steps, directions, strict=False))
                for n, (name, p) in enumerate(model.named_parameters())
            }
            expected = F.cross_entropy(functional_call(model, moved, (x,)), y).detach()
            torch.testing.assert_close(found.losses[(pair, *index)], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.mean, found.losses.sum(0) / 2)


def test_points_without_a_finite_loss_are_missing():
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)

    def losses(x):
        out = model(x).squeeze(1)
        return torch.where(out > 3.5, torch.inf, out)

    found = landscape(model, losses, [(torch.ones(4, 3),)], dimensions=1, points=21, extent=2)
    assert 0 < found.missing < 21
    assert found.losses[0, 10] == 3
    assert found.mean.isnan().sum() == found.missing


def test_a_line_passes_both_models():
    """Weights and running statistics at both ends and in the middle, and counters at the nearer end."""
    models = [mlp(batchnorm=True, seed=seed) for seed in (1, 2)]
    parts = batches(2)
    for model in models:
        model(parts[0][0])
        model.eval()
    states = [copy.deepcopy(model.state_dict()) for model in models]
    states[1]["1.num_batches_tracked"] += 5
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    seen = []

    def losses(x, y):
        seen.append(int(other[1].num_batches_tracked))
        return F.cross_entropy(other(x), y, reduction="none")

    other = mlp(batchnorm=True, seed=3)
    found = line(other, losses, [(x, y)], *states, points=5, beyond=0.5)
    assert found.at.tolist() == [-0.5, 0, 0.5, 1, 1.5]
    assert seen[2:] == [1, 1, 1, 6, 6]
    for i, a in enumerate(found.at.tolist()):
        nearest = min(max(a, 0), 1)
        between = {}
        for name, t in states[0].items():
            # the variance would be negative beyond an end
            b = nearest if "running" in name else a
            between[name] = (1 - b) * t + b * states[1][name] if t.is_floating_point() else t
        expected = F.cross_entropy(functional_call(models[0], between, (x,)), y).detach()
        torch.testing.assert_close(found.losses[0, i], expected, rtol=1e-12, atol=0)


def test_buffers_lie_on_the_line_in_training_mode_too():
    """Where every forward starts from the buffers of its point."""
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("factor", torch.tensor(0.0))
    states = [{"weight": torch.ones(1, 1), "factor": torch.tensor(factor)} for factor in (1.0, 3.0)]
    found = line(
        model, lambda x: model(x)[:, 0] * model.factor, [torch.ones(4, 1)], *states, points=3, beyond=0, mode="train"
    )
    assert found.mean.tolist() == [1, 2, 3]


def test_a_state_of_another_architecture_is_refused_by_its_keys():
    model, own = mlp(), mlp().state_dict()
    other = {**own, "9.weight": torch.ones(1), "0.bias": torch.ones(3)}
    del other["0.weight"]
    message = (
        r"end is of another architecture than the model: it lacks 0.weight, it has 9.weight as well, "
        r"it has 0.bias of shape \[3\], not \[8\]$"
    )
    with pytest.raises(ValueError, match=message):
        line(model, losses_of(model), batches(1), own, other)
    with pytest.raises(ValueError, match=r"start is of another .* 0.bias, it lacks 2.weight, it lacks 2.bias$"):
        line(model, losses_of(model), batches(1), {}, own)
