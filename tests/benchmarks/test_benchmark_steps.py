"""The step benchmarks, end to end on small nets: every arm runs or says why not, and what is recorded can be read."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fastsam

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(ROOT)
    from benchmarks import counts
    from benchmarks.__main__ import main
    from benchmarks.arms import tasks as models
    from benchmarks.arms.ours import ARMS, Arm
    from benchmarks.steps import msam_curve
    from benchmarks.steps import report as step_report
    from benchmarks.steps import run as step
    from benchmarks.steps.options import Options

COMMON = ["--device", "cpu", "--rounds", "2", "--steps", "1", "--counted", "1"]

HAS_PACKAGE = find_spec("pytorch_optimizer") is not None
PACKAGE = {f"pytorch_optimizer {name}" for name in ("sam", "gsam", "wsam", "looksam")}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few batches in an epoch, all of which are made and remembered before the first step, and a short warm-up."""
    monkeypatch.setattr(step, "BATCHES", 8)
    monkeypatch.setattr(step, "_WARM_UP", 1)


def run(tmp_path, *arguments):
    out = tmp_path / "new" / "step.json"
    assert main(["steps", *COMMON, *arguments, "--out", str(out)]) == 0
    assert out.with_suffix(".png").stat().st_size > 1000
    return json.loads(out.read_text())


def test_every_method_steps_and_costs_the_passes_it_should(tmp_path, capsys):
    every = ",".join(name.replace(",", "+") for name in ARMS)
    record = run(tmp_path, "--models", "cnn", "--rows", "8", "--methods", every)
    assert record["environment"]["command"].startswith("python -m benchmarks steps --device cpu")
    assert (record["environment"]["pytorch_optimizer"] != "none") == HAS_PACKAGE
    found = record["models"]["cnn"]["regimes"]["eager"]
    rows = found["arms"]
    assert set(found["not run"]) == (set() if HAS_PACKAGE else PACKAGE)
    assert set(found["not run"].values()) <= {"not run: ModuleNotFoundError: No module named 'pytorch_optimizer'"}
    assert set(rows) == set(ARMS) - set(found["not run"])
    passes = {method: (row["passes"]["forward rows"], row["passes"]["backward rows"]) for method, row in rows.items()}
    one_pass = [name for name in rows if name.split(",")[0] in ("base", "base again", "saf", "mesa")]
    for method in (*one_pass, "official-style saf"):
        assert passes[method] == (1, 1), method
    for method in PACKAGE & set(rows):
        assert passes[method] == ((1.2, 1.2) if "looksam" in method else (2, 2)), method
    two_passes = [name for name in rows if name.split(",")[0] in ("sam", "asam", "msam", "gsam")]
    no_selection = [name for name in rows if "no selection" in name]
    for method in ("davda54 eager sam", "torch foreach sam", *two_passes, *no_selection):
        if method != "msam, batched":  # its rows go through the model as one, side by side
            assert passes[method] == (2, 2), method
    assert passes["looksam"] == passes["looksam, by tensor"] == (1.2, 1.2)
    assert passes["esam, selection only"] == (2.5, 1.5)
    assert passes["official-style esam"] == (2 + 3 / 8, 1 + 3 / 8)  # strictly above the smallest of four
    assert rows["base"]["over stock"] == rows["base"]["over base"] == rows["base, fused"]["over fused"] == 1
    assert found["noise"][0] <= 1 <= found["noise"][1]
    for row in rows.values():
        assert row["milliseconds"] > 0
        assert row["launches"] is row["peak memory over base"] is None  # of a GPU alone
    assert rows["base"]["host reads"] == 0
    assert rows["official-style esam"]["host reads"] == 1  # how many rows
    assert rows["davda54 eager sam"]["operator calls"] > rows["torch foreach sam"]["operator calls"]
    printed = capsys.readouterr().out
    assert all(f"  {method:26}" in printed for method in rows)


def test_methods_run_compiled_or_say_why_not(tmp_path, capsys):
    record = run(tmp_path, "--models", "mlp", "--rows", "4", "--regimes", "compiled", "--compiler", "eager",
                 "--methods", "sam,esam,esam+ elements,msam+ 4 shards,saf,mesa,official-style esam")  # fmt: skip
    found = record["models"]["mlp"]["regimes"]["compiled"]
    bases = ["eager base", "eager base, fused", "base", "base again", "base, fused"]
    assert list(found["arms"]) == [*bases, "sam", "esam, elements", "msam, 4 shards", "saf", "mesa"]
    assert list(found["not run"]) == ["esam", "official-style esam"]
    reason = "not compiled: other gradients are left out in each step; see 'esam, elements'"
    assert set(found["not run"].values()) == {reason}
    assert f"esam                       {reason}" in capsys.readouterr().out
    assert found["arms"]["eager base"]["over stock"] == found["arms"]["base"]["over base"] == 1


def test_the_compiled_regime_compiles_the_model_and_the_teacher(monkeypatch):
    compiled = []
    options = Options(["mlp"], [], [], rows=4, compiler="eager")
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **kw: (compiled.append(kw), compile_(m, **kw)))
    work = step.Workload("mlp", options)
    work.timed(ARMS["mesa"], "eager")
    assert compiled == []
    work.timed(ARMS["mesa"], "compiled")
    assert compiled == [{"dynamic": False, "backend": "eager"}] * 2


def test_the_graph_regime_captures_ours_and_the_base(monkeypatch, tmp_path):
    captured = []

    def watched(opt, losses, *batch, **keywords):
        captured.append((type(opt).__name__, len(batch)))
        return fastsam.graph_step(opt, losses, *batch, **keywords)

    monkeypatch.setattr(models, "graph_step", watched)
    record = run(tmp_path, "--models", "mlp", "--rows", "4", "--regimes", "eager,graph", "--together", "2",
                 "--methods", "davda54 eager sam,sam,esam,esam+ elements,msam+ 4 shards,saf,mesa")  # fmt: skip
    regimes = record["models"]["mlp"]["regimes"]
    assert len(regimes["eager"]["arms"]) == 10
    graph = regimes["graph"]
    bases = ["eager base", "eager base, fused", "base", "base again", "base, fused"]
    assert list(graph["arms"]) == [*bases, "sam", "esam", "esam, elements", "msam, 4 shards", "saf", "mesa"]
    assert list(graph["not run"]) == ["davda54 eager sam"]
    assert graph["not run"]["davda54 eager sam"].startswith("not captured")
    assert captured == [("SGD", 3)] * 3 + [("SAM", 2), ("ESAM", 2), ("ESAM", 2), ("MSAM", 2)] + [("SGD", 3)] * 2
    assert graph["noise"] is not None


def test_captured_steps_train_as_others_do(monkeypatch):
    monkeypatch.setattr(step, "_WARM_UP", 6)
    weights = {}
    for regime in ("eager", "graph"):
        options = Options(["mlp"], [], [], rows=4)
        methods_ = [ARMS[name] for name in ("base", "sam", "saf", "mesa")]
        arms = [step.Workload("mlp", options).timed(method, regime) for method in methods_]
        weights[regime] = [torch.nn.utils.parameters_to_vector(arm.problem.model.parameters()) for arm in arms]
    for eager, graph in zip(*weights.values(), strict=True):
        torch.testing.assert_close(eager, graph)


def test_a_method_that_fails_is_reported_and_the_others_run(monkeypatch, tmp_path, capsys):
    def broken(problem):
        raise KeyError("step")

    monkeypatch.setitem(ARMS, "davda54 eager sam", Arm(broken))
    record = run(tmp_path, "--models", "mlp", "--rows", "4", "--methods", "davda54 eager sam,sam")
    found = record["models"]["mlp"]["regimes"]["eager"]
    assert found["not run"] == {"davda54 eager sam": "not run: KeyError: 'step'"}
    assert "sam" in found["arms"]
    assert "davda54 eager sam          not run: KeyError: 'step'" in capsys.readouterr().out


def test_batches_of_text_and_of_pictures():
    text = step.TASKS["transformer"].batches(2, 3, "cpu", torch.contiguous_format)
    assert text[0].x.shape == (2, 64)
    assert not text[0].x.is_floating_point()
    assert [batch.ids.tolist() for batch in text] == [[0, 1], [2, 3], [4, 5]]
    pictures = step.TASKS["cnn"].batches(2, 1, "cpu", torch.channels_last)
    assert pictures[0].x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(tmp_path, amp):
    record = run(tmp_path, "--models", "mlp", "--rows", "4", "--amp", amp,
                 "--methods", "davda54 eager sam,pytorch_optimizer sam,official-style esam,sam,saf,mesa")  # fmt: skip
    found = record["models"]["mlp"]["regimes"]["eager"]
    assert {"davda54 eager sam", "official-style esam", "sam", "saf", "mesa"} <= set(found["arms"])
    if amp == "fp16":
        assert "without a GradScaler" in found["not run"]["pytorch_optimizer sam"]


def test_only_whole_periods_are_timed_and_counted():
    options = Options(["mlp"], [], [], rows=4, counted=1)
    arm = step.Timed(step.Workload("mlp", options), ARMS["base"]._replace(period=4), "eager")
    taken = arm.taken
    arm.time(5)
    assert (taken, arm.taken) == (4, 12)
    arm.count()
    assert (arm.taken - 12) % 4 == 0


def test_operators_that_read_are_counted():
    x = torch.arange(6.0)
    with counts.Operators() as seen:
        (x + 1).sum().item()
        x[x > 2]
        x.nonzero()
    assert seen.reads == 3
    assert seen.calls >= 6


def test_the_picture_needs_no_arm_of_every_regime(tmp_path):
    row = {"over stock": 9.0, "over base": 2.0}
    arms = {"base": row | {"over base": 1.0}, "sam": row}
    regimes = {"eager": {"arms": arms, "noise": [0.9, 1.1]}, "graph": {"arms": {}, "noise": None}}
    model = {"base": "SGD", "rows": 1, "regimes": regimes}
    step_report.draw({"models": {"cnn": model}, "environment": {"device": "CPU"}}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_the_table_of_a_gpu():
    row = {"milliseconds": 4.2, "over stock": 0.95, "over fused": 1.0, "over base": 2.0, "peak memory over base": 5e6,
           "launches": 812.0, "operator calls": None, "host reads": 0.0, "passes": None}  # fmt: skip
    found = {"arms": {"sam": row}, "not run": {"esam": "not captured: a reason"}}
    head, columns, sam, esam = step_report.table("resnet18", "graph", {"base": "SGD", "rows": 128}, found).split("\n")
    assert head.startswith("resnet18, graph: SGD, batch 128")
    assert columns.split() == ["ms", "/", "stock", "/", "fused", "/", "base", "MB", "/base", "launches", "reads"]
    assert sam.split() == ["sam", "4.20", "0.950", "1.000", "2.000", "5.0", "812.0", "0.0"]
    assert esam.split() == ["esam", "not", "captured:", "a", "reason"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--models", "alexnet"], "unknown model 'alexnet'; choose from cnn; mlp"),
    (["--methods", "sam,looksam+ k"], "unknown method 'looksam, k'; choose from base; base again"),
    (["--regimes", "jit"], "unknown regime 'jit'; choose from eager; compiled; graph"),
    (["--rounds", "0"], "Invalid value for '--rounds': 0 is not in the range x>=1."),
])  # fmt: skip
def test_bad_options(arguments, message, capsys):
    assert main(["steps", *COMMON, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_curve_of_msam(tmp_path):
    out = tmp_path / "curve.json"
    arguments = ["msam-curve", *COMMON, "--rounds", "1", "--counted", "0", "--models", "mlp", "--out", str(out)]
    assert main(arguments) == 0
    model = json.loads(out.read_text())["models"]["mlp"]
    assert model["rows"] == 64
    found = model["regimes"]["eager"]
    assert {*step.BASES, "sam", *msam_curve.CURVE} == set(found["arms"])
    assert found["not run"] == {}
