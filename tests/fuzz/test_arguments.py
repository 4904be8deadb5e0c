"""Generated arguments: a step is the reference's, or the error names the argument before anything is changed.

What fits is said here once more, in a line for each argument, and not taken from the code under test.
"""

import copy
import math
import warnings
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods import BASES
from problems import batches, losses_of, mlp
from surroundings import FIGURES, budget, changes, picture

import fastsam
from fastsam.methods import METHODS
from fastsam.testing import check_step

ROWS = 14
LARGEST = float(np.finfo(np.float32).max)
EDGES = [
    0,
    1,
    -1,
    0.0,
    -0.0,
    1.0,
    -1.0,
    math.nan,
    math.inf,
    -math.inf,
    5e-324,
    1e-45,
    1e-30,
    LARGEST,
    1e38,
    1e39,
    1e308,
]
ODD = [
    True,
    False,
    None,
    "",
    "0.1",
    "off",
    "all",
    b"1",
    [],
    [0.1],
    (1,),
    {},
    {"rho": 1},
    1j,
    10**30,
    10**400,
    -(10**400),
]
STRANGE = [*map(np.float32, (0.1, math.nan)), np.int64(2), np.bool_(True), Decimal("0.1"), Fraction(1, 2), Ellipsis]
TENSORS = [torch.tensor(0.1), torch.tensor([0.1, 0.2]), torch.float16, torch.nn.Linear(1, 1), object(), print, int]
ANYTHING = st.one_of(
    st.sampled_from(EDGES), st.sampled_from([*ODD, *STRANGE, *TENSORS]), st.floats(), st.integers(), st.text(max_size=4)
)
"""Boundaries, wrong types, numbers that no float holds."""


class Kind:
    """An argument: values that it takes, and a predicate that knows them."""

    def __init__(self, good, fits):
        self.good, self.fits = good, fits


def is_number(value):
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and -math.inf < value < math.inf and abs(value) <= LARGEST


def number(low, high, good=None, exclusive=False):
    def fits(value):
        return is_number(value) and (low < value if exclusive else low <= value) and value <= high

    return Kind(st.floats(low, min(high, 2.0)) if good is None else good, fits)


def integer(low, high, good):
    return Kind(good, lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high)


def word(*choices):
    return Kind(st.sampled_from(choices), lambda value: isinstance(value, str) and value in choices)


def optional(kind):
    return Kind(st.none() | kind.good, lambda value: value is None or kind.fits(value))


FLAG = Kind(st.booleans(), lambda value: isinstance(value, bool))
RADIUS = number(0, math.inf)
ENGINE = {
    "same_rng": FLAG,
    "check_finite": FLAG,
    "stochastic_rounding": Kind(
        st.sampled_from(["auto", True, False]),
        lambda value: isinstance(value, bool) or (isinstance(value, str) and value == "auto"),
    ),
    "perturb_sync": Kind(
        st.sampled_from([None, "global", "replica"]),
        lambda value: (
            value is None
            or (isinstance(value, str) and value in ("global", "replica"))
            or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
        ),
    ),
    "seed": integer(-(2**63), 2**64 - 1, st.integers(-(2**63), 2**64 - 1)),
}
SAM = {
    "rho": RADIUS,
    "adaptive": Kind(
        st.sampled_from([False, True, "official"]),
        lambda value: isinstance(value, bool) or (isinstance(value, str) and value == "official"),
    ),
}
COUNT = integer(1, math.inf, st.integers(1, 5))
SHARE = number(0, 1, st.floats(0.05, 1), exclusive=True)
OPTIONS = {
    fastsam.SAM: SAM,
    fastsam.ESAM: SAM | {"beta": SHARE, "gamma": SHARE},
    fastsam.MSAM: SAM | {"num_shards": optional(COUNT), "shard_size": optional(COUNT)},
    fastsam.GSAM: SAM
    | {"alpha": number(0, 1), "rho_min": optional(RADIUS), "lr_max": optional(RADIUS), "lr_min": optional(RADIUS)},
    fastsam.LookSAM: SAM | {"k": COUNT, "alpha": RADIUS},
}
"""By class, arguments that are keys of groups as well."""
FIXED = {
    fastsam.SAM: {},
    fastsam.ESAM: {
        "mask": word("tensor", "element"),
        "norm": word("masked", "full", "estimated"),
        "selection": word("reforward", "reuse"),
        "strict": FLAG,
    },
    fastsam.MSAM: {"weighting": word("sample", "uniform"), "bn_update": word("mean", "sequential")},
    fastsam.GSAM: {},
    fastsam.LookSAM: {"scope": word("global", "tensor")},
}
"""By class, arguments of the constructor alone."""
COUNTERS = {f"fastsam_{name}": integer(0, 2**63 - 1, st.integers(0, 4)) for name in ("step", "taken", "active")}
COUNTERS["fastsam_seed"] = ENGINE["seed"]
"""Keys of groups that checkpoints carry."""
CLASSES = list(dict.fromkeys(row.cls for row in METHODS.values() if row.kind == "optimizer"))


def misfits(cls, given):
    """Names of arguments of which at least one has to be in the message; empty if all is well."""
    kinds = OPTIONS[cls] | FIXED[cls] | ENGINE | {"perturb": FLAG} | COUNTERS
    wrong = [name for name, value in given.items() if not kinds[name].fits(value)]
    if wrong:
        return wrong
    if cls is fastsam.MSAM and {"num_shards", "shard_size"} <= given.keys():
        both = [given["num_shards"], given["shard_size"]]
        return ["num_shards", "shard_size"] if (both[0] is None) == (both[1] is None) else []
    if cls is fastsam.GSAM:
        rho_min, lr_max, lr_min = (given.get(name) for name in ("rho_min", "lr_max", "lr_min"))
        if (rho_min is None) != (lr_max is None):
            return ["rho_min", "lr_max"]
        if lr_max is not None and (lr_min or 0.0) > lr_max:
            return ["lr_min", "lr_max"]
    return []


def misfits_of_batch(opt):
    """Names of arguments for which this batch is too small."""
    if opt.perturb_sync not in (None, "global", "replica", 1):
        return ["perturb_sync"]
    if not isinstance(opt, fastsam.MSAM):
        return []
    shards, size = (opt.option(opt.param_groups[0], name) for name in ("num_shards", "shard_size"))
    leaves_one = 2 * shards > ROWS if shards is not None else size == 1 or ROWS % size == 1
    return ["num_shards", "shard_size", "shards"] if leaves_one else []


def defaults(cls):
    return {"num_shards": 3, "shard_size": None} if cls is fastsam.MSAM else {}


@st.composite
def argument_sets(draw, cls):
    """Keywords of a constructor, groups, and a later change, of which most fit."""

    def one(kinds):
        name = draw(st.sampled_from(sorted(kinds)))
        return name, draw(kinds[name].good if draw(st.integers(0, 2)) else ANYTHING)

    every = OPTIONS[cls] | FIXED[cls] | ENGINE
    of_groups = OPTIONS[cls] | {"perturb": FLAG}
    keywords = dict(one(every) for _ in range(draw(st.integers(0, 4))))
    if cls is fastsam.GSAM and draw(st.booleans()):
        rule = {name: draw(st.floats(0, 0.2)) for name in ("rho_min", "lr_max", "lr_min")}
        keywords |= {**rule, "lr_max": rule["lr_min"] + rule["lr_max"]}
    if cls is fastsam.MSAM and draw(st.booleans()):
        keywords |= draw(
            st.sampled_from([{"num_shards": 2, "shard_size": None}, {"num_shards": None, "shard_size": 4}])
        )
    place = draw(st.sampled_from(["constructor", "unknown", "group", "later", "added", "checkpoint"]))
    kinds = of_groups | COUNTERS if place == "checkpoint" else of_groups
    return {
        "keywords": defaults(cls) | keywords,
        "base": draw(st.sampled_from(sorted(BASES))),
        "wraps": draw(st.booleans()),
        "place": place,
        "which": draw(st.integers(0, 1)),
        "change": one(kinds),
        "warm": draw(st.booleans()),
    }


class RefusedError(Exception):
    """An error of ours that names its argument, and has changed nothing."""


def checked(act, names, model, opt=None):
    """Call what has to raise if and only if there are such names."""
    before, error = picture(model, opt), None
    try:
        result = act()
    except (TypeError, ValueError, RuntimeError) as raised:
        error = raised
    if error is None:
        assert not names, f"{names} accepted silently"
        return result
    # an error of the data, not of an argument
    if not (type(error) is RuntimeError and "strict=True" in str(error)):
        assert type(error) in (TypeError, ValueError), repr(error)
        assert names, f"what fits is refused: {error}"
        assert any(name in str(error) for name in names), f"none of {names} is named: {error}"
    assert len(str(error)) < 1000
    assert not changes(before, picture(model, opt)), f"{changes(before, picture(model, opt))} changed"
    raise RefusedError(type(error).__name__) from error


def is_small(opt):
    """Whether radii are such that the reference's numbers are finite."""
    groups = opt.param_groups
    radii = [
        opt.option(group, "rho") / (opt.option(group, "beta") if isinstance(opt, fastsam.ESAM) else 1)
        for group in groups
    ]
    others = [opt.option(g, "alpha") for g in groups] if isinstance(opt, (fastsam.GSAM, fastsam.LookSAM)) else [0.0]
    return max(radii) <= 10 and max(others) <= 10


def steps(opt, model, names):
    """Two steps are the reference's, or the error names one of these."""
    losses, names = losses_of(model), names or misfits_of_batch(opt)
    for x, y in batches(2, rows=ROWS):
        if not names and is_small(opt):
            before = picture(model, opt)
            checked(lambda x=x, y=y: check_step(opt, losses, x, y), [], model, opt)
            assert not changes(before, picture(model, opt)), "check_step puts everything back"
        checked(lambda x=x, y=y: opt.step(losses, x, y), names, model, opt)
        assert all(torch.isfinite(p).all() for p in model.parameters())


def run(cls, case):
    model = mlp(batchnorm=True)
    keywords, place, (name, value) = case["keywords"], case["place"], case["change"]
    params = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:]}]
    if place == "group":
        groups[case["which"]][name] = value
    if place == "added":
        groups = groups[:1]
    if place == "unknown":
        keywords = {**keywords, "rhoo": value}
    base_cls, base_options = BASES[case["base"]]
    names = misfits(cls, case["keywords"]) + ["rhoo"] * (place == "unknown")
    if place == "group" and not names:
        names = misfits(cls, keywords | {name: value})
    if case["wraps"]:
        base = base_cls(groups, **base_options)
        opt = checked(lambda: cls.wrap(base, model=model, **keywords), names, model, base)
    else:
        opt = checked(lambda: cls(groups, base_cls, model=model, **keywords, **base_options), names, model)
    if case["warm"] and not misfits_of_batch(opt) and is_small(opt):
        checked(lambda: opt.step(losses_of(model), *batches(1, rows=ROWS)[0]), [], model, opt)
    current = {**keywords, name: value}
    if place == "later":
        # the option's key, which is another one where the base has an option of the same name
        opt.param_groups[case["which"]][opt._option_keys[name]] = value
        names = misfits(cls, current)
    elif place == "added":
        added = {"params": params[2:], opt._option_keys[name]: value}
        checked(lambda: opt.add_param_group(added), misfits(cls, current), model, opt)
    elif place == "checkpoint":
        state = copy.deepcopy(opt.state_dict())
        key = name if name in COUNTERS else opt._option_keys[name]
        for group in state["param_groups"] if name in COUNTERS else state["param_groups"][case["which"] :]:
            group[key] = value
        checked(lambda: opt.load_state_dict(state), misfits(cls, current), model, opt)
    steps(opt, model, names)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_arguments_of_optimizers(cls):
    counts = FIGURES[f"arguments of {cls.__name__}"]

    @budget(25, 200)
    @given(argument_sets(cls))
    def meet(case):
        counts["sets"] += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run(cls, case)
        except RefusedError as refused:
            counts[f"refused with {refused}"] += 1
        else:
            counts["steps equal to the reference"] += 1

    meet()
