"""`fastsam train --resume` on a checkpoint that is not what was written: exit code 2 and one line, no traceback."""

import random

import pytest
import torch

from fastsam.__main__ import main
from fastsam.cli.errors import InputError
from fastsam.cli.files import CHECKPOINT, read_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    arguments = ["--model", "mlp", "--data", "fake:40x1x4x4", "--batch-size", "20", "--epochs", "1", "--method", "saf"]
    assert main(["train", *arguments, "--out", str(out)]) == 0
    return out


def alike(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    return all(map(alike, a, b)) if isinstance(a, (list, tuple)) else a == b or a != a


def test_flips_and_cuts_are_refused_or_touch_nothing(run):
    path, draw = run / CHECKPOINT, random.Random(0)
    whole, expected = path.read_bytes(), read_checkpoint(path)
    refused = []
    for _ in range(50):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        for damaged in (bytes(flipped), whole[: draw.randrange(len(whole))]):
            path.write_bytes(damaged)
            try:
                found = read_checkpoint(path)
            except InputError as error:
                refused.append(str(error))
            else:
                assert alike(found, expected)  # a flip in the space between the parts
    path.write_bytes(whole)
    assert len(refused) > 60
    assert all(str(path) in message for message in refused)


def changed(part, value):
    def change(checkpoint):
        *inner, last = part
        for key in inner:
            checkpoint = checkpoint[key]
        if value is None:
            del checkpoint[last]
        else:
            checkpoint[last] = value

    return change


ALTERED = {
    "a config that is a list": changed(("config",), [1]),
    "another model": changed(("config", "model"), "none"),
    "a rate that is a word": changed(("config", "options"), {"lr": "fast"}),
    "no weights": changed(("model",), {}),
    "weights of another shape": changed(("model", "1.weight"), torch.zeros(3)),
    "no groups": changed(("optimizer", "param_groups"), []),
    "no state of the optimizer": changed(("optimizer", "state"), None),
    "a history that is a number": changed(("history",), 3),
    "an epoch without a number": changed(("history", 0, "epoch"), None),
    "no process": changed(("of each process",), []),
    "no random state": changed(("of each process", 0, "random"), None),
    "a random state that is none": changed(("of each process", 0, "random", "torch"), torch.zeros(3)),
    "records of another size": changed(
        ("of each process", 0, "criterion", "saf._extra_state", "history"), {"tags": torch.ones(2)}
    ),
}


@pytest.mark.parametrize("what", ALTERED)
def test_an_altered_checkpoint_is_one_line(run, what, capsys):
    path = run / CHECKPOINT
    whole = path.read_bytes()
    checkpoint = read_checkpoint(path)
    ALTERED[what](checkpoint)
    torch.save(checkpoint, path)
    try:
        assert main(["train", "--resume", "--out", str(run)]) == 2
    finally:
        path.write_bytes(whole)
    said = capsys.readouterr().err
    assert said.startswith("fastsam: ")
    assert said.count("\n") == 1
    assert str(path) in said
