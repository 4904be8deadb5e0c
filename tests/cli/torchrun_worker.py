"""One rank's side of test_torchrun.py: trains every method on digits, and one run that is interrupted and resumed."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
from test_training import Stop, assert_equal, config, numbers, state

from fastsam.__main__ import main
from fastsam.cli import processes
from fastsam.cli.config import options_of
from fastsam.cli.training import train
from fastsam.methods import METHODS

STEPS = 20  # in an epoch of 628 pictures for each process


def every_method(folder):
    for method in METHODS:
        line = ["train", "--method", method, "--epochs", "2", "--out", str(folder / method), "--seed", "3"]
        assert main(line) == 0, method


def resumed_bit_for_bit(folder):
    """With SAF, of which every process keeps a part of its own."""
    options = {**options_of("saf"), "lag": 1, "start_epoch": 1}
    wanted = config("saf", model="cnn", epochs=4, ranks=2, options=options)
    through, broken = folder / "through", folder / "broken"
    if processes.is_first():
        through.mkdir()
        broken.mkdir()
    processes.wait()
    expected = train(wanted, through)
    with pytest.raises(KeyboardInterrupt):
        train(wanted, broken, watcher=Stop(after=2 * STEPS + STEPS // 2))
    processes.wait()
    assert numbers(train(wanted, broken, resume=True)) == numbers(expected)
    processes.wait()
    assert_equal(state(broken), state(through))
    assert len(state(through)["of each process"]) == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*barrier.*device")
    with processes.together("cpu"):
        every_method(Path(sys.argv[1]))
        resumed_bit_for_bit(Path(sys.argv[1]))
