"""The CPU gate goes red for what makes a step slower, and does not mistake noise for that."""

from itertools import chain, repeat
from pathlib import Path

import pytest
import torch

from fastsam.kernels import reference
from fastsam.two_pass import TwoPassOptimizer

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks" / "cpu_gate.py").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(ROOT)
    from benchmarks import cpu_gate
    from benchmarks.cpu_gate import Ratio, measure


@pytest.fixture
def slow_perturb(monkeypatch):
    """Lets perturb_ first make some temporaries of the weights' size."""
    perturb_ = reference.perturb_

    def plant(temporaries):
        def slower(weights, *args):
            for _ in range(temporaries):
                torch._foreach_add([w.detach() for w in weights], 0)
            perturb_(weights, *args)

        monkeypatch.setattr(reference, "perturb_", slower)

    return plant


def run(monkeypatch, capsys, ratios, bytes_of, *arguments):
    """Run a part of the gate; return its exit status and the last words of its rows."""
    monkeypatch.setattr(cpu_gate, "RATIOS", {name: cpu_gate.RATIOS[name] for name in ratios})
    monkeypatch.setattr(cpu_gate, "BYTES", {base: cpu_gate.BYTES[base] for base in bytes_of})
    status = cpu_gate.main(list(arguments))
    return status, [" ".join(row.split()[-2:]) for row in capsys.readouterr().out.splitlines()[1:]]


def test_bytes_are_within_their_bounds(monkeypatch, capsys):
    assert run(monkeypatch, capsys, [], ["sgd", "adamw"]) == (0, ["68.10 ok", "76.10 ok"])


def test_one_extra_pass_over_memory_turns_the_bytes_red(slow_perturb, monkeypatch, capsys):
    slow_perturb(temporaries=1)
    assert run(monkeypatch, capsys, [], ["sgd"]) == (1, ["TOO MUCH"])


def test_extra_passes_over_memory_turn_the_time_red(slow_perturb, monkeypatch, capsys):
    slow_perturb(temporaries=6)
    ratio = "optimizer side, sgd: SAM / eager SAM"
    assert run(monkeypatch, capsys, [ratio], [], "--rounds", "3") == (1, ["TOO MUCH"])


def test_a_second_pass_run_twice_turns_it_red(monkeypatch, capsys):
    second_pass = TwoPassOptimizer._second_pass

    def slower(*args):
        second_pass(*args)
        second_pass(*args)

    monkeypatch.setattr(TwoPassOptimizer, "_second_pass", slower)
    assert run(monkeypatch, capsys, ["whole step: SAM / sgd"], [], "--rounds", "5") == (1, ["TOO MUCH"])


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


def test_the_fastest_round_of_each_arm_counts(monkeypatch):
    ratio = clock(monkeypatch, [9.0, 3.0, 5.0], [8.0, 7.0, 2.0])
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
    assert cpu_gate.main([]) == status
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == ["some", "ratio", "1.500", f"{bound:.2f}", *verdict.split()]


def test_no_rounds_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cpu_gate.main(["--rounds", "0"])
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err
