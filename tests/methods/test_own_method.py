"""A method of one's own: the hooks that the library's methods leave as they are."""

import pytest
import torch
import torch.nn.functional as F
from methods import by_closure, by_contexts, by_loss_function
from problems import assert_same, batches, losses_of, mlp, snapshot

from fastsam import TwoPassOptimizer

SGD = torch.optim.SGD


class RandomDirection(TwoPassOptimizer):
    """eps = rho z / ||z|| with z ~ N(0, I), which takes no first pass."""

    def __init__(self, params, base_optimizer, rho=0.1, **keywords):
        super().__init__(params, base_optimizer, {"rho": rho}, **keywords)

    def has_first_pass(self):
        return False

    def perturb(self, ascent, k):
        assert all(g is None for g in ascent.grads)
        z = [torch.randn_like(w) for w in ascent.weights]
        length = ascent.dot(z, z).sqrt()
        ascent.add([self.option(group, "rho") * z_n / length for z_n, group in zip(z, ascent.groups, strict=True)])


def test_a_method_without_a_first_pass_runs_one(backend):
    model, calls = mlp(batchnorm=True), []

    def losses(x, y):
        calls.append([p.detach().clone() for p in model.parameters()])
        return losses_of(model)(x, y)

    opt = RandomDirection(model.parameters(), SGD, rho=0.3, model=model, lr=0.0)
    x, y = batches(1)[0]
    before, plain = snapshot(model), mlp(batchnorm=True)
    loss = opt.step(losses, x, y)
    assert len(calls) == 1
    distance = sum(((p - q) ** 2).sum() for p, q in zip(calls[0], mlp(batchnorm=True).parameters(), strict=True)).sqrt()
    torch.testing.assert_close(distance.detach(), torch.tensor(0.3, dtype=torch.float64), rtol=1e-12, atol=0)
    # the statistics of the only forward, at the perturbed weights, are the step's
    with torch.no_grad():
        for p, q in zip(plain.parameters(), calls[0], strict=True):
            p.copy_(q)
    torch.testing.assert_close(loss, F.cross_entropy(plain(x), y).detach(), rtol=1e-12, atol=0)
    for key, value in model.state_dict().items():
        expected = plain.state_dict() if key.startswith("1.running") or "tracked" in key else before
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("way", [by_loss_function, by_closure, by_contexts])
def test_it_steps_in_other_ways_too(backend, way):
    model = mlp()
    opt, before = RandomDirection(model.parameters(), SGD, model=model, lr=0.1), snapshot(model)
    for x, y in batches(2):
        way(opt, losses_of(model), x, y)
    assert all(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_perturbation_that_is_not_finite_perturbs_nothing(backend):
    class Broken(RandomDirection):
        def perturb(self, ascent, k):
            ascent.add([torch.full_like(w, torch.inf) for w in ascent.weights])

    seen, model = [], mlp()
    opt, before = Broken(model.parameters(), SGD, model=model, lr=0.0), snapshot(model)

    def losses(x, y):
        seen.append(snapshot(model))
        return losses_of(model)(x, y)

    opt.step(losses, *batches(1)[0])
    for key, value in seen[0].items():
        assert torch.equal(value, before[key])
    assert_same(model, before)


def test_an_option_may_differ_by_group_and_goes_with_checkpoints(backend):
    model = mlp()
    groups = [{"params": model[0].parameters(), "rho": 0.5}, {"params": model[2].parameters(), "perturb": False}]
    opt = RandomDirection(groups, SGD, lr=0.1)
    again = RandomDirection(mlp().parameters(), SGD, lr=0.1)
    assert [g["rho"] for g in opt.state_dict()["param_groups"]] == [0.5, 0.1]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        again.load_state_dict(opt.state_dict())
