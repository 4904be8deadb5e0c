"""What all benchmarks share, and the one command by which they are run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastsam.cli.errors import InputError
from fastsam.methods import METHODS

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(ROOT)
    from benchmarks import FORMER, harness
    from benchmarks.__main__ import COMMANDS, main
    from benchmarks.arms.ours import ARMS, RECORDED_AS
    from benchmarks.gates.count import CASES


def command_of(words):
    """The command that these words after `python -m benchmarks` name, or None."""
    found = COMMANDS
    for word in words.split():
        found = found.get_command(None, word)
    return found


@pytest.mark.parametrize("command", sorted(set(FORMER.values())))
def test_what_former_names_say_is_there(command):
    assert command_of(command) is not None


@pytest.mark.parametrize("name", ["benchmarks.step", "benchmarks.kernels", "benchmarks.gates.count"])
def test_a_former_name_says_the_new_one(name):
    done = subprocess.run([sys.executable, "-m", name, "--rounds", "3"], cwd=ROOT, capture_output=True, text=True)
    said = f"{name} is now: python -m benchmarks {FORMER[name]}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == main(["gate", "--help"]) == 0
    printed = capsys.readouterr().out
    for name in ("steps", "msam-curve", "overlap", "kernels", "gate", "readme", "static", "count", "cpu", "gpu"):
        assert f"\n  {name} " in printed


def test_an_unknown_command_is_refused(capsys):
    assert main(["step"]) == 2
    assert "No such command 'step'" in capsys.readouterr().err


def test_every_method_and_variant_is_an_arm_and_is_counted():
    for row, method in METHODS.items():
        for variant in method.variants:
            name = row if variant == "default" else f"{row}, {variant}"
            assert name in CASES
            if method.kind != "base":
                assert RECORDED_AS.get(name, name) in ARMS


def test_arms_take_turns_in_an_order_that_changes():
    taken = []
    arms = {name: lambda name=name: taken.append(name) or len(taken) for name in "abc"}
    samples = harness.interleaved(arms, 20)
    rounds = [tuple(taken[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 3
    for name, values in samples.items():
        assert values == [i + 1 for i, each in enumerate(taken) if each == name]
    again, first = taken.copy(), taken[:60]
    harness.interleaved(arms, 20)
    assert taken[60:] == first == again  # every process of a group takes the same order


def test_ratios_are_those_within_a_round():
    # the machine is three times as slow in the second round
    assert harness.over([2.0, 6.0, 2.2], [1.0, 3.0, 1.0]) == 2.0
    assert harness.noise([1.1, 3.0, 0.9], [1.0, 3.0, 1.0]) == [0.9, 1.1]
    assert harness.noise([1.2, 1.1], [1.0, 1.0]) == [1.0, 1.2]


def test_a_record_is_whole_or_none(tmp_path):
    path = tmp_path / "new" / "record.json"
    harness.write_record(path, {"rows": [1]})
    with pytest.raises(TypeError):
        harness.write_record(path, {"rows": object()})
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]
    with pytest.raises(InputError, match="cannot write"):
        harness.write_record(path / "below_a_file.json", {})
