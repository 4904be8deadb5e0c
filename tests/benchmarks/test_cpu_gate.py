"""The CPU gate goes red for what makes a step slower, and does not mistake noise for that."""

import os
import subprocess
import sys
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(ROOT)
    import slowed_gate

    from benchmarks.__main__ import main
    from benchmarks.gates import cpu as cpu_gate
    from benchmarks.gates.cpu import Ratio, measure


def gate(arguments):
    return main(["gate", "cpu", *arguments])


def bytes_of(base, monkeypatch, capsys):
    """Run the gate on one base optimizer's bytes; return its exit status and the last words of the row."""
    monkeypatch.setattr(cpu_gate, "RATIOS", {})
    monkeypatch.setattr(cpu_gate, "BYTES", {base: cpu_gate.BYTES[base]})
    status = gate([])
    return status, " ".join(capsys.readouterr().out.split()[-2:])


@pytest.mark.parametrize(("base", "row"), [("sgd", "68.20 ok"), ("adamw", "76.20 ok")])
def test_bytes_are_within_their_bounds(base, row, monkeypatch, capsys):
    assert bytes_of(base, monkeypatch, capsys) == (0, row)


def test_one_extra_pass_over_memory_turns_the_bytes_red(monkeypatch, capsys):
    monkeypatch.setattr(*slowed_gate.temporaries(1))
    assert bytes_of("sgd", monkeypatch, capsys) == (1, "TOO MUCH")


@pytest.mark.parametrize(
    ("plant", "count", "ratio", "rounds"),
    [
        # as long again as all of eager SAM
        ("temporaries", 60, "optimizer side, sgd: SAM / eager SAM", 1),
        ("temporaries", 30, "host, sgd: SAM / eager SAM", 1),
        ("second_passes", 3, "whole step: SAM / sgd", 2),
    ],
)
def test_what_takes_longer_turns_the_time_red(plant, count, ratio, rounds):
    found = subprocess.run(
        [sys.executable, slowed_gate.__file__, plant, str(count), ratio, "--rounds", str(rounds)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (found.returncode, found.stderr) == (1, "")
    assert next(row for row in found.stdout.splitlines() if row.startswith(ratio)).endswith("TOO MUCH")


def test_what_operations_touch_is_counted():
    x, y = torch.zeros(8), torch.zeros(8)
    with cpu_gate.Traffic(cache=0) as traffic:
        x.view(2, 4).split(1)  # views touch nothing
        assert traffic.bytes == 0
        x + y  # reads two, writes one
        assert traffic.bytes == 4 * 32
        torch._foreach_add_([x], [y], alpha=2.0)
        assert traffic.bytes == (4 + 3) * 32


def test_what_is_at_hand_counts_nothing():
    x, y = torch.zeros(8), torch.zeros(16)
    with cpu_gate.Traffic(cache=64) as traffic:
        x.neg_()
        assert traffic.bytes == 2 * 32
        x[:4].neg_()
        x.neg_()
        assert traffic.bytes == 2 * 32
        y.neg_()  # as much as there is room for
        assert traffic.bytes == 2 * 32 + 2 * 64
        x.neg_()
        assert traffic.bytes == 4 * 32 + 2 * 64


def clock(monkeypatch, over, under):
    """Let the arms take these times, round after round."""
    times = {"over": iter(over), "under": iter(under)}
    monkeypatch.setattr(cpu_gate, "cpu_time", lambda arm: next(times[arm()]))
    return Ratio(lambda: "over", lambda: "under", bound=2.0)


def test_the_median_of_the_rounds_ratios_counts(monkeypatch):
    # 1.1, 3 and 1.5: the lucky round of the second arm decides as little as the unlucky one of the first
    ratio = clock(monkeypatch, [8.8, 9.0, 9.0], [8.0, 3.0, 6.0])
    assert measure(ratio, rounds=3) == 1.5


def test_a_red_verdict_is_measured_again(monkeypatch):
    ratio = clock(monkeypatch, chain([9.0, 9.0], repeat(3.0)), repeat(2.0))
    assert measure(ratio, rounds=2) == 1.5


def test_what_is_slow_stays_red(monkeypatch):
    ratio = clock(monkeypatch, repeat(6.0), repeat(2.0))
    assert measure(ratio, rounds=2) == 3.0


@pytest.mark.parametrize(("bound", "status", "verdict"), [(2.0, 0, "ok"), (1.0, 1, "TOO MUCH")])
def test_table_and_status_follow_the_bound(monkeypatch, capsys, bound, status, verdict):
    ratio = clock(monkeypatch, repeat(3.0), repeat(2.0))._replace(bound=bound)
    monkeypatch.setattr(cpu_gate, "RATIOS", {"some ratio": lambda: ratio})
    monkeypatch.setattr(cpu_gate, "BYTES", {})
    assert gate([]) == status
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == ["some", "ratio", "1.500", f"{bound:.2f}", *verdict.split()]


def test_no_rounds_are_refused(capsys):
    assert gate(["--rounds", "0"]) == 2
    assert "Invalid value for '--rounds': 0 is not in the range x>=1." in capsys.readouterr().err
