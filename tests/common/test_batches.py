"""What a batch may be made of, and that it is cut with its rows whatever that is, or refused before the first pass."""

import dataclasses
import inspect
from array import array
from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from types import MappingProxyType

import numpy as np
import pytest
import torch
from laws import PLAIN, law
from problems import assert_same, batches, losses_of, mlp, snapshot
from torch.nn.utils.rnn import pack_sequence
from training import Training

from fastsam import ESAM, MSAM, SAM, whole
from fastsam.graph.plain_step import PlainOptimizerStep, as_stepper
from fastsam.two_pass import capture
from fastsam.two_pass.batch import batch_size, split_rows, take_rows

SGD = torch.optim.SGD
Pair = namedtuple("Pair", "a b")
ONE_WAY = {"only step(loss_fn, *batch) takes a batch": lambda cell: cell.way != "loss_fn"}
BATCHED = {"vmap cuts nothing but tensors": lambda cell: cell.subject.variant == "batched"}


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    x: torch.Tensor
    names: list
    scale: float = 1.0


@law(skips=ONE_WAY | BATCHED)
def test_a_nested_batch_is_cut_like_its_tensors(cell):
    """In one structure: what is nested, what has a row in each entry, and what has none."""
    plain, nested = Training(cell), Training(cell)
    edges, rows_seen = torch.arange(5), []

    def losses(batch, names, pair, kept, mode):
        assert kept is edges
        assert mode == "train"
        assert batch.pop("none") is None
        assert type(batch) is defaultdict
        assert batch.default_factory is list
        assert type(batch["rest"]) is UserDict
        assert type(pair) is Pair
        assert type(pair.b) is Example
        ids = torch.tensor([int(name) for name in names])
        assert type(names) is tuple
        assert pair.b.names == [{"name": name} for name in names]
        rows_seen.append(len(ids))
        return nested.losses(batch["x"], torch.from_numpy(batch["rest"]["y"]), ids) * pair.b.scale

    for _ in range(3):
        plain.step()
        x, y, ids = nested.batch
        names = tuple(str(int(i)) for i in ids)
        batch = defaultdict(list, x=x, none=None, rest=UserDict(y=y.numpy()))
        pair = Pair([x, y], Example(x, [{"name": name} for name in names]))
        nested.begin()
        as_stepper(nested.opt).step(losses, batch, names, pair, whole(edges), "train")
        nested.taken += 1
        assert batch.keys() == {"x", "none", "rest"}, "the user's own containers stay as they are"
    assert all(map(torch.equal, plain.weights(), nested.weights()))
    assert rows_seen


@law(skips=ONE_WAY | PLAIN)
def test_a_batch_that_the_loss_changes_in_place_is_refused(cell):
    """Before the next forward of the step, which would see other numbers."""
    training = Training(cell)
    before = {name: t.clone() for name, t in training.model.state_dict().items()}
    x, y, ids = training.batch

    def losses(x, y, ids):
        x.sub_(0.5)
        return training.losses(x, y, ids)

    with pytest.raises(RuntimeError, match=r"changed batch\[0\], a tensor of shape .* in place.*x\.clone\(\)"):
        training.opt.step(losses, x.clone(), y, ids)
    assert all(torch.equal(t, before[name]) for name, t in training.model.state_dict().items())
    training.step()


# what is cut


class Tensors:
    """Like a tensorclass: no mapping, but with rows of its own."""

    def __init__(self, x):
        self.x, self.batch_size = x, x.shape[:1]

    def __getitem__(self, rows):
        return Tensors(self.x[rows])


class Remembering(dict):
    """A dict with an attribute beside its entries, as collate functions make them."""

    def __init__(self, entries, source):
        super().__init__(entries)
        self.source = source


X, TEXTS = torch.arange(6.0).view(3, 2), ["a", "b", "c"]
CUT = {
    "dict": {"x": X},
    "OrderedDict": OrderedDict(x=X, texts=TEXTS),
    "defaultdict": defaultdict(list, x=X),
    "dict with an attribute": Remembering({"x": X}, "a file"),
    "UserDict": UserDict(x=X, texts=TEXTS),
    "read-only mapping": MappingProxyType({"x": X}),
    "named tuple": Pair(X, TEXTS),
    "dataclass": Example(X, TEXTS),
    "nested list": [[X, X[:, 0]], {"x": X}],
    "list of texts": TEXTS,
    "tuple of texts": tuple(TEXTS),
    "list of numbers": [1, 2.0, None],
    "list of pictures": [torch.ones(3, 4), torch.ones(2, 5), torch.ones(1, 1)],
    "list of dicts": [{"boxes": torch.ones(k, 4)} for k in (3, 3, 3)],
    "list of lists": [[1], [2, 3], []],
    "UserList": UserList(TEXTS),
    "deque": deque(TEXTS),
    "range": range(3),
    "array.array": array("d", [1.0, 2.0, 3.0]),
    "NumPy array": np.arange(6).reshape(3, 2),
    "NumPy array of texts": np.array(TEXTS),
    "tensor with a class": torch.nn.Parameter(X),
    "sparse tensor": X.to_sparse(),
    "TensorDict-like": Tensors(X),
    "numbers and the like": {"n": 3, "mode": "train", "none": None, "scale": torch.tensor(2.0), "f": len, "e": []},
    "modules and settings": [X, torch.nn.Linear(1, 1), torch.float16, torch.Size([4, 5])],
    "marked": whole([1, 2]),
}


def rows_of(node):
    """Plain Python values of a part of a batch, to compare."""
    if isinstance(node, Tensors):
        node = node.x
    if isinstance(node, torch.Tensor):
        return node.detach().to_dense().tolist()
    if isinstance(node, np.ndarray):
        return node.tolist()
    if isinstance(node, (dict, UserDict, MappingProxyType)):
        return {key: rows_of(value) for key, value in node.items()}
    if dataclasses.is_dataclass(node):
        return [rows_of(getattr(node, field.name)) for field in dataclasses.fields(node)]
    return list(map(rows_of, node)) if isinstance(node, (list, tuple, UserList, deque, range, array)) else node


@pytest.mark.parametrize("kind", CUT)
def test_whatever_is_cut_is_cut_alike(kind):
    """Split into rows, or taken row by row: one and the same, of the same class, and the original stays as it is."""
    part, before = CUT[kind], rows_of(CUT[kind])
    _, *pieces = zip(*split_rows((torch.arange(3), part), [1, 2]), strict=True)
    taken = [take_rows((torch.arange(3), part), rows)[1] for rows in (torch.tensor([0]), torch.tensor([1, 2]))]
    assert [rows_of(piece) for piece in pieces[0]] == [rows_of(piece) for piece in taken]
    assert rows_of(part) == before
    if kind not in ("range", "array.array", "tensor with a class", "marked"):
        assert {type(piece) for piece in (*pieces[0], *taken)} == {type(part)}
    assert getattr(taken[0], "source", None) == getattr(part, "source", None)


def test_which_rows_the_pieces_have():
    batch = (X, TEXTS, np.arange(3), [X, X + 1], [torch.ones(3, 4), torch.ones(2, 5), torch.ones(1, 1)], whole(TEXTS))
    x, texts, numbers, nested, pictures, kept = take_rows(batch, torch.tensor([2, 0]))
    assert torch.equal(x, X[[2, 0]])
    assert texts == ["c", "a"]
    assert numbers.tolist() == [2, 0]
    assert torch.equal(nested[1], X[[2, 0]] + 1)
    assert [p.shape[0] for p in pictures] == [1, 3]
    assert kept == TEXTS
    assert isinstance(split_rows(batch, [3])[0][0], torch.Tensor)
    assert split_rows(batch, [2, 1])[1][1] == ["c"]


@pytest.mark.parametrize(
    ("batch", "n"),
    [
        ((X,), 3),
        (([X, X[:, 0]],), 3),
        (([torch.ones(2, 3), torch.ones(2)],), 2),
        (([torch.ones(2, 3), torch.ones(2)], [5, 6]), 2),
        ((TEXTS, [1, 2, 3]), 3),
        (([torch.ones(3, 5), torch.ones(3, 6)], [{"boxes": torch.ones(2, 4)}, {"boxes": torch.ones(5, 4)}]), 2),
        ((whole(torch.ones(5)), X), 3),
        (({"ids": [1, 2, 3], "x": X},), 3),
    ],
)
def test_how_many_rows_a_batch_has(batch, n):
    assert batch_size(batch) == n


class Graph:
    x = torch.ones(3, 2)


class Broken(dict):
    def __init__(self, path, *, size):
        super().__init__(x=X)

    def __setitem__(self, key, value):
        raise TypeError("read only")


REFUSED = {
    "a list of another length": (
        TypeError,
        r"batch\[1\] is a list of length 2, which cannot be cut .* 3 rows",
        ["a", "b"],
    ),
    "a list in a dict": (TypeError, r"batch\[1\]\['names'\] is a list of length 1", {"names": ["a"]}),
    "a list in a dataclass": (TypeError, r"batch\[1\].names is a list of length 1", Example(X, ["a"])),
    "an object": (TypeError, r"batch\[1\] is a Graph, which cannot be cut", Graph()),
    "a set": (TypeError, r"batch\[1\] is a set", {1, 2, 3}),
    "a generator": (TypeError, r"batch\[1\] is a generator", (i for i in range(3))),
    "packed": (TypeError, r"batch\[1\] is a PackedSequence", pack_sequence([torch.ones(2), torch.ones(1)])),
    "a nested tensor": (
        TypeError,
        r"batch\[1\] is a NestedTensor of layout",
        lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2), torch.ones(2)], layout=torch.jagged),
    ),
    "compressed rows": (TypeError, r"batch\[1\] is a Tensor of layout torch.sparse_csr", lambda: X.to_sparse_csr()),
    "a tensor of another size": (ValueError, r"different leading sizes \[3, 2\]", X[:2]),
    "an array of another size": (ValueError, r"different leading sizes \[3, 2\]", np.ones(2)),
    "a tensor in a list": (
        ValueError,
        r"batch\[1\]\[1\] and the batch have different leading sizes \[2, 3\]",
        [X, X[:2]],
    ),
    "tensors that could be samples": (
        ValueError,
        r"batch\[1\] is a list of 3 tensors that have 3 rows each",
        [torch.ones(3, 4)] * 3,
    ),
    "a mapping that cannot be made": (TypeError, r"batch\[1\] is a Broken which another one", Broken("", size=1)),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_cut_is_refused_before_the_first_pass(kind):
    """By every method alike, with what to do; and `whole` is what to do."""
    error, needle, part = REFUSED[kind]
    part = part() if inspect.isfunction(part) else part
    for cls, options in ((SAM, {}), (ESAM, {"beta": 1.0}), (MSAM, {"num_shards": 2}), (None, {})):
        model = torch.nn.Linear(2, 1)
        opt = SGD(model.parameters(), lr=0.1) if cls is None else cls(model.parameters(), SGD, lr=0.1, **options)
        stepper, before, calls = PlainOptimizerStep(opt) if cls is None else opt, snapshot(model), []

        def losses(x, part, model=model, calls=calls):
            calls.append(part)
            return model(x).squeeze(1)

        with pytest.raises(error, match=needle) as caught:
            stepper.step(losses, X, part)
        assert not calls
        assert all(word in str(caught.value) for word in ("fastsam.whole(x)", "opt.step(closure)", "opt.ascent()"))
        assert_same(model, before)
        stepper.step(losses, X, whole(part))
        assert all(seen is part for seen in calls)


def test_what_the_loss_takes_out_of_a_container_is_there_in_the_next_pass():
    model = mlp()
    x, y = batches(1)[0]
    batch = {"x": x, "labels": y, "texts": ["a"] * len(x)}

    def losses(batch):
        batch["texts"].clear()
        return losses_of(model)(batch.pop("x") * 1, batch.pop("labels"))

    for cls, options in ((SAM, {}), (ESAM, {"beta": 1.0}), (MSAM, {"num_shards": 2})):
        cls(model.parameters(), SGD, lr=0.1, **options).step(losses, batch)
    assert batch.keys() == {"x", "labels", "texts"}
    assert len(batch["texts"]) == len(x)


def test_rows_of_lists_are_not_taken_in_a_capture(monkeypatch):
    """Which rows they are is known on the device; tensors alone follow it there."""
    monkeypatch.setattr(capture, "current", lambda: capture.Capture())
    assert torch.equal(take_rows((X, whole(TEXTS)), torch.tensor([1]))[0], X[1:2])
    assert split_rows((X, TEXTS), [1, 2])[0][1] == ["a"]
    with pytest.raises(RuntimeError, match="the batch has parts that are no tensors"):
        take_rows((X, TEXTS), torch.tensor([1]))


def test_inference_tensors_and_changes_before_the_step_are_no_changes_in_place():
    model = mlp()
    x, y = batches(1)[0]
    with torch.inference_mode():
        inferred = x.clone()
    x.mul_(1)
    opt = SAM(model.parameters(), SGD, lr=0.1)
    opt.step(lambda x, inferred, y: losses_of(model)(x + inferred.clone(), y), x, inferred, y)
    x.mul_(1)
    opt.step(losses_of(model), x, y)
