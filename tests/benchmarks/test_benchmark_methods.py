"""The baselines of the step benchmark compute what they are named after: the equations, in float64 on a small net."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import problems
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, kernels

from fastsam import ESAM, SAF
from fastsam.graph import recorder as recorders
from fastsam.methods import METHODS

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(ROOT)
    from benchmarks.arms import eager as eager_methods
    from benchmarks.arms.ours import ARMS
    from benchmarks.arms.parameter_lists import LISTS
    from benchmarks.arms.tasks import RHO, TASKS, Batch, Precision, Problem

STEPS = 7  # LookSAM perturbs in the first and the sixth
LR = 0.1
SGD = partial(torch.optim.SGD, lr=LR, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.01)


def make_problem(base=SGD, dtype=torch.float64):
    ids = torch.arange(2 * 12).split(12)
    batches = [Batch(x, y, i, i) for (x, y), i in zip(problems.batches(2, dtype=dtype), ids, strict=True)]
    return Problem(problems.mlp(dtype), base, batches, 3, Precision("off", "cpu"))


def trained(name, base=SGD):
    """Take steps with a method of the table; return its weights as one vector."""
    problem = make_problem(base)
    step = ARMS[name].build(problem)
    for i in range(STEPS):
        step(problem.batches[i % 2])
    return torch.nn.utils.parameters_to_vector(problem.model.parameters()).detach()


def by_hand(combine, base=SGD):
    """Take steps whose gradient is `combine(step, g, g at w + eps)`, lists of tensors; return the weights."""
    problem = make_problem(base)
    params = list(problem.model.parameters())
    opt = base(params)

    def gradient(batch):
        return torch.autograd.grad(F.cross_entropy(problem.model(batch.x), batch.y), params)

    for i in range(STEPS):
        g = gradient(problem.batches[i % 2])
        norm = sum((gi**2).sum() for gi in g).sqrt()
        w = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, gi in zip(params, g, strict=True):
                p += RHO * gi / norm
        adv = gradient(problem.batches[i % 2])
        d, after = combine(i, g, adv)
        with torch.no_grad():
            for p, wi in zip(params, w, strict=True):
                p.copy_(wi)
        for p, di in zip(params, d, strict=True):
            p.grad = di
        opt.step()
        with torch.no_grad():
            for p, ai in zip(params, after, strict=True):
                p += ai
    return torch.nn.utils.parameters_to_vector(params).detach()


def sam(i, g, adv):
    return adv, [torch.zeros_like(a) for a in adv]


def gsam(i, g, adv):
    """d = g_adv - alpha (g - its part along g_adv), over all tensors together (Zhuang et al. 2022)."""
    share = sum((a * b).sum() for a, b in zip(g, adv, strict=True)) / sum((a**2).sum() for a in adv)
    return sam(i, g, [a - 0.4 * (b - share * a) for a, b in zip(adv, g, strict=True)])


def wsam(i, g, adv):
    """The base's step with g, and then one of gamma / (1 - gamma) along g_adv - g (Yue et al. 2023, decoupled)."""
    return g, [-LR * 9 * (a - b) for a, b in zip(adv, g, strict=True)]


class LookSAM:
    """The part of g_adv orthogonal to g, kept for five steps; each tensor by itself, as the package has it."""

    def __call__(self, i, g, adv):
        if i % 5 == 0:
            self.kept = [a - (a * b).sum() / (b**2).sum() * b for a, b in zip(adv, g, strict=True)]
            return sam(i, g, adv)
        return sam(i, g, [b + 0.7 * b.norm() / (v.norm() + 1e-8) * v for b, v in zip(g, self.kept, strict=True)])


@pytest.mark.parametrize("base", [SGD, ADAMW])
@pytest.mark.parametrize("name", ["davda54 eager sam", "torch foreach sam", "sam"])
def test_baselines_of_sam_are_sam(name, base):
    torch.testing.assert_close(trained(name, base), by_hand(sam, base), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "combine"), [("sam", sam), ("gsam", gsam), ("wsam", wsam), ("looksam", LookSAM())])
def test_the_package_computes_its_methods(name, combine):
    pytest.importorskip("pytorch_optimizer", reason="pip install -e '.[bench]'")
    # the package sums its norm in float32
    found = trained(f"pytorch_optimizer {name}")
    torch.testing.assert_close(found, by_hand(combine), rtol=1e-6, atol=1e-7)
    if combine is not sam:
        assert (found - by_hand(sam)).abs().max() > 1e-4  # the tolerance tells the methods apart


def test_official_style_esam_is_strict_esam():
    ours, theirs = make_problem(), make_problem()
    opt = ESAM(ours.model.parameters(), torch.optim.SGD, rho=RHO, beta=0.6, gamma=0.5, strict=True,
               model=ours.model, **SGD.keywords)  # fmt: skip
    base = SGD(theirs.model.parameters())
    baseline = eager_methods.OfficialESAM(theirs.model.parameters(), base, rho=RHO, e0=1e-12)
    masks = set()
    for i in range(STEPS):
        batch = ours.batches[i % 2]
        baseline.kept = opt._kept()  # the draws of two generators differ
        masks.add(tuple(baseline.kept))
        opt.step(ours.losses, batch.x, batch.y)
        baseline.passes(theirs.losses, batch.x, batch.y, torch.Tensor.backward)
        base.step()
        base.zero_grad()
        assert opt.last_selected_fraction == 5 / 12
    assert len(masks) > 2
    assert all(any(mask) for mask in masks)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_official_style_esam_draws_its_masks():
    torch.manual_seed(0)
    problem = make_problem()
    params = list(problem.model.parameters())
    esam = eager_methods.OfficialESAM(params, SGD(params), beta=0.6)
    assert all(esam.kept)
    kept = []
    for _ in range(50):
        esam.passes(problem.losses, *problem.batches[0][:2], torch.Tensor.backward)
        kept += esam.kept
        assert all(p.requires_grad and p.grad is not None for p in params)
    assert 0.5 < sum(kept) / len(kept) < 0.7


def test_official_style_saf_has_the_loss_of_saf():
    ours = SAF(24, 3, lag=2, start_epoch=2, history_dtype=torch.float64)
    theirs = eager_methods.OfficialSAF(24, 3, lag=2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for epoch in (1, 2, 3, 4, 5):
        ours.set_epoch(epoch)
        theirs.epoch = epoch
        for ids in torch.randperm(24, generator=generator).split(12):
            z = torch.randn(12, 3, generator=generator, dtype=torch.float64, requires_grad=True)
            y = torch.randint(3, (12,), generator=generator)
            losses = ours(z, y, ids), theirs(z, y, ids)
            if epoch > 2:  # theirs has no past before, and takes zeros for one
                torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
                assert losses[0] > F.cross_entropy(z, y)
                torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in losses))


def test_losses_of_trajectories_have_a_past_in_every_step():
    problem = make_problem()
    pulls = []

    class Watched(SAF):
        def forward(self, logits, targets, ids):
            loss = super().forward(logits, targets, ids)
            pulls.append((loss - F.cross_entropy(logits, targets)).item())
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "saf", replace(METHODS["saf"], cls=Watched))
        step = ARMS["saf"].build(problem)
    for i in range(6):  # three epochs
        step(problem.batches[i % 2])
    assert len(pulls) == 2 + 6
    assert all(pull > 1e-6 for pull in pulls[2:])


def test_the_scaler_of_fp16_scales_and_steps():
    precision = Precision("fp16", "cpu")
    p = torch.nn.Parameter(torch.ones(()))
    opt = torch.optim.SGD([p], lr=1.0)
    precision.backward(p * 0.5)
    assert p.grad == 0.5 * precision.scaler.get_scale()
    precision.step(opt)
    assert p == 0.5


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_models_have_the_parameters_of_their_lists(name):
    task = TASKS[name]
    shapes = [tuple(p.shape) for p in task.build(task.shape, task.classes).parameters()]
    assert sorted(shapes) == sorted(LISTS[name]())


def test_vit_s16_has_its_size():
    task = TASKS["vit_s16"]
    # no class token, whose place a mean over the patches takes: 2 x 384 parameters less than the list
    n = sum(p.numel() for p in task.build(task.shape, task.classes).parameters())
    assert n == sum(torch.Size(shape).numel() for shape in LISTS["vit_s16"]()) - 2 * 384


CAPTURED = [name for name, method in ARMS.items() if "graph" not in method.cannot]


@pytest.mark.skipif(kernels is None or DEVICE == "cuda", reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", CAPTURED)
def test_methods_of_the_graph_regime_can_be_captured(name, monkeypatch, choose):
    from recorded_work import RecordedWork  # a stand-in for CUDA graphs

    choose("triton")
    weights = []
    for is_captured in (False, True):
        work = RecordedWork()
        monkeypatch.setattr(recorders, "recorder_for", lambda params, batch, work=work: work)
        problem = make_problem(dtype=torch.float32)
        problem.is_captured = is_captured
        step = ARMS[name].build(problem)
        for i in range(6):  # three as usual, then replays; SAF, whose epochs have two batches here, is captured twice
            step(problem.batches[i % 2])
        assert [g.replays > 0 for g in problem.graphs] == [True] * is_captured
        weights.append(torch.nn.utils.parameters_to_vector(problem.model.parameters()).detach())
    torch.testing.assert_close(*weights)


def test_every_method_says_where_it_cannot_run():
    for method in ARMS.values():
        assert set(method.cannot) <= {"compiled", "graph", "fp16"}
        assert all(reason.startswith("not ") for reason in method.cannot.values())
