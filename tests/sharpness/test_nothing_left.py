"""No measure leaves anything behind, also after an exception; each repeats to the last bit; bad input is refused."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import batches, losses_of, mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam.sharpness import (
    gradient_cosine,
    hessian_eigenvalues,
    landscape,
    line,
    m_sharpness,
    power_iteration,
    sam_sharpness,
    spectrum,
)

MEASURES = {
    "sharpness": sam_sharpness,
    "K steps": lambda *given, **how: sam_sharpness(*given, ascent_steps=2, **how),
    "whole loader": lambda *given, **how: sam_sharpness(*given, whole_loader=True, **how),
    "m-sharpness": lambda *given, **how: m_sharpness(*given, shard_size=4, **how),
    "cosine": gradient_cosine,
    "eigenvalues": lambda *given, **how: hessian_eigenvalues(*given, 2, **how),
    "power iteration": lambda *given, **how: power_iteration(*given, max_products=3, **how),
    "spectrum": lambda *given, **how: spectrum(*given, steps=3, probes=1, **how),
    "landscape": lambda *given, **how: landscape(*given, points=2, **how),
    "line": lambda model, *given, **how: line(model, *given, model.state_dict(), doubled(model), points=2, **how),
}


def doubled(model):
    return {name: 2 * t for name, t in model.state_dict().items()}


@pytest.fixture(params=MEASURES)
def measure(request):
    return MEASURES[request.param]


class Odd(nn.Module):
    """Moves all that a forward can move: statistics, a buffer in place and one by reference, a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.net = mlp(batchnorm=True, dropout=0.3)
        self.net[0].eval()
        self.register_buffer("in_place", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("replaced", torch.zeros(2))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            self.in_place += torch.rand(2) + random.random() + np.random.rand()
            self.frozen.mul_(2)
        self.replaced = torch.ones(2)
        return self.net(x) * (1 + self.in_place.sum())


def everything(model, generator):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: (id(t), t.data_ptr(), t.detach().clone()) for name, t in tensors.items()},
        {name: (id(p.grad), p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None},
        {name: m.training for name, m in model.named_modules()},
        [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), generator.get_state()],
    )


def assert_unchanged(before, after):
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.filterwarnings("ignore:two evaluations of the loss")
def test_nothing_is_left_behind(measure, fails):
    model, generator = Odd(), torch.Generator().manual_seed(5)
    x, y = (torch.cat(part) for part in zip(*batches(2), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=generator)
    for p in model.net.parameters():
        p.grad = torch.ones_like(p)
    calls = []

    def losses(x, y):
        calls.append(1)
        # the first two look whether the loss is random; later ones are at perturbed weights
        if fails and len(calls) == 5:
            raise KeyboardInterrupt
        return F.cross_entropy(model(x), y, reduction="none")

    before = everything(model, generator)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            measure(model, losses, loader, mode="train")
    else:
        measure(model, losses, loader, mode="train")
    assert_unchanged(before, everything(model, generator))


@pytest.mark.filterwarnings("ignore:two evaluations of the loss")
def test_it_repeats_whatever_the_generators_are_at(measure):
    """Shuffling, dropout and all; another seed is another order and other masks."""
    model = mlp(dropout=0.3)
    data = TensorDataset(*(torch.cat(part) for part in zip(*batches(2), strict=True)))

    def found(seed):
        torch.manual_seed(random.randrange(2**30))
        return measure(model, losses_of(model), DataLoader(data, batch_size=9, shuffle=True), mode="train", seed=seed)

    first, other = vars(found(1)), vars(found(2))
    torch.testing.assert_close(first, vars(found(1)), rtol=0, atol=0)
    assert any(not torch.equal(torch.as_tensor(v), torch.as_tensor(other[k])) for k, v in first.items())


def test_it_can_be_measured_without_gradients_around(measure):
    model, loader = mlp(), batches(2)
    with torch.no_grad():
        outside = measure(model, losses_of(model), loader)
    with torch.inference_mode():
        inside = measure(model, losses_of(model), loader)
    torch.testing.assert_close(vars(outside), vars(inside), rtol=0, atol=0)


def test_modes_are_those_asked_for():
    model, modes = mlp(batchnorm=True), []

    def losses(x, y):
        modes.append(model[1].training)
        return losses_of(model)(x, y)

    by_mode = {mode: sam_sharpness(model, losses, batches(1), mode=mode).value for mode in ("eval", "train")}
    assert set(modes[:4]) == {False}
    assert set(modes[4:]) == {True}
    assert by_mode["eval"] != by_mode["train"]


def test_a_loss_that_draws_warns_once():
    model = mlp(dropout=0.5)
    with pytest.warns(UserWarning, match="two evaluations of the loss at the same weights differ") as caught:
        sam_sharpness(model, losses_of(model), batches(3), mode="train")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sam_sharpness(model, losses_of(model), batches(3))


@pytest.mark.parametrize("build", [lambda: mlp(dropout=0.5), Odd], ids=["draws", "moves buffers"])
@pytest.mark.filterwarnings("ignore:two evaluations of the loss")
def test_both_forwards_of_a_batch_draw_the_same_and_start_from_the_same_buffers(build):
    """Or a radius of zero would have a sharpness."""
    model = build()
    found = sam_sharpness(model, losses_of(model), batches(3), 0.0, mode="train")
    assert (found.value, found.perturbed_loss) == (0.0, found.loss)


def test_batches_of_one_tensor_of_dicts_and_of_texts():
    model = nn.Linear(3, 1)
    x = torch.ones(4, 3)
    plain = sam_sharpness(model, lambda x: model(x).squeeze(1), [x])
    named = m_sharpness(
        model, lambda b: model(b["x"]).squeeze(1) * len(b["text"][0]), [{"x": x, "text": list("abcd")}], shard_size=2
    )
    assert plain.value == pytest.approx(named.value)


def test_progress_is_told_of_everything(measure):
    model, told = mlp(), []
    measure(model, losses_of(model), batches(2), progress=lambda done, total: told.append((done, total)))
    dones, totals = zip(*told, strict=True)
    assert list(dones) == list(range(1, len(told) + 1))
    assert len(set(totals)) == 1
    assert totals[0] in (None, len(told))


BAD = [
    (lambda m, f: sam_sharpness(m, f, []), ValueError, "the loader has no data"),
    (lambda m, f: sam_sharpness(m, f, iter(batches(1))), TypeError, "list_iterator, which can be walked but once"),
    (lambda m, f: sam_sharpness(m, f, batches(1), -1), ValueError, "rho must be finite and >= 0, got -1"),
    (lambda m, f: sam_sharpness(m, f, batches(1), float("nan")), ValueError, "rho must be finite and >= 0, got nan"),
    (
        lambda m, f: sam_sharpness(m, f, batches(1), ascent_steps=0),
        ValueError,
        "ascent_steps must be at least 1, got 0",
    ),
    (lambda m, f: m_sharpness(m, f, batches(1), shard_size=0), ValueError, "shard_size must be at least 1, got 0"),
    (
        lambda m, f: sam_sharpness(m, f, batches(1), mode="test"),
        ValueError,
        "mode must be one of 'eval', 'train', got 'test'",
    ),
    (lambda m, f: sam_sharpness(m, f, batches(1), sharded=True), ValueError, "no process group runs"),
    (lambda m, f: sam_sharpness(3, f, batches(1)), TypeError, "model must be a torch.nn.Module"),
    (lambda m, f: sam_sharpness(nn.ReLU(), f, batches(1)), ValueError, "no parameter of the model requires a gradient"),
    (lambda m, f: sam_sharpness(mlp(), f, batches(1)), RuntimeError, "the losses depend on no parameter of the model"),
    (lambda m, f: sam_sharpness(m, lambda *b: f(*b).mean(), batches(1)), TypeError, "returned a scalar"),
    (lambda m, f: hessian_eigenvalues(m, f, batches(1), 84), ValueError, "k must be from 1 to 83, .* got 84"),
    (lambda m, f: hessian_eigenvalues(m, f, batches(1), 0), ValueError, "k must be from 1 to 83, .* got 0"),
    (lambda m, f: hessian_eigenvalues(m, lambda *b: f(*b) / 0, batches(1)), ValueError, "product is not finite"),
    (lambda m, f: spectrum(m, f, batches(1), steps=0), ValueError, "steps must be at least 1, got 0"),
    (lambda m, f: spectrum(m, f, batches(1), probes=0), ValueError, "probes must be at least 1, got 0"),
    (lambda m, f: landscape(m, f, batches(1), points=1), ValueError, "points must be at least 2, got 1"),
    (lambda m, f: landscape(m, f, batches(1), dimensions=3), ValueError, "dimensions must be at most 2, got 3"),
    (lambda m, f: landscape(m, f, batches(1), extent=0), ValueError, "extent must be finite and above 0, got 0"),
    (lambda m, f: landscape(m, f, batches(1), pairs=0), ValueError, "pairs must be at least 1, got 0"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_refused(call, error, message):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        call(model, losses_of(model))
    torch.testing.assert_close(dict(before), dict(model.state_dict()), rtol=0, atol=0)


def test_a_loader_that_shrinks_is_refused():
    class Shrinking:
        def __init__(self):
            self.left = 3

        def __iter__(self):
            self.left -= 1
            return iter(batches(self.left))

    model = mlp()
    with pytest.raises(RuntimeError, match="the loader had 24 samples in one pass and 12 in another"):
        hessian_eigenvalues(model, losses_of(model), Shrinking())


def test_a_scripted_model_is_measured_and_left_as_it_was(measure):
    with warnings.catch_warnings():
        # torch's own, on every Python that it still scripts on
        warnings.simplefilter("ignore")
        model = torch.jit.script(mlp(batchnorm=True))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    measure(model, losses_of(model), batches())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
