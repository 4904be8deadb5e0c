"""Bad input gets an error that names the value and the remedy, before anything changes."""

import sys
import types

import pytest
import torch
from problems import assert_same, batches, losses_of, mlp, snapshot
from torch import nn

import fastsam
from fastsam import SAM

SGD = torch.optim.SGD


def weights(n=2):
    return [nn.Parameter(torch.ones(3)) for _ in range(n)]


@pytest.mark.parametrize(
    ("error", "needle", "build"),
    [
        (ValueError, "rho must be finite and >= 0, got -0.1", lambda: SAM(weights(), SGD, rho=-0.1, lr=0.1)),
        (ValueError, "rho must be finite and >= 0, got nan", lambda: SAM(weights(), SGD, rho=float("nan"), lr=0.1)),
        (ValueError, "rho must be finite and >= 0, got inf", lambda: SAM(weights(), SGD, rho=float("inf"), lr=0.1)),
        (TypeError, "rho must be a number, got '0.05' of type str", lambda: SAM(weights(), SGD, rho="0.05", lr=0.1)),
        (TypeError, "rho must be a number, got True", lambda: SAM(weights(), SGD, rho=True, lr=0.1)),
        (ValueError, "got -1", lambda: SAM([{"params": weights(), "rho": -1}], SGD, lr=0.1)),
        (ValueError, "adaptive must be False, True or 'official', got 'yes'", lambda: SAM(weights(), SGD, 0.1, "yes")),
        (ValueError, "needs parameter names: pass model=", lambda: SAM(weights(), SGD, 0.1, "official", lr=0.1)),
        (TypeError, "perturb must be True or False, got 0", lambda: SAM([{"params": weights(), "perturb": 0}], SGD)),
        (ValueError, "empty parameter list", lambda: SAM([], SGD, lr=0.1)),
        (TypeError, r"must be a torch.optim.Optimizer class .*Linear", lambda: SAM(weights(), nn.Linear, lr=0.1)),
        (TypeError, "must be a torch.optim.Optimizer class", lambda: SAM(weights(), None)),
        (TypeError, r"is an instance; pass its class, or use SAM.wrap", lambda: SAM(weights(), SGD(weights(), lr=0.1))),
        (ValueError, "LBFGS .* use SGD or AdamW", lambda: SAM(weights(), torch.optim.LBFGS)),
        (ValueError, "SparseAdam .* use SGD or AdamW", lambda: SAM(weights(), torch.optim.SparseAdam)),
        (
            ValueError,
            r"SGD\(differentiable=True\) .* drop the option",
            lambda: SAM(weights(), SGD, differentiable=True),
        ),
        (
            TypeError,
            r"neither SAM nor SGD knows momentun; SGD takes .*momentum",
            lambda: SAM(weights(), SGD, momentun=0.9),
        ),
        (ValueError, "Invalid learning rate: -1", lambda: SAM(weights(), SGD, lr=-1)),
        (ValueError, "stochastic_rounding must be .* got 'on'", lambda: SAM(weights(), SGD, stochastic_rounding="on")),
        (TypeError, "seed must be an integer, got 0.5", lambda: SAM(weights(), SGD, lr=0.1, seed=0.5)),
        (TypeError, "takes an optimizer instance, got .*SGD", lambda: SAM.wrap(SGD)),
        (TypeError, "does not know lr; set it on the base", lambda: SAM.wrap(SGD(weights(), lr=0.1), lr=0.2)),
        (ValueError, "wrap a plain optimizer", lambda: SAM.wrap(SAM(weights(), SGD, lr=0.1))),
        (ValueError, "wrap a plain optimizer", lambda: (opt := SAM(weights(), SGD, lr=0.1)).wrap(opt.base_optimizer)),
        (ValueError, "base_optimizer 'FusedSGD' is unknown; pass a class, or", lambda: SAM(weights(), "FusedSGD")),
    ],
)
def test_construction(error, needle, build):
    with pytest.raises(error, match=needle):
        build()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_the_same_parameter_twice():
    w = weights(1)
    with pytest.raises(ValueError, match=r"same parameter appears twice in one group.*Pass each parameter once"):
        SAM(w + w, SGD, lr=0.1)
    opt = SAM(weights(), SGD, lr=0.1)
    with pytest.raises(ValueError, match="same parameter appears twice"):
        opt.add_param_group({"params": w + w})
    assert len(opt.param_groups) == 1


def test_a_refused_group_changes_nothing():
    opt = SAM(weights(), SGD, lr=0.1)
    with pytest.raises(ValueError, match="rho must be finite"):
        opt.add_param_group({"params": weights(), "rho": -2})
    assert len(opt.param_groups) == 1
    base = SGD(weights(), lr=0.1)
    with pytest.raises(ValueError, match="rho must be finite"):
        SAM.wrap(base, rho=-1)
    assert "rho" not in base.param_groups[0]
    SAM.wrap(base)


def test_an_optimizer_that_steps_in_backward():
    w = weights(1)
    w[0]._in_backward_optimizers = []
    with pytest.raises(ValueError, match=r"stepped inside backward.*Remove it"):
        SAM(w, SGD, lr=0.1)


def test_a_model_that_has_none_of_the_parameters():
    with pytest.warns(UserWarning, match="none of the optimizer's parameters belongs to model"):
        SAM(weights(), SGD, lr=0.1, model=nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("error", "needle", "loss_of"),
    [
        (TypeError, r"returned a scalar; it must return per-sample losses of shape \[12\]", lambda v: v.mean()),
        (TypeError, r"returned a tensor of shape \[11\]; .* shape \[12\]", lambda v: v[1:]),
        (TypeError, r"returned a tensor of shape \[12, 1\]", lambda v: v[:, None]),
        (TypeError, "returned float; it must return per-sample losses", lambda v: v.mean().item()),
        (TypeError, "returned NoneType", lambda v: None),
        (TypeError, "returned a scalar", lambda v: v.mean().backward() or v.mean()),
        (RuntimeError, "losses have no gradient; .* outside torch.no_grad", lambda v: v.detach()),
    ],
)
def test_what_a_loss_function_may_return(backend, error, needle, loss_of):
    model = mlp()
    opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
    x, y = batches(1)[0]
    before = snapshot(model)
    with pytest.raises(error, match=needle):
        opt.step(lambda x, y: loss_of(losses_of(model)(x, y)), x, y)
    assert_same(model, before)
    opt.step(losses_of(model), x, y)


@pytest.mark.parametrize(
    ("error", "needle", "call"),
    [
        (ValueError, r"different leading sizes \[12, 11\]", lambda o, f, x, y: o.step(f, x, y[:11])),
        (ValueError, r"different leading sizes", lambda o, f, x, y: o.step(f, {"x": x, "more": (y, y[:3])})),
        (ValueError, r"the batch is empty \(leading size 0\); skip it", lambda o, f, x, y: o.step(f, x[:0], y[:0])),
        (TypeError, "no tensor with a leading dimension, only int, str", lambda o, f, x, y: o.step(f, 1, "a")),
        (ValueError, "clip_grad_norm must be positive, got 0", lambda o, f, x, y: o.step(f, x, y, clip_grad_norm=0)),
        (TypeError, "scaler= and clip_grad_norm= go with", lambda o, f, x, y: o.step(clip_grad_norm=1.0)),
        (TypeError, "takes a loss function or closure first, got Tensor", lambda o, f, x, y: o.step(x, y)),
        (RuntimeError, "no parameter has a gradient; call backward", lambda o, f, x, y: o.step(lambda: f(x, y).mean())),
    ],
)
def test_arguments_of_step(backend, error, needle, call):
    model = mlp()
    opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
    before = snapshot(model)
    with pytest.raises(error, match=needle):
        call(opt, losses_of(model), *batches(1)[0])
    assert_same(model, before)
    opt.step(losses_of(model), *batches(1)[0])


def test_unknown_backends():
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose one of 'triton', 'torch', or None"):
        fastsam.set_backend("cuda")


def test_apex_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ImportError, match=r"apex.FusedSGD was asked for, but apex is not installed; install NVIDIA's"):
        SAM(weights(), "apex.FusedSGD", lr=0.1)


def test_apex_from_pypi_is_told_from_nvidias(monkeypatch):
    unrelated = types.ModuleType("apex")
    unrelated.__file__ = "site-packages/apex/__init__.py"
    monkeypatch.setitem(sys.modules, "apex", unrelated)
    with pytest.raises(ImportError, match=r"site-packages/apex/__init__.py\) is PyPI's unrelated package"):
        SAM(weights(), "apex.FusedAdam", lr=0.1)


def test_nvidias_apex_serves_as_base(monkeypatch):
    apex = types.ModuleType("apex")
    apex.__path__ = []
    apex.optimizers = types.ModuleType("apex.optimizers")
    apex.optimizers.FusedSGD = type("FusedSGD", (SGD,), {})
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex.optimizers)
    model = mlp()
    opt = SAM(model.parameters(), "apex.FusedSGD", rho=0.1, lr=0.1)
    assert type(opt.base_optimizer).__name__ == "FusedSGD"
    opt.step(losses_of(model), *batches(1)[0])
    with pytest.raises(ValueError, match="NVIDIA apex has no optimizer 'FusedFoo'"):
        SAM(weights(), "apex.FusedFoo")
