"""Two processes with DistributedDataParallel in each framework, beside one process in plain torch."""

import copy
import functools
import socket

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("transformers")

import on_ranks
from by_hand import METHODS, SGD, ByHand
from on_ranks import DATA, WORLD, clip_of
from problems import losses_of, mlp
from ranks import Ranks
from texts import ROWS, continued, gpt2, stacked

# one worker runs them all, or each would start processes of its own
pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def ranks():
    with Ranks(WORLD) as processes:
        yield processes


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(ranks, function, name, expected, **arguments):
    errors = ranks.call(function, name=name, expected=expected, port=free_port(), **arguments)
    told = [f"rank {rank}: {error or 'passed'}" for rank, error in errors.items()]
    assert not any(errors.values()), "\n".join(told)


class OnRanks:
    """A step of both ranks by hand: one perturbation of all rows; of mSAM each rank's shards; of ESAM each rank's rows.

    Args:
        name: of the method.
        model: a copy of the one that is trained.
        losses: function of the model that returns a function of a batch.
    """

    def __init__(self, name, model, losses):
        options = dict(METHODS[name][1])
        if name == "msam":
            options["num_shards"] *= WORLD
        self.name, self.loop = name, ByHand(name, model, losses(model), torch.optim.SGD, options, **SGD)

    def gradient(self, *batch, tokens=None):
        if self.name != "esam":
            return self.loop.gradient(*batch)
        return esam_on_ranks(self.loop, batch, tokens)


def esam_on_ranks(loop, batch, tokens=None):
    """ESAM's oracle, each half of whose rows selects among its own, and counts by the tokens of all its rows."""
    from methods import Step, philox

    step = Step(loop.model, loop.losses, batch, loop.options, loop.perturbations, {})
    o, half = loop.options, step.n // WORLD
    tokens = torch.ones(step.n) if tokens is None else tokens
    words = philox.first_words(len(step.params), step.t, o["seed"])
    first, g = step.look()
    mg = [g_n * (word < philox.threshold(o["beta"])) for g_n, word in zip(g, words, strict=True)]
    norm = sum((v**2).sum() for v in mg).sqrt() + 1e-12
    eps = [o["rho"] / o["beta"] * v / norm for v in mg]
    delta = step.look(eps)[0] - first
    loop.perturbations += 1
    parts = []
    for start in (0, half):
        rows = delta[start : start + half].argsort(descending=True)[: half // 2] + start
        share = tokens[start : start + half].sum() / tokens[rows].sum() * len(rows) / step.n
        parts.append([g_n * share for g_n in step.look(eps, rows=rows)[1]])
    return [sum(pair) for pair in zip(*parts, strict=True)]


def of_step(both, batches, t):
    """The gradients of a step's batches. LookSAM looks in every second step, and adds up what they find there."""
    loop, gradients, found = both.loop, [], []
    for batch in batches:
        if both.name == "looksam":
            loop.perturbations = t
        gradients.append(both.gradient(*batch))
        found.append(loop.memory.get("g_v"))
    if both.name == "looksam" and t % 2 == 0:
        loop.memory["g_v"] = [sum(parts) for parts in zip(*found, strict=True)]
    return gradients


@functools.cache
def expected_of(name, accumulated):
    both = OnRanks(name, mlp(torch.float32), losses_of)
    for i in range(0, len(DATA), accumulated):
        gradients = of_step(both, DATA[i : i + accumulated], i // accumulated)
        both.loop.step(*([g / accumulated for g in part] for part in gradients), clip=clip_of(accumulated))
    return [p.detach().clone() for p in both.loop.model.parameters()]


MANUAL = {"accelerate": on_ranks.by_accelerate, "fabric": on_ranks.by_fabric, "lightning": on_ranks.by_lightning}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("name", ["sam", "esam", "msam"])
@pytest.mark.parametrize("framework", MANUAL)
def test_loops_with_a_backward_of_the_frameworks(ranks, framework, name, accumulated):
    run(ranks, MANUAL[framework], name, expected_of(name, accumulated), accumulated=accumulated)


@pytest.mark.parametrize("name", ["gsam", "looksam"])
def test_accelerate_reduces_each_batch_of_methods_that_combine(ranks, name):
    expected = expected_of(name, 2)
    run(ranks, on_ranks.by_accelerate, name, expected, accumulated=2, reduces_each_batch=True)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_lightnings_automatic_optimization(ranks, accumulated):
    run(ranks, on_ranks.by_lightning, "sam", expected_of("sam", accumulated), accumulated=accumulated, automatic=True)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("name", ["sam", "esam", "msam", "gsam"])
def test_hugging_faces_trainer(ranks, name, accumulated):
    """A language model, whose ranks have unequal numbers of tokens, each of which counts the same."""
    from test_trainer import token_sums, tokens_of

    model, data = gpt2(), continued(4)
    both = OnRanks("sam" if name == "msam" else name, copy.deepcopy(model), token_sums)
    for i in range(0, 4, accumulated):
        start = i * ROWS
        batches = [stacked(data, start + k * ROWS) for k in range(accumulated)]
        total = sum(tokens_of(y) for _, y in batches)
        if name == "msam":
            # of each rank's four rows, in three shards
            shards = ((0, 2), (2, 3), (3, 4), (4, 6), (6, 7), (7, 8))
            batches = [tuple(t[a:b] for t in batch) for batch in batches for a, b in shards]
        gradients = []
        for x, y in batches:
            counted = (y[:, 1:] != -100).sum(1)
            gradients.append([g * len(x) / total for g in both.gradient(x, y, tokens=counted)])
        both.loop.step(*gradients, clip=clip_of(accumulated))
    expected = [p.detach().clone() for p in both.loop.model.parameters()]
    # GSAM combines the gradients of both passes of every batch
    run(ranks, on_ranks.by_trainer, name, expected, accumulated=accumulated, reduces_each_batch=name == "gsam")
