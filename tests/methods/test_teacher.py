"""MESA's teacher: which models have one, which tensors it averages, and what it takes for an answer."""

import threading
from types import SimpleNamespace

import pytest
import torch
from problems import assert_same, batches, mlp, snapshot
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastsam import MESA
from fastsam import mesa as mesa_module

X, Y = batches(1)[0]


def moved(model, by=1.0):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by)


def normed():
    """A layer whose weight and bias have one shape."""
    return nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3)).double()


SURGERY = {
    "head added": lambda model: model.append(nn.Linear(3, 3).double()),
    "head replaced": lambda model: model.__setitem__(0, nn.Linear(7, 3).double()),
    "layer removed": lambda model: model.pop(1),
    "pruned": lambda model: prune.random_unstructured(model[0], "weight", 0.5),
    "parametrized": lambda model: nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity()),
    "weight norm": lambda model: parametrizations.weight_norm(model[0]),
}


@pytest.mark.parametrize("surgery", SURGERY)
def test_a_model_that_has_changed_is_refused_before_anything_moves(surgery):
    model = normed()
    mesa = MESA(model, decay=0.5)
    before = snapshot(mesa.teacher)
    SURGERY[surgery](model)
    moved(model)
    with pytest.raises(RuntimeError, match=r"no longer has the teacher's parameters: .*Build MESA after the change"):
        mesa.update()
    assert_same(mesa.teacher, before)


def test_tensors_are_paired_by_name_whatever_their_order():
    model = normed()
    mesa = MESA(model, decay=0.5)
    before = snapshot(mesa.teacher)
    layer = model[1]
    layer._parameters["weight"] = layer._parameters.pop("weight")
    moved(model)
    mesa.update()
    assert_same(mesa.teacher, {name: t + 0.5 for name, t in before.items()})


def test_weights_that_are_no_longer_tied_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    mesa = MESA(model)
    model[1].weight = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(RuntimeError, match="no longer tied"):
        mesa.update()


def test_buffers_that_forwards_make_reach_the_teacher_as_copies():
    model = normed()
    mesa = MESA(model, decay=0.5)
    for size in (2, 5):
        model[1].register_buffer("cache", torch.full((size,), float(size)))
        mesa.update()
        assert mesa.teacher[1].cache.tolist() == [size] * size
        assert mesa.teacher[1].cache is not model[1].cache


class Locked(nn.Module):
    """Not to be deep-copied."""

    def __init__(self):
        super().__init__()
        self.inside, self.lock = mlp(batchnorm=True), threading.Lock()

    def forward(self, x):
        return self.inside(x)


def test_a_teacher_for_a_model_that_cannot_be_copied():
    model, teacher = Locked(), Locked()
    with pytest.raises(TypeError, match=r"Locked cannot be deep-copied \(.*pass it as teacher="):
        MESA(model)
    moved(model)
    mesa = MESA(model, teacher=teacher, decay=0.5, start_epoch=0)
    assert mesa.teacher is teacher
    assert_same(teacher, snapshot(model))
    assert not any(p.requires_grad for p in teacher.parameters())
    before = snapshot(model)
    moved(model)
    mesa.update()
    assert_same(
        teacher.inside[0], {name: (before[f"inside.0.{name}"] + t) / 2 for name, t in snapshot(model.inside[0]).items()}
    )
    with pytest.raises(ValueError, match="teacher shares tensors with the model"):
        MESA(model, teacher=model)
    with pytest.raises(ValueError, match="teacher is another kind of model"):
        MESA(model, teacher=mlp())
    with pytest.raises(TypeError, match=r"teacher must be a torch\.nn\.Module, got str"):
        MESA(model, teacher="t")


ANSWERS = {
    "tensor": (lambda z: z, None),
    "attribute": (lambda z: SimpleNamespace(logits=z), None),
    "dict": (lambda z: {"loss": z.sum(), "logits": z}, None),
    "key": (lambda z: {"loss": z.sum(), "out": z}, "out"),
    "named": (lambda z: SimpleNamespace(aux=None, out=z), "out"),
    "tuple": (lambda z: (z.sum(), z), 1),
    "list": (lambda z: [z, z.sum()], 0),
    "function": (lambda z: {"heads": [z.sum(), z]}, lambda answer: answer["heads"][1]),
}


class Answering(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.inside, self.answer = mlp(), answer

    def forward(self, x):
        return self.answer(self.inside(x))


@pytest.mark.parametrize("kind", ANSWERS)
def test_what_a_model_may_return(kind):
    answer, output = ANSWERS[kind]
    model = Answering(answer)
    mesa, plain = MESA(model, start_epoch=0, output=output), MESA(model.inside, start_epoch=0)
    moved(model, 0.1)
    z = model.inside(X)
    assert torch.equal(mesa(z, Y, X), plain(z, Y, X))


@pytest.mark.parametrize(
    ("kind", "output", "message"),
    [
        ("tuple", None, "the model returns tuple, of which MESA needs the logits: pass output="),
        ("key", None, "the model returns dict, of which"),
        ("key", "logit", "output='logit' picks nothing out of the dict that the model returns"),
        ("tuple", 2, "output=2 picks nothing out of the tuple"),
        ("dict", lambda answer: 3, "pass output="),
    ],
)
def test_an_answer_without_logits_is_refused(kind, output, message):
    mesa = MESA(Answering(ANSWERS[kind][0]), start_epoch=0, output=output)
    with pytest.raises(TypeError, match=message):
        mesa(mlp()(X), Y, X)


def test_output_is_checked_at_once():
    with pytest.raises(TypeError, match=r"output must be a key, an index or a function, got 0\.5"):
        MESA(mlp(), output=0.5)


def test_teachers_share_one_stream_for_each_device(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or object())
    mesa_module._stream_of_teachers.cache_clear()
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    streams = [mesa_module._stream_of_teachers(device) for device in (first, second, first, second)]
    mesa_module._stream_of_teachers.cache_clear()
    assert made == [first, second]
    assert streams[0] is streams[2]
    assert streams[0] is not streams[1]
