"""The GPU gate on made-up records: green for the same, red for what is slower or gone, and quiet about the clock."""

import copy
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(ROOT)
    from benchmarks import environment, readme
    from benchmarks.__main__ import COMMANDS, main
    from benchmarks.gates import gpu as gpu_gate
    from benchmarks.gates.gpu import KINDS, compare
    from benchmarks.steps.options import REGIMES

DEVICE = "NVIDIA Made-Up 9000"


def kernels_record():
    def result(kernel, share):
        arms = {"ours": {"share of copy": share, "microseconds": 100.0}, "torch foreach": {"share of copy": 0.3}}
        return {"kernel": kernel, "workload": "resnet50", "dtype": "fp32", "arms": arms}

    return {"environment": {"device": DEVICE}, "results": [result("norm", 0.95), result("perturb_", 0.92)]}


def steps_record():
    def row(over_stock, over_base):
        return {"milliseconds": 10.0, "over stock": over_stock, "over base": over_base}

    def model():
        eager = {"base": row(1.0, 1.0), "sam": row(2.0, 2.0), "davda54 eager sam": row(2.5, 2.5)}
        graph = {"eager base": row(1.0, 1.9), "base": row(0.52, 1.0), "sam": row(1.05, 2.02)}
        regimes = {"eager": {"arms": eager, "not run": {}}, "graph": {"arms": graph, "not run": {}}}
        return {"base": "SGD", "rows": 128, "regimes": regimes}

    about = {"device": DEVICE, "torch": "2.13.0"}
    return {"environment": about, "options": {"amp": "bf16"}, "models": {"resnet18": model(), "resnet50": model()}}


RECORDS = {"kernels": kernels_record, "steps": steps_record}


def sam(record, regime="graph"):
    return record["models"]["resnet50"]["regimes"][regime]["arms"]["sam"]


@pytest.mark.parametrize("name", KINDS)
def test_the_same_is_green(name):
    assert compare(KINDS[name], RECORDS[name](), RECORDS[name]()) == ([], [])


@pytest.mark.parametrize(("name", "compared"), [("kernels", 2), ("steps", 2 * 2 * 4)])
def test_what_is_compared(name, compared):
    values = KINDS[name].values(RECORDS[name]())
    assert len(values) == compared  # of the steps ours and the base, and neither davda54 nor the denominators
    assert not any("davda54" in key or "eager base" in key for key in values)


@pytest.mark.parametrize("over", ["over stock", "over base"])
def test_a_slower_step_is_red(over):
    slower = steps_record()
    sam(slower)[over] *= 1.06
    red, new = compare(KINDS["steps"], slower, steps_record())
    assert len(red) == 1
    assert red[0].startswith(f"resnet50, graph, sam, {over}: ")
    assert red[0].endswith("(+6.0%)")
    assert new == []
    assert compare(KINDS["steps"], steps_record(), slower) == ([], [])  # faster is green
    within = steps_record()
    sam(within)[over] *= 1.04
    assert compare(KINDS["steps"], within, steps_record()) == ([], [])


def test_a_kernel_with_one_access_more_is_red():
    slower = kernels_record()
    slower["results"][1]["arms"]["ours"]["share of copy"] *= 7 / 8
    red, _ = compare(KINDS["kernels"], slower, kernels_record())
    assert red == ["perturb_, resnet50, fp32: 0.805, recorded 0.920 (-12.5%)"]
    assert compare(KINDS["kernels"], kernels_record(), slower) == ([], [])
    within = kernels_record()
    within["results"][1]["arms"]["ours"]["share of copy"] *= 0.92
    assert compare(KINDS["kernels"], within, kernels_record()) == ([], [])


def test_the_rounding_of_a_small_share_is_green():
    small, smaller = kernels_record(), kernels_record()
    for record, share in ((small, 0.003), (smaller, 0.002)):
        record["results"][0]["arms"]["ours"]["share of copy"] = share
    assert compare(KINDS["kernels"], smaller, small) == ([], [])


def test_another_clock_or_a_slower_baseline_is_green():
    other = steps_record()
    for model in other["models"].values():
        for found in model["regimes"].values():
            for row in found["arms"].values():
                row["milliseconds"] *= 3
        model["regimes"]["eager"]["arms"]["davda54 eager sam"]["over base"] *= 2
    assert compare(KINDS["steps"], other, steps_record()) == ([], [])


def test_what_vanished_is_red_and_what_is_new_is_named():
    fewer = steps_record()
    del fewer["models"]["resnet18"]["regimes"]["graph"]["arms"]["sam"]
    gone = [f"resnet18, graph, sam, {over}" for over in ("over stock", "over base")]
    assert compare(KINDS["steps"], fewer, steps_record()) == ([f"{name}: is gone" for name in gone], [])
    assert compare(KINDS["steps"], steps_record(), fewer) == ([], gone)
    fewer = kernels_record()
    del fewer["results"][0]
    assert compare(KINDS["kernels"], fewer, kernels_record()) == (["norm, resnet50, fp32: is gone"], [])


@pytest.fixture
def gate(monkeypatch, tmp_path, capsys):
    """Runs the gate with records in place of measurements, where results are recorded into a folder of the test."""
    monkeypatch.setattr(environment, "RECORDED", tmp_path)
    monkeypatch.setattr(gpu_gate, "cannot_run", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: DEVICE)

    def run(fresh, *arguments):
        monkeypatch.setattr(gpu_gate, "measured", lambda name, kind: copy.deepcopy(fresh[name]))
        return main(["gate", "gpu", *arguments]), capsys.readouterr()

    return run


def test_it_records_the_first_time_compares_the_next_and_records_anew_when_asked(gate, tmp_path):
    fresh = {name: make() for name, make in RECORDS.items()}
    status, said = gate(fresh)
    assert status == 0
    assert said.out.count("nothing was recorded for this GPU; recorded in ") == 2
    files = {name: tmp_path / f"{name}_nvidia_made_up_9000.json" for name in RECORDS}
    assert {name: json.loads(path.read_text()) for name, path in files.items()} == fresh

    assert gate(fresh)[0] == 0
    slower = copy.deepcopy(fresh)
    sam(slower["steps"])["over stock"] *= 1.2
    status, said = gate(slower)
    assert status == 1
    assert "gate gpu: RED: resnet50, graph, sam, over stock: 1.260, recorded 1.050 (+20.0%)" in said.out
    assert "gate gpu: kernels: ok" in said.out
    assert json.loads(files["steps"].read_text()) == fresh["steps"]

    assert gate(slower, "--record")[0] == 0
    assert json.loads(files["steps"].read_text()) == slower["steps"]
    assert gate(slower)[0] == 0


def test_a_slowdown_planted_in_the_record_of_the_kernels_is_red(gate, tmp_path):
    fresh = {name: make() for name, make in RECORDS.items()}
    gate(fresh)
    path = tmp_path / "kernels_nvidia_made_up_9000.json"
    planted = json.loads(path.read_text())
    planted["results"][0]["arms"]["ours"]["share of copy"] = 1.2
    path.write_text(json.dumps(planted))
    status, said = gate(fresh)
    assert status == 1
    assert "gate gpu: RED: norm, resnet50, fp32: 0.950, recorded 1.200" in said.out


def test_red_tests_are_red_and_nothing_is_recorded(gate, tmp_path):
    status, said = gate({"kernels": None, "steps": steps_record()})
    assert status == 1
    assert "gate gpu: kernels failed" in said.err
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gate", "gpu"]) == 2
    assert capsys.readouterr().err == "gate gpu: no GPU that torch can use: run on a machine with one\n"


def test_it_asks_the_step_benchmark_for_what_that_knows():
    given = COMMANDS.get_command(None, "steps").make_context("steps", list(gpu_gate.STEPS)).params
    assert given["models"] == ["resnet18", "resnet50", "vit_s16"]
    assert given["regimes"] == list(REGIMES)
    assert {"base", "davda54 eager sam", "sam", "esam", "esam, elements", "mesa"} < set(given["methods"])
    assert "msam, uniform" not in given["methods"]


def test_a_benchmark_that_fails_leaves_no_record_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_gate, "FRESH", tmp_path)
    (tmp_path / "steps.json").write_text("{}")  # of an earlier run
    assert gpu_gate.measured("steps", KINDS["steps"]._replace(arguments=["--rounds", "0"])) is None
    assert not (tmp_path / "steps.json").exists()


def test_readme_shows_what_was_recorded_on_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "RECORDED", tmp_path)
    assert readme.gpu_block() == "GPU: not measured yet; `make bench-gpu` measures and records."
    (tmp_path / "steps_gpu.json").write_text(json.dumps(steps_record()))
    (tmp_path / "kernels_gpu.json").write_text(json.dumps(kernels_record()))
    block = readme.gpu_block()
    assert "| resnet50 | sam | 2.00x | - | 2.02x | 1.05x |" in block
    assert "| resnet50 | davda54 eager sam | 2.50x | - | - | - |" in block
    assert "mesa" not in block
    assert f"norm 95%, perturb_ 92% ({DEVICE})" in block
    assert "not measured" not in block
