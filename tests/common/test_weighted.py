"""`fastsam.Weighted`: the objective is `(w * l).sum() / total`, over shards, accumulation and selection too."""

import math

import pytest
import torch
import torch.nn.functional as F
from laws import PLAIN, law
from methods import WAYS
from problems import largest_difference
from torch import nn
from training import Training

from fastsam import ESAM, MSAM, SAM, Weighted
from fastsam.kernels import philox

ROWS, TERMS = 12, 5


def weights_of(n, seed=0):
    """Of n rows of TERMS terms: lengths that differ, one row without any."""
    lengths = torch.randint(1, TERMS + 1, (n,), generator=torch.Generator().manual_seed(seed))
    lengths[n // 2] = 0
    return (torch.arange(TERMS) < lengths[:, None]).double() * torch.linspace(0.5, 2, n, dtype=torch.float64)[:, None]


def terms_of(losses):
    """Several terms of each row, that sum to other numbers than TERMS times its loss."""
    return losses[:, None] * torch.linspace(0.5, 1.5, TERMS, dtype=losses.dtype) + losses[:, None].square() * 0.1


OTHER_WAYS = {"the caller's own backward takes the loss": lambda cell: cell.way not in ("loss_fn", "backward")}
SIDE_BY_SIDE = {"refused: shards side by side": lambda cell: cell.options.get("execution") == "batched"}
OWN_TESTS = {"rows and shards weigh differently there": lambda cell: cell.subject.optimizer in ("esam", "msam")}


def trained(cell, make, way=None, steps=4):
    training = Training(cell)
    losses = training.losses
    for _ in range(steps):
        training.begin()
        WAYS[way or cell.way](training.opt, lambda *batch: make(losses(*batch)), *training.batch)
        training.taken += 1
    return training.model


@law(skips=OTHER_WAYS | SIDE_BY_SIDE)
def test_equal_weights_are_the_mean(cell):
    plain = trained(cell, lambda losses: losses)
    weighted = trained(cell, lambda losses: Weighted(losses, torch.full_like(losses, 3.0)))
    assert largest_difference(plain, weighted) < 1e-11


@law(skips=OTHER_WAYS | SIDE_BY_SIDE | OWN_TESTS)
@pytest.mark.parametrize("total", [None, 7.5])
def test_terms_count_what_they_weigh(cell, total):
    """Against a step on row losses whose mean is the weighted objective."""

    def plain(losses):
        w = weights_of(len(losses))
        return (w * terms_of(losses)).sum(1) * len(losses) / (total or w.sum())

    expected = trained(cell, plain)
    weighted = trained(cell, lambda losses: Weighted(terms_of(losses), weights_of(len(losses)), total))
    assert largest_difference(expected, weighted) < 1e-11


# methods in which a row's share of the weight is not its share of the rows, against equations by hand


class Problem:
    """A net, rows with several terms each, and the gradient of their weighted sum at w + eps."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, TERMS)).double()
        self.x, self.y = torch.randn(ROWS, 4).double(), torch.randn(ROWS, TERMS).double()
        self.w = weights_of(ROWS, seed)

    def losses(self, total=None):
        return lambda x, y, w: Weighted((self.model(x) - y).square(), w, total)

    @property
    def batch(self):
        return self.x, self.y, self.w

    def c(self, rows=slice(None)):
        return (self.w[rows] * (self.model(self.x[rows]) - self.y[rows]).square()).sum(1)

    def gradient(self, loss, eps=None):
        params = list(self.model.parameters())
        with torch.no_grad():
            torch._foreach_add_(params, eps or [torch.zeros_like(p) for p in params])
        value = loss()
        found = torch.autograd.grad(value.sum(), params)
        with torch.no_grad():
            torch._foreach_sub_(params, eps or [torch.zeros_like(p) for p in params])
        return value.detach(), found


def radial(g, rho):
    norm = math.sqrt(sum(g_n.square().sum().item() for g_n in g))
    return [rho * g_n / (norm + 1e-12) for g_n in g]


def assert_final_gradient(problem, opt, expected, **how):
    opt.backward(problem.losses(**how), *problem.batch)
    found = [p.grad.clone() for p in problem.model.parameters()]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("total", [None, 9.0], ids=["", "total"])
@pytest.mark.parametrize("weighting", ["sample", "uniform"])
@pytest.mark.parametrize("num_shards", [1, 3, 5])
@pytest.mark.parametrize("left", [False, True], ids=["", "accumulates"])
def test_msams_shards(backend, total, weighting, num_shards, left):
    problem = Problem()
    sgd = torch.optim.SGD
    params = list(problem.model.parameters())
    opt = MSAM(params, sgd, 0.2, num_shards=num_shards, weighting=weighting, model=problem.model, lr=0.1)
    rows = torch.arange(ROWS).tensor_split(num_shards)
    d, whole = [torch.zeros_like(p) for p in params], problem.w.sum()
    t = total or whole
    for part in rows:
        own = problem.w[part].sum()
        eps = radial(problem.gradient(lambda part=part: problem.c(part))[1], 0.2)
        g = problem.gradient(lambda part=part: problem.c(part), eps)[1]
        factor = 1 / t if weighting == "sample" else whole / t / num_shards / own
        d = [d_n + factor * g_n for d_n, g_n in zip(d, g, strict=True)]
    if left:
        for p in params:
            p.grad = torch.ones_like(p)
        d = [d_n + 1 for d_n in d]
    assert_final_gradient(problem, opt, d, total=total)
    assert opt.last_grad_norm.shape == ((num_shards,) if num_shards > 1 else (1,))
    opt.zero_grad()
    expected = problem.c().sum().detach() / t
    torch.testing.assert_close(opt.step(problem.losses(total), *problem.batch), expected)


@pytest.mark.parametrize("total", [None, 9.0], ids=["", "total"])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("selection", ["reforward", "reuse"])
def test_esams_rows(backend, total, gamma, selection):
    """delta_i = c_i(w + eps) - c_i(w), rows that weigh nothing last; (W/T) sum c_i / sum W_i over the chosen."""
    problem = Problem(2)
    params, options = list(problem.model.parameters()), {"beta": 0.7, "gamma": gamma, "selection": selection, "seed": 3}
    opt = ESAM(params, torch.optim.SGD, 0.2, model=problem.model, lr=0.1, **options)
    words = philox.first_words(len(params), 0, 3)
    mask = [float(word < philox.threshold(0.7)) for word in words]
    assert 0 < sum(mask) < len(mask)
    before, g = problem.gradient(problem.c)
    eps = radial([m * g_n for m, g_n in zip(mask, g, strict=True)], 0.2 / 0.7)
    delta = problem.gradient(problem.c, eps)[0] - before
    delta[problem.w.sum(1) == 0] = -math.inf
    k = int(gamma * ROWS)
    chosen = delta.argsort(descending=True, stable=True)[:k]
    factor = problem.w.sum() / (total or problem.w.sum()) / problem.w[chosen].sum()
    d = problem.gradient(lambda: problem.c(chosen) * factor, eps)[1]
    assert_final_gradient(problem, opt, d, total=total)


@pytest.mark.parametrize("cls", [SAM, MSAM])
def test_micro_batches_add_up_to_the_whole_by_total(backend, cls):
    """As num_items_in_batch gives it: no division by the number of micro-batches."""
    options = {"num_shards": 2} if cls is MSAM else {}
    whole, parts = Problem(), Problem()
    total = whole.w.sum().item()
    parts_opt = cls(parts.model.parameters(), torch.optim.SGD, 0.2, lr=0.1, model=parts.model, **options)
    returned = 0
    for rows in torch.arange(ROWS).tensor_split(3):
        returned += parts_opt.backward(parts.losses(total), *(t[rows] for t in parts.batch))
    m = 3 * options.get("num_shards", 1)
    expected = MSAM(whole.model.parameters(), torch.optim.SGD, 0.2, num_shards=m, lr=0.1, model=whole.model)
    loss = expected.backward(whole.losses(), *whole.batch)
    torch.testing.assert_close(returned, loss)
    for p, q in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_a_batch_that_weighs_nothing_moves_nothing(backend):
    problem = Problem()
    problem.w.zero_()
    before = [p.clone() for p in problem.model.parameters()]
    for cls, options in ((SAM, {}), (MSAM, {"num_shards": 3}), (ESAM, {"gamma": 0.5})):
        opt = cls(problem.model.parameters(), torch.optim.SGD, 0.2, lr=0.1, **options)
        assert opt.step(problem.losses(), *problem.batch) == 0
        assert opt.skipped_steps == 0
        assert all(map(torch.equal, problem.model.parameters(), before))


def test_16_bit_gradients_are_scaled_without_a_factor_of_16_bits(choose):
    """Three shards whose weights are known one after the other, beside the same with total=."""
    choose("torch")
    grads = []
    for total in (None, True):
        problem = Problem()
        problem.model.bfloat16()
        problem.x, problem.y = problem.x.bfloat16(), problem.y.bfloat16()
        opt = MSAM(problem.model.parameters(), torch.optim.SGD, 0.0, num_shards=3, lr=0.1, model=problem.model)
        opt.backward(problem.losses(total and problem.w.sum().item()), *problem.batch)
        grads.append(torch.cat([p.grad.flatten().double() for p in problem.model.parameters()]))
    # rounding of each entry, to nearest, has no mean; a factor of 16 bits would be off by up to 0.4 % in all entries
    ratio = (grads[0] @ grads[1]) / grads[1].square().sum()
    assert abs(ratio.item() - 1) < 1e-3


@pytest.mark.parametrize("cls", [SAM, MSAM])
def test_weights_that_differ_between_the_passes_have_one_total(backend, cls):
    """As focal weights do: the second pass's objective is the sum by its own weights, over T."""
    problem, calls = Problem(), []
    options = {"num_shards": 3} if cls is MSAM else {}
    params = list(problem.model.parameters())
    opt = cls(params, torch.optim.SGD, 0.2, lr=0.1, model=problem.model, **options)

    def losses(x, y, w):
        calls.append(1)
        return Weighted((problem.model(x) - y).square(), w * (1 if len(calls) % 2 else 3), 7.0)

    d = [torch.zeros_like(p) for p in params]
    for part in torch.arange(ROWS).tensor_split(options.get("num_shards", 1)):
        eps = radial(problem.gradient(lambda part=part: problem.c(part))[1], 0.2)
        g = problem.gradient(lambda part=part: 3 * problem.c(part) / 7, eps)[1]
        d = [d_n + g_n for d_n, g_n in zip(d, g, strict=True)]
    opt.backward(losses, *problem.batch)
    for p, d_n in zip(params, d, strict=True):
        torch.testing.assert_close(p.grad, d_n, rtol=1e-10, atol=1e-12)


def test_what_weighs_nothing_may_be_inf(backend):
    models = []
    for spoilt in (False, True):
        problem = Problem()
        opt = SAM(problem.model.parameters(), torch.optim.SGD, 0.2, lr=0.1, model=problem.model)

        def losses(x, y, w, problem=problem, spoilt=spoilt):
            found = (problem.model(x) - y).square()
            return Weighted(found.masked_fill(w == 0, math.inf) if spoilt else found, w)

        opt.step(losses, *problem.batch)
        models.append(problem.model)
        assert opt.skipped_steps == 0
    assert largest_difference(*models) == 0


def test_shards_of_long_rows_overflow_no_float16_scale(choose):
    """Losses of the shards before the last stay near the mean, however much the rows weigh."""
    choose("torch")
    seen = []
    problem = Problem()
    problem.w = problem.w * 1000
    opt = MSAM(problem.model.parameters(), torch.optim.SGD, 0.2, num_shards=4, lr=0.1, model=problem.model)
    opt.backward(problem.losses(), *problem.batch, backward=lambda loss: seen.append(loss.item()) or loss.backward())
    assert max(seen) < 10


def test_parts_that_are_combined_need_the_total(backend):
    class Combined(MSAM):
        def combine(self, ascent, d):
            pass

    problem = Problem()
    params = list(problem.model.parameters())
    opt = Combined(params, torch.optim.SGD, 0.2, num_shards=3, lr=0.1, model=problem.model)
    with pytest.raises(ValueError, match="with weighting='sample' pass total="):
        opt.step(problem.losses(), *problem.batch)
    opt.zero_grad()
    opt.backward(problem.losses(5.0), *problem.batch)
    other = Problem()
    one = MSAM(other.model.parameters(), torch.optim.SGD, 0.2, num_shards=3, lr=0.1, model=other.model)
    one.backward(other.losses(5.0), *other.batch)
    for p, q in zip(params, other.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_the_perturbed_loss_is_weighted_too_and_does_not_follow_the_weights(backend):
    problem = Problem()
    opt = SAM(problem.model.parameters(), torch.optim.SGD, 0.2, lr=0.1, model=problem.model)
    w = torch.linspace(0, 2, ROWS).double()

    def losses(x, y, _):
        return Weighted((problem.model(x) - y).square().sum(1), w, 7.0)

    _, g = problem.gradient(lambda: (w * (problem.model(problem.x) - problem.y).square().sum(1)).sum())
    value, _ = problem.gradient(
        lambda: (w * (problem.model(problem.x) - problem.y).square().sum(1)).sum() / 7, radial(g, 0.2)
    )
    opt.step(losses, *problem.batch)
    w.mul_(100)
    torch.testing.assert_close(opt.last_perturbed_loss, value)


@pytest.mark.parametrize("mask", [torch.bool, torch.int64, torch.float32])
def test_weights_may_be_masks_of_any_dtype(backend, mask):
    found = []
    for dtype in (torch.float64, mask):
        problem = Problem()
        problem.w = (problem.w > 0).to(dtype)
        opt = SAM(problem.model.parameters(), torch.optim.SGD, 0.2, lr=0.1, model=problem.model)
        opt.step(problem.losses(torch.tensor(3.0)), *problem.batch)
        found.append(problem.model)
    assert largest_difference(*found) == 0


L, W = torch.ones(3, 2, requires_grad=True), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("given", "error", "needle"),
    [
        (([1.0], W), TypeError, "losses of Weighted must be a tensor"),
        ((L, None), TypeError, "weights of Weighted must be a tensor"),
        ((L, W[:, 0]), ValueError, r"got \[3, 2\] and \[3\]"),
        ((L.sum(), W.sum()), ValueError, r"\[n\] or \[n, ...\], got \[\] and \[\]"),
        ((L, L), ValueError, "require a gradient; pass weights.detach"),
        ((L, W, 0), ValueError, "must be positive, got 0"),
        ((L, W, math.inf), ValueError, "must be positive, got inf"),
        ((L, W, True), TypeError, "must be a number or a 0-dim tensor, got True"),
        ((L, W, torch.ones(1)), TypeError, "must be a number or a 0-dim tensor"),
        ((L, W, torch.tensor(True)), TypeError, "must be a number or a 0-dim tensor"),
        ((L, W, torch.tensor(-2.0)), ValueError, "must be positive, got"),
        ((L, W, torch.tensor(2.0, requires_grad=True)), ValueError, "requires a gradient; pass total.detach"),
    ],
)
def test_bad_arguments_are_named(given, error, needle):
    with pytest.raises(error, match=needle):
        Weighted(*given)


@law(skips=PLAIN | OTHER_WAYS)
@pytest.mark.parametrize("kind", ["rows", "some calls", "some totals", "no gradient", "negative"])
def test_what_cannot_be_weighed_is_refused_and_changes_nothing(cell, kind):
    if kind.startswith("some") and not Training(cell).opt.needs_second_pass:
        pytest.skip("one call alone")
    training, calls = Training(cell), []
    before = training.weights()

    def losses(*batch):
        calls.append(1)
        found = training.losses(*batch)
        if kind == "some calls":
            return Weighted(found, torch.ones_like(found)) if len(calls) % 2 else found
        if kind == "some totals":
            return Weighted(found, torch.ones_like(found), 3.0 if len(calls) % 2 else None)
        if kind == "negative":
            return Weighted(found, torch.arange(len(found)) - 1)
        found = found[:-1] if kind == "rows" else found.detach()
        return Weighted(found, torch.ones_like(found))

    refused = {
        "rows": (TypeError, "Weighted of 13 rows for a batch of 14|Weighted of [0-9]+ rows"),
        "some calls": (TypeError, "in some calls of the step alone"),
        "some totals": (TypeError, "in some calls of the step alone"),
        "no gradient": (RuntimeError, "no gradient"),
        "negative": (ValueError, "must be >= 0, got -1"),
    }
    side_by_side = cell.options.get("execution") == "batched"
    error, needle = (ValueError, "execution='batched' cannot weigh") if side_by_side else refused[kind]
    with pytest.raises(error, match=needle):
        WAYS[cell.way](training.opt, losses, *training.batch)
    assert all(map(torch.equal, training.weights(), before))
    training.opt.zero_grad()
    training.train(1)


def test_shards_side_by_side_name_the_way_out(choose):
    choose("torch")
    problem = Problem()
    opt = MSAM(
        problem.model.parameters(), torch.optim.SGD, num_shards=3, execution="batched", model=problem.model, lr=0.1
    )
    with pytest.raises(ValueError, match=r"fastsam.Weighted; .*execution='sequential'"):
        opt.step(problem.losses(), *problem.batch)


def test_a_language_models_mean_over_tokens(backend):
    """Sequences of other lengths: the step of the token mean, not of the sequences' means."""
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (6, 9))
    lengths = torch.tensor([9, 3, 5, 2, 9, 4])
    labels = ids.masked_fill(torch.arange(9) >= lengths[:, None], -100)

    def net():
        torch.manual_seed(1)
        return nn.Sequential(nn.Embedding(11, 8), nn.Tanh(), nn.Linear(8, 11)).double()

    model, other = net(), net()
    opt = SAM(model.parameters(), torch.optim.AdamW, 0.3, lr=0.1, model=model)
    by_closure = SAM(other.parameters(), torch.optim.AdamW, 0.3, lr=0.1, model=other)

    def losses(ids, labels):
        logits, labels = model(ids)[:, :-1], labels[:, 1:]
        return Weighted(F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"), labels != -100)

    def closure():
        by_closure.zero_grad()
        loss = F.cross_entropy(other(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    for _ in range(4):
        torch.testing.assert_close(opt.step(losses, ids, labels), by_closure.step(closure))
    assert largest_difference(model, other) < 1e-12
