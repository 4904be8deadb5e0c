"""The kernel benchmark: what it counts, what it verifies before it times, what stops it, and a dry run."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastsam.kernels import reference_common

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(ROOT)
    from benchmarks.__main__ import main
    from benchmarks.arms.parameter_lists import LISTS
    from benchmarks.kernels import losses as loss_table
    from benchmarks.kernels import run as kernels
    from benchmarks.kernels import table as kernel_table
    from benchmarks.kernels.run import KERNELS

PLAN = kernels.plan_for("cpu", 2)
GATE = json.loads((ROOT / "benchmarks" / "gates" / "static.json").read_text())["variants"]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
CASES = [(name, dtype) for name, kernel in KERNELS.items() for dtype in kernel.dtypes]
cases = pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)


@pytest.fixture
def green(monkeypatch):
    monkeypatch.setitem(kernels.TESTS, "cpu", ["packaging/test_readme.py"])


@pytest.mark.parametrize(("name", "tensors", "parameters"), [
    ("resnet18", 62, 11_173_962), ("resnet50", 161, 25_557_032), ("vit_s16", 152, 22_050_664),
    ("gpt2", 148, 124_439_808),
])  # fmt: skip
def test_parameter_lists(name, tensors, parameters):
    shapes = LISTS[name]()
    assert (len(shapes), sum(torch.Size(shape).numel() for shape in shapes)) == (tensors, parameters)


@cases
def test_bytes_are_those_of_the_compiled_kernel(name, dtype):
    kernel = KERNELS[name]
    if kernel.gate == "select":
        assert kernel_table.bytes_moved(kernel, kernel_table.Losses(50, dtype, "cpu", 0), dtype) == 50 * 8 + 25 * 8
        return
    if name in loss_table.LOSSES:
        rows = loss_table.Rows((6, 32), dtype, "cpu", 0)
        moved = (
            [rows.logits, rows.logits, *[rows.history[:6]] * 2]
            if name != "record_"
            else [rows.logits, rows.history[:6]]
        )
        assert kernel_table.bytes_moved(kernel, rows, dtype) == sum(t.nbytes for t in moved)
        return
    stage, *rest = kernel.gate.split()
    found = [GATE[key] for words in (rest, ["found_inf", *rest])
             if (key := " ".join([stage, NAMES[dtype], *words])) in GATE]  # fmt: skip
    inputs = kernel_table.Lists(((10, 10), (7,)), dtype, "cpu", 0)
    moved = kernel_table.bytes_moved(kernel, inputs, dtype)
    assert found
    assert {target["bytes_per_element"] * 107 for variant in found for target in variant.values()} == {moved}


def outcome(kernel, build, dtype):
    try:
        kernels.verify(kernel, build, dtype, "cpu")
    except kernel_table.UnavailableError:
        return "unavailable"
    except ArithmeticError:
        return "wrong"
    return "right"


EXPECTED = {
    ("perturb_ masked", torch.float32, "torch foreach"): "unavailable",
    ("perturb_ stochastic", torch.bfloat16, "torch foreach"): "unavailable",
    ("restore_", torch.float32, "davda54 eager"): "unavailable",
    ("restore_", torch.bfloat16, "davda54 eager"): "unavailable",
    # of a 16-bit weight on the CPU torch 2.13's fused SGD leaves most as it was: what the check is for
    ("restore_sgd_step_", torch.bfloat16, "torch fused"): "wrong",
}


@cases
def test_every_arm_computes_the_same(name, dtype):
    kernel = KERNELS[name]
    for arm, build in kernels.builders(kernel, PLAN).items():
        if arm not in ("apex", "Liger"):
            assert outcome(kernel, build, dtype) == EXPECTED.get((name, dtype, arm), "right"), arm


IDLE = SimpleNamespace(
    norm=lambda grads, *_: torch.zeros(()),
    found_nonfinite=lambda grads: torch.zeros(()),
    select_largest_increase=lambda after, before, k: torch.arange(k),
    trajectory_loss=lambda logits, *_, **__: (torch.zeros(()), torch.zeros_like(logits), None),
    **dict.fromkeys(
        ("perturb_", "restore_", "restore_sgd_step_", "restore_adam_step_", "record_", "ema_"), lambda *_, **__: None
    ),
)


@cases
def test_a_baseline_that_does_nothing_is_refused(name, dtype):
    kernel = KERNELS[name]
    assert outcome(kernel, lambda x: kernel.ours(IDLE, x), dtype) == "wrong"


def test_a_wrong_baseline_is_named_and_not_timed():
    def slightly_wrong(x):
        call = kernel_table._sgd(kernels.reference, x)

        def wrong():
            x.means[0].mul_(1 + 1e-5)
            return call()

        return wrong

    kernel = KERNELS["restore_sgd_step_"]._replace(baselines={"wrong": slightly_wrong})
    copies = [kernel.make(kernel.small, torch.float32, "cpu", seed) for seed in range(2)]
    arms, missing = kernels.prepare(kernel, torch.float32, copies, PLAN)
    assert list(arms) == [kernels.OURS, kernels.AGAIN, kernels.TWIN]
    assert list(missing) == ["wrong"]
    assert missing["wrong"].startswith("ArithmeticError: wrong numbers: result")


def test_our_own_wrong_numbers_stop_everything():
    kernel = KERNELS["norm"]._replace(
        ours=lambda k, x: lambda: [[k.norm(x.grads, (), x.every(None), None) * (2 if x.dtype.itemsize < 8 else 1)]]
    )
    with pytest.raises(ArithmeticError, match="result 0 is off by"):
        kernels.prepare(kernel, torch.float32, [], PLAN)


def test_the_compiled_twin_serves_all_copies_of_the_inputs(monkeypatch):
    monkeypatch.setattr(reference_common, "READ_SCALARS", False)  # as on a GPU
    for name in ("norm", "perturb_", "restore_adam_step_"):
        kernel = KERNELS[name]
        copies = [kernel.make(kernel.small, torch.float32, "cpu", seed) for seed in range(3)]
        # monkeypatch would take the setting away for good: torch's config has an idea of its own of deleting
        with torch._dynamo.config.patch(error_on_recompile=True):
            arms, missing = kernels.prepare(kernel._replace(baselines={}), torch.float32, copies, PLAN)
        assert kernels.TWIN in arms, missing


@pytest.mark.usefixtures("green")
def test_dry_run(tmp_path, capfd):
    out = tmp_path / "results" / "dry.json"
    chosen = ["norm", "select_largest_increase"]
    status = main(
        ["kernels", "--dry-run", "--kernels", ",".join(chosen), "--dtype", "fp32", "--rounds", "2", "--out", str(out)]
    )
    printed = capfd.readouterr().out
    assert status == 0
    record = json.loads(out.read_text())
    assert record["dry run"]
    about = record["environment"]
    assert {"torch", "triton", "python", "device", "driver", "commit", "date"} <= set(about)
    assert about["command"].startswith("python -m benchmarks kernels --dry-run --kernels norm,")
    assert list(dict.fromkeys(result["kernel"] for result in record["results"])) == chosen
    for result in record["results"]:
        arms = result["arms"]
        assert {kernels.OURS, kernels.AGAIN, kernels.TWIN} | set(KERNELS[result["kernel"]].baselines) == set(arms)
        assert arms[kernels.OURS]["over ours"] == 1
        assert arms[kernels.OURS]["GB/s"] >= 0
        assert f"DRY RUN of cut lists, times mean nothing: {result['kernel']}, {result['workload']}, fp32" in printed
        for arm, row in arms.items():
            assert arm in printed
            assert "not timed" not in row or arm == "apex"


def test_red_tests_stop_the_timing(monkeypatch, tmp_path, capfd):
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--device')\n")
    red = tmp_path / "test_red.py"
    red.write_text("def test_red():\n    assert False\n")
    monkeypatch.setitem(kernels.TESTS, "cpu", [str(red)])
    monkeypatch.setattr(kernels, "measure", lambda *_: pytest.fail("timed"))
    out = tmp_path / "out.json"
    assert main(["kernels", "--dry-run", "--out", str(out)]) == 1
    assert "tests are red on cpu: nothing is timed" in capfd.readouterr().err
    assert not out.exists()


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["kernels"]) == 2
    assert capsys.readouterr().err == (
        "kernels: no GPU that torch can use: run on a machine with one, or pass --dry-run\n"
    )


@pytest.mark.parametrize(("arguments", "message"), [
    (["--kernels", "norm,noorm"], "unknown kernel 'noorm'; choose from norm; norm adaptive"),
    (["--lists", "resnet9"], "unknown list 'resnet9'; choose from resnet18; resnet50; vit_s16; gpt2"),
    (["--dtype", "fp8"], "unknown dtype 'fp8'; choose from fp32; bf16"),
    (["--rounds", "1"], "Invalid value for '--rounds': 1 is not in the range x>=2."),
])  # fmt: skip
def test_bad_options(arguments, message, capsys):
    assert main(["kernels", "--dry-run", *arguments]) == 2
    assert message in capsys.readouterr().err
