"""Bad input gets an error that names the value and the remedy, before anything changes."""

import inspect
import sys
import types

import pytest
import torch
from problems import assert_same, batches, losses_of, mlp, snapshot
from torch import nn

import fastsam
from fastsam import SAM
from fastsam.schedule import Every, First, Last

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
            r"SAM knows no momentun; it knows rho, adaptive, model, .*seed, and SGD's own keywords are lr, momentum",
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


HUGE = 10**400
FLAG, NUMBER = ("off", 1, 0.0, None, [True]), ("0.1", None, True, [0.1], float("nan"), float("inf"), -1, HUGE, 1e308)
INTEGER = ("2", 2.0, True, [2])


class Scale:
    """A schedule whose scale is always the same."""

    def __init__(self, value):
        self.value = value

    def scale(self, step):
        return self.value


COMMON = {
    "same_rng": FLAG,
    "check_finite": FLAG,
    "on_base_step": ("error", None, True, ["raise"]),
    "when": ("last", 0.3, True, [Every(2)], Every, *map(Scale, (*NUMBER, 1.1))),
    "stochastic_rounding": ("on", 1, None, ["auto"]),
    "perturb_sync": ("all", 0, -1, 2.0, True, ["global"]),
    "seed": (*INTEGER, None, HUGE, -HUGE),
    "model": ("model", 3, nn.Linear),
    "rho": NUMBER,
    "adaptive": ("yes", 1, None, ["official"]),
    "keep": ("buffers", 3, [3]),
    "generators": (None, 3, ["numpy"]),
}
TRAJECTORY = {
    "lam": NUMBER,
    "tau": (*NUMBER, 0),
    "start_epoch": (*INTEGER, None, -1),
    "label_smoothing": (*NUMBER, 2),
    "tau_squared": FLAG,
    "ignore_index": (*INTEGER, None, HUGE),
    "reduction": ("max", None, ["mean"]),
}
P = {"p": ("2", None, True, [2], float("nan"), 0.5, -1, HUGE)}
PART = {
    "fraction": (*NUMBER, 0, 1.5, 1e-3),
    "total_steps": (*INTEGER, None, 0, -1, HUGE),
    "total_epochs": (*INTEGER, 3, 0, HUGE),
    "steps_per_epoch": (*INTEGER, 3, 0, HUGE),
}
BAD = {
    fastsam.SAM: COMMON | P,
    fastsam.ESAM: {
        **COMMON,
        "beta": (*NUMBER, 0, 1.5),
        "gamma": (*NUMBER, 0, 1.5),
        "mask": ("row", None, ["tensor"]),
        "norm": ("2", None),
        "selection": ("slice", None),
        "strict": FLAG,
    },
    fastsam.MSAM: {
        **COMMON,
        **P,
        "num_shards": (*INTEGER, 0, -1),
        "shard_size": (*INTEGER, 0, -1),
        "weighting": ("rows", None, ["sample"]),
        "bn_update": ("last", None),
        "execution": ("auto", None),
    },
    fastsam.GSAM: {
        **COMMON,
        "alpha": (*NUMBER, 1.5),
        "rho_min": (*(value for value in NUMBER if value is not None), 0.01),
        "lr_max": (*(value for value in NUMBER if value is not None), 0.1),
        "lr_min": tuple(value for value in NUMBER if value is not None),
    },
    fastsam.LookSAM: {**COMMON, "k": (*INTEGER, None, 0, -5), "alpha": NUMBER, "scope": ("row", None, ["global"])},
    fastsam.SAF: {
        **TRAJECTORY,
        "num_samples": (*INTEGER, None, 0, HUGE),
        "num_classes": (*INTEGER, None, 1, HUGE),
        "lag": (*INTEGER, None, 0, HUGE),
        "history_dtype": ("float16", None, torch.int64, [torch.float16]),
        "storage": (None, 3, "", ["host"]),
        "resume": FLAG,
        "sampler": ("x", 3, [1, 2]),
        "save_history": FLAG,
    },
    fastsam.MESA: {
        **TRAJECTORY,
        "model": ("model", None, nn.Linear),
        "decay": (*NUMBER, 0, 1),
        "teacher_dtype": ("float16", torch.int64, 16),
        "teacher": ("model", nn.Linear),
        "output": (True, 1.5, ["logits"]),
    },
    Every: {"n": (*INTEGER, None, 0, -1, HUGE)},
    First: PART,
    Last: PART | {"ramp": (*INTEGER, None, -1, HUGE)},
    fastsam.SampleToRankSampler: {
        "num_samples": (*INTEGER, None, 0, HUGE),
        "num_replicas": (*INTEGER, 0),
        "rank": (*INTEGER, 2, -1),
        "shuffle": FLAG,
        "seed": (*INTEGER, None, -1),
        "drop_last": FLAG,
    },
}
"""By class and argument, values of the wrong type or out of range."""
OPTIMIZERS = [cls for cls in BAD if issubclass(cls, torch.optim.Optimizer)]
NEEDED = {
    fastsam.MSAM: {"num_shards": 2},
    fastsam.SAF: {"num_samples": 4, "num_classes": 3},
    Every: {"n": 2},
    First: {"fraction": 0.5, "total_steps": 8},
    Last: {"fraction": 0.5, "total_steps": 8},
    fastsam.SampleToRankSampler: {"num_samples": 4, "num_replicas": 2, "rank": 0},
}


def build(cls, **arguments):
    if issubclass(cls, torch.optim.Optimizer):
        return cls(weights(), SGD, lr=0.1, **arguments)
    return cls(**({"model": nn.Linear(1, 1)} if cls is fastsam.MESA else {}) | arguments)


def assert_names(name, value, refused):
    """Whether a call raises TypeError or ValueError that names the argument, and no other exception."""
    with pytest.raises((TypeError, ValueError)) as caught:
        refused()
    # an OverflowError or a UnicodeError would be none of ours
    assert type(caught.value) in (TypeError, ValueError), (name, value, caught.value)
    assert name in str(caught.value), (name, value, caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("cls", BAD, ids=lambda cls: cls.__name__)
def test_every_argument_is_checked_at_construction(cls):
    """But for those that have no wrong type: where a class takes anything, the base's own, and a device of torch's."""
    needed = NEEDED.get(cls, {})
    build(cls, **needed)
    for name in set(inspect.signature(cls).parameters) - {"params", "base_optimizer", "base_kwargs", "device"}:
        for value in BAD[cls][name]:
            others = {} if name == "shard_size" else needed
            assert_names(name, value, lambda: build(cls, **{**others, name: value}))  # noqa: B023


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_arguments_of_calls_are_checked(cls):
    """Before anything is changed: the step is taken afterwards."""
    model = mlp()
    # gamma = 1 for ways that select no rows
    own = {"gamma": 1.0} if cls is fastsam.ESAM else NEEDED.get(cls, {})
    opt = cls(model.parameters(), SGD, lr=0.1, **own)
    losses, (x, y) = losses_of(model), batches(1)[0]
    before = snapshot(model)
    for value in ("s", 3, True, object()):
        assert_names("scaler", value, lambda: opt.step(losses, x, y, scaler=value))  # noqa: B023
        assert_names("scaler", value, lambda: fastsam.graph_step(opt, losses, x, y, scaler=value))  # noqa: B023
    for value in ("1", True, [1.0], 0, -1.0, float("nan"), HUGE, 1e308):
        assert_names("clip_grad_norm", value, lambda: opt.step(losses, x, y, clip_grad_norm=value))  # noqa: B023
        assert_names(
            "clip_grad_norm",
            value,
            lambda: fastsam.graph_step(opt, losses, x, y, clip_grad_norm=value),  # noqa: B023
        )
    for value in (*INTEGER, None, 0):
        assert_names("warmup", value, lambda: fastsam.graph_step(opt, losses, x, y, warmup=value))  # noqa: B023
    for value in ("1024", True, 0, float("nan"), HUGE):
        assert_names("grad_scale", value, lambda: opt.ascent(grad_scale=value))  # noqa: B023
    for value in FLAG:
        assert_names("sync", value, lambda: opt.descent(sync=value))  # noqa: B023
        assert_names("zero_grad", value, lambda: opt.first_step(zero_grad=value))  # noqa: B023
        assert_names("zero_grad", value, lambda: opt.second_step(zero_grad=value))  # noqa: B023
    assert_same(model, before)
    opt.step(losses, x, y)


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_what_is_set_in_a_group_later_is_checked(cls):
    """Before the next step changes anything, in every way of taking one, and in a checkpoint's groups."""
    model, own = mlp(), {"gamma": 1.0} if cls is fastsam.ESAM else NEEDED.get(cls, {})
    opt = cls(model.parameters(), SGD, lr=0.1, **own)
    losses, (x, y) = losses_of(model), batches(1)[0]
    opt.step(losses, x, y)
    before, state = snapshot(model), opt.state_dict()
    graphed = fastsam.graph_step(opt, losses, x, y)
    for name in {*opt._option_keys} & {*BAD[cls]}:
        for value in BAD[cls][name]:
            good, opt.param_groups[0][name] = opt.param_groups[0][name], value
            for call in (opt.step, opt.ascent, opt.descent, opt.first_step, lambda: opt.needs_second_pass):
                assert_names(name, value, call)
            assert_names(name, value, lambda: opt.step(losses, x, y))
            assert_names(name, value, lambda: opt.backward(losses, x, y))
            assert_names(name, value, lambda: opt.step(lambda: losses(x, y).mean()))
            assert_names(name, value, lambda: graphed(x, y))
            opt.param_groups[0][name] = good
            bad = {**state, "param_groups": [{**state["param_groups"][0], name: value}]}
            assert_names(name, value, lambda: opt.load_state_dict(bad))  # noqa: B023
    for name in ("fastsam_step", "fastsam_taken", "fastsam_active", "fastsam_seed"):
        for value in (*INTEGER, None, HUGE, -HUGE):
            bad = {**state, "param_groups": [{**state["param_groups"][0], name: value}]}
            assert_names(name, value, lambda: opt.load_state_dict(bad))  # noqa: B023
    assert_same(model, before)
    opt.step(losses, x, y)


@pytest.mark.parametrize("num_shards", [13, 10**9, HUGE])
def test_more_shards_than_rows(num_shards):
    """At once, whatever the number, which is no length of a list."""
    model = mlp()
    opt = fastsam.MSAM(model.parameters(), SGD, num_shards=num_shards, lr=0.1)
    shown = "an integer of more than 30 digits" if num_shards == HUGE else num_shards
    with pytest.raises(ValueError, match=f"num_shards={shown} is more than the 12 rows of the batch"):
        opt.step(losses_of(model), *batches(1)[0])


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_an_unknown_keyword_names_our_class(cls):
    own = NEEDED.get(cls, {})
    with pytest.raises(TypeError, match=rf"^{cls.__name__} knows no q; it knows rho, .*SGD's own keywords are lr, mom"):
        build(cls, q=2, **own)
    with pytest.raises(TypeError, match=rf"^{cls.__name__}.wrap\(\) does not know q; .* {cls.__name__} knows rho, "):
        cls.wrap(SGD(weights(), lr=0.1), q=2, **own)


@pytest.mark.parametrize("params", [None, 3, nn.Linear(1, 1), "params"])
def test_what_parameters_may_be(params):
    with pytest.raises(TypeError, match=r"params must be tensors or groups of them, got .*; pass model.parameters"):
        SAM(params, SGD, lr=0.1)


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
        (TypeError, r"returned 2 values \(has_aux=True is for \(losses, aux\)\)", lambda v: (v, 1)),
        (TypeError, r"returned a tensor of shape \[11\]; .* shape \[12\]", lambda v: v[1:]),
        (TypeError, r"returned a tensor of shape \[12, 1\]", lambda v: v[:, None]),
        (TypeError, "returned float; it must return per-sample losses", lambda v: v.mean().item()),
        (TypeError, "returned NoneType", lambda v: None),
        (TypeError, "has run backward itself; leave that out", lambda v: v.mean().backward() or v.mean()),
        (RuntimeError, "losses have no gradient; .* outside torch.no_grad", lambda v: v.detach()),
    ],
)
def test_what_a_loss_function_may_not_return(backend, error, needle, loss_of):
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
        (TypeError, "scaler=, clip_grad_norm= and has_aux= go with", lambda o, f, x, y: o.step(clip_grad_norm=1.0)),
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
