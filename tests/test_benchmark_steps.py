"""The step benchmarks, end to end on a small net: every arm runs, and what is recorded can be read."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks" / "step.py").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(ROOT)
    from benchmarks import msam_curve, step

COMMON = ["--models", "cnn", "--device", "cpu", "--rounds", "1", "--steps", "1"]


def test_every_method_steps_and_costs_the_passes_it_should(tmp_path, capsys):
    out = tmp_path / "step.json"
    step.main([*COMMON, "--rows", "8", "--out", str(out)])
    rows = json.loads(out.read_text())["cnn"]
    assert set(rows) == set(step.METHODS)
    assert out.with_suffix(".png").stat().st_size > 1000
    passes = {method: (row["passes"]["forward rows"], row["passes"]["backward rows"]) for method, row in rows.items()}
    for method in ("base", "base again", "base, fused", "saf", "mesa", "mesa, bf16 teacher"):
        assert passes[method] == (1, 1), method
    for method in ("davda54 eager sam", "sam", "esam, perturbation only"):
        assert passes[method] == (2, 2), method
    assert passes["esam, selection only"] == (2.5, 1.5)
    assert "over base" in capsys.readouterr().out


def test_the_curve_of_msam(tmp_path):
    out = tmp_path / "curve.json"
    msam_curve.main([*COMMON, "--rows", "64", "--out", str(out)])
    rows = json.loads(out.read_text())["cnn"]
    assert {"base", "base again", "sam", *msam_curve.CURVE} == set(rows)
    assert all(row["milliseconds"] > 0 for row in rows.values())
