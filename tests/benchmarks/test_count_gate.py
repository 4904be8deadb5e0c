"""The count gate passes on what is committed, keeps its promises, and goes red for what a step does more than that."""

import json
from pathlib import Path

import pytest

from fastsam import SAM
from fastsam.kernels import ops, reference

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
kernels = ops._triton_backend()
if kernels is None or not kernels.INTERPRETED:
    pytest.skip("needs Triton's interpreter", allow_module_level=True)
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(ROOT)
    from benchmarks.gates import count as count_gate

RECORD = json.loads(count_gate.RECORD.read_text())


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the gate for one method; return its exit status and what it found."""

    def run(name, renew=False):
        monkeypatch.setattr(count_gate, "CASES", {name: count_gate.CASES[name]})
        status = count_gate.run(renew)
        return status, [line for line in capsys.readouterr().out.splitlines() if line.startswith(("MORE", "FEWER"))]

    return run


@pytest.fixture
def plant(monkeypatch):
    """Let something happen ahead of every call of a function."""

    def plant(owner, name, extra):
        function = getattr(owner, name)

        def slower(*args, **kwargs):
            extra(*args, **kwargs)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, slower)

    return plant


@pytest.mark.parametrize("name", count_gate.CASES)
def test_every_method_does_what_is_recorded(run, name):
    assert run(name) == (0, [])


def test_the_record_holds_every_method_and_no_other():
    assert list(RECORD) == list(count_gate.CASES)


def total(name, kind):
    return sum(RECORD[name][kind].values())


def test_launches_are_as_few_as_promised():
    of_buffers = 4  # in a step of a model that has any, however many
    for name in ("sam", "sam, adamw", "asam"):
        assert total(name, "launches") == 5 + of_buffers
        assert RECORD[name]["launches"]["_restore_kernel"] == of_buffers
    for name in ("sam, no check", "sam, scaler"):
        assert total(name, "launches") == 4 + of_buffers
    assert total("sam, contexts", "launches") == 6 + of_buffers
    assert RECORD["saf"]["launches"] == {"_trajectory_loss_kernel": 1}
    assert RECORD["mesa"]["launches"] == {"_ema_kernel": 1, "_trajectory_loss_kernel": 1}
    assert RECORD["esam"]["launches"]["_select_kernel"] == 1
    assert total("sgd", "launches") == 0


@pytest.mark.parametrize("kind", ["reads", "twin reads"])
def test_nothing_is_read_but_where_it_is_said(kind):
    assert {name for name in RECORD if total(name, kind)} == set(count_gate.READS)


def test_one_extra_launch_turns_it_red(run, plant):
    plant(kernels, "found_nonfinite", kernels.found_nonfinite)
    assert run("sam") == (1, ["MORE sam: launches: _nonfinite_kernel 1 -> 2"])


def test_one_host_read_turns_it_red(run, plant):
    plant(kernels, "perturb_", lambda launches, backup, norm, *args: norm.item())
    assert run("sam") == (1, ["MORE sam: reads: _local_scalar_dense 0 -> 1"])


def test_one_host_read_of_the_twin_turns_it_red(run, plant):
    plant(reference, "perturb_", lambda weights, grads, backup, norm, *args: norm.item())
    assert run("sam") == (1, ["MORE sam: twin reads: _local_scalar_dense 0 -> 1"])


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda w: w.tolist(), "tolist"),
        (lambda w: w.cpu(), "cpu"),
        (lambda w: bool((w == 0).all()), "_local_scalar_dense"),
        (lambda w: w.nonzero(), "nonzero"),
        (lambda w: w[w > 0], "index"),
        (lambda w: w.equal(w), "equal"),
    ],
)
def test_reads_of_all_kinds_are_seen_inside_passes_too(plant, read, name):
    plant(count_gate.nn.Linear, "forward", lambda layer, x: read(layer.weight.detach()))
    counts = count_gate.count_step(count_gate.CASES["sgd"], "triton")
    assert counts.reads == {name: 1}
    assert counts.operations == RECORD["sgd"]["operations"]


def test_a_copy_of_every_gradient_turns_it_red(run, plant):
    plant(SAM, "perturb", lambda optimizer, ascent, k: [g.clone() for g in ascent.grads])
    assert run("sam") == (1, ["MORE sam: operations: clone 0 -> 6"])


def test_fewer_than_recorded_asks_for_a_new_record(run, monkeypatch, tmp_path):
    record = {"sam": {**RECORD["sam"], "reads": {"nonzero": 1}}}
    monkeypatch.setattr(count_gate, "RECORD", tmp_path / "counts.json")
    count_gate.RECORD.write_text(json.dumps(record))
    assert run("sam") == (0, ["FEWER sam: reads: nonzero 1 -> 0: keep it so with --renew"])
    assert run("sam", renew=True) == (0, [])
    assert json.loads(count_gate.RECORD.read_text()) == {"sam": RECORD["sam"]}


def test_a_method_without_a_record_turns_it_red(run, monkeypatch, tmp_path):
    monkeypatch.setattr(count_gate, "RECORD", tmp_path / "counts.json")
    assert run("sam") == (1, ["MORE sam: not in the record: run with --renew"])
