"""The table of methods says what the classes do: options that they have, ways that they can step in."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD

from fastsam.graph.plain_step import as_stepper
from fastsam.methods import LOSS_ARGUMENTS, METHODS, WAYS

VARIANTS = [(name, variant) for name, row in METHODS.items() for variant in row.variants]
OPTIMIZERS = [pair for pair in VARIANTS if METHODS[pair[0]].kind == "optimizer"]
OTHER_DEFAULTS = {
    ("sgd", "lr"),
    ("sgd", "momentum"),
    ("sgd", "weight_decay"),
    ("adamw", "lr"),
    ("asam", "rho"),
    ("msam", "num_shards"),
    ("mesa", "decay"),
}
"""Options whose default in the table is not the class's; the table says why."""


def keywords_of(cls):
    """All keywords of a constructor, those that it hands on to its parents' among them."""
    found = {}
    for c in cls.__mro__:
        if "__init__" in vars(c) and c is not object:
            found = {**inspect.signature(c.__init__).parameters, **found}
            if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(c.__init__).parameters.values()):
                break
    return found


class Problem:
    """One row of the table, built around SGD on a small net with batch norm."""

    def __init__(self, name, variant):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
        self.x, self.y, self.ids = torch.randn(8, 6), torch.arange(8) % 3, torch.arange(8)
        row = METHODS[name]
        options = dict(row.variants[variant].options)
        own = options if row.kind == "optimizer" else {}
        base_options = {**row.options, **options, "lr": 0.1} if row.kind == "base" else {"lr": 0.1}
        self.opt = row.build(self.model.parameters(), SGD, model=self.model, base_options=base_options, **own)
        self.loss = None
        if row.kind == "loss":
            sizes = {"num_samples": 8, "num_classes": 3}
            self.loss = row.build_loss(model=self.model, reduction="none", **sizes, **options)
            self.loss.set_epoch(1)
        self.needs = row.loss_needs

    def losses(self, x, y):
        z = self.model(x)
        if self.loss is None:
            return F.cross_entropy(z, y, reduction="none")
        given = {"sample_ids": self.ids, "inputs": x}
        return self.loss(z, y, *(given[need] for need in self.needs))

    def backward(self):
        self.opt.zero_grad()
        loss = self.losses(self.x, self.y).mean()
        loss.backward()
        return loss

    def step(self, way):
        if way == "loss_fn":
            as_stepper(self.opt).step(self.losses, self.x, self.y)
        elif way == "backward":
            self.opt.backward(self.losses, self.x, self.y)
            self.opt.step()
        elif way == "closure":
            self.opt.step(self.backward)
        elif way == "contexts":
            for pair in self.opt.passes((self.x, self.y)):
                for context in (self.opt.ascent, self.opt.descent):
                    with context():
                        self.losses(*pair.batch).mean().backward()
            self.opt.step()
        else:
            self.backward()
            self.opt.first_step(zero_grad=True)
            self.losses(self.x, self.y).mean().backward()
            self.opt.second_step()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_variant_steps_in_the_ways_that_the_table_says_and_no_other(name, variant, way):
    row, problem = METHODS[name], Problem(name, variant)
    before = {key: value.clone() for key, value in problem.model.named_parameters()}
    if way in row.variants[variant].ways:
        problem.step(way)
        assert all(not torch.equal(before[key], value) for key, value in problem.model[2].named_parameters("2"))
    elif row.kind == "optimizer":
        with pytest.raises(RuntimeError, match=r"use opt\.step\(loss_fn, \*batch\)"):
            problem.step(way)
        assert all(torch.equal(before[key], value) for key, value in problem.model.named_parameters())
    else:
        with pytest.raises(AttributeError):
            problem.step(way)


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_whole(name):
    row = METHODS[name]
    assert row.summary
    assert "https://" in row.paper
    assert next(iter(row.variants)) == "default"
    assert row.variants["default"].options == {}
    assert row.ways == row.variants["default"].ways
    assert all(set(variant.ways) <= set(WAYS) and "loss_fn" in variant.ways for variant in row.variants.values())
    assert (row.kind == "loss") == bool(row.loss_needs)
    assert set(row.loss_needs) <= set(LOSS_ARGUMENTS)
    assert (row.base is None) == (row.kind == "base")
    assert row.base is None or METHODS[row.base].kind == "base"
    assert (row.tuned is None) == (row.grid == ())
    assert list(row.grid) == sorted(set(row.grid))
    assert row.tuned is None or (row.tuned in row.options and row.options[row.tuned] in row.grid)
    assert all(row.options[option] in words for option, words in row.choices.items())
    assert {option for option, value in row.options.items() if isinstance(value, str)} == set(row.choices)


@pytest.mark.parametrize("name", METHODS)
def test_options_are_keywords_and_their_defaults_the_classes(name):
    row, known = METHODS[name], keywords_of(METHODS[name].cls)
    variants = {option for variant in row.variants.values() for option in variant.options}
    assert {*row.options, *row.fixed} | variants <= set(known)
    assert not set(row.options) & set(row.fixed)
    other = {(name, option) for option, value in row.options.items() if value != known[option].default}
    assert other == {pair for pair in OTHER_DEFAULTS if pair[0] == name}


@pytest.mark.parametrize(("name", "variant"), OPTIMIZERS)
def test_what_is_given_comes_before_the_row(name, variant):
    row = METHODS[name]
    opt = row.build([torch.nn.Parameter(torch.ones(2))], SGD, base_options={"lr": 0.1}, rho=0.25)
    (group,) = opt.param_groups
    assert (type(opt), group["rho"], group["lr"]) == (row.cls, 0.25, 0.1)
    assert all(group[option] == value for option, value in row.fixed.items())


def test_a_loss_takes_its_options_with_the_loss():
    with pytest.raises(TypeError, match=r"SAF of kind 'loss' builds its optimizer without \['lam'\]"):
        METHODS["saf"].build([torch.nn.Parameter(torch.ones(2))], SGD, lam=0.3)
