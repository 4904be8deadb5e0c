"""A sweep: every combination over the seeds, scored on held-out data, one table, and it goes on where it stopped."""

import csv
import io
import json

import pytest
from rich.console import Console
from test_training import make

from fastsam.__main__ import main
from fastsam.cli import compare, flatness, sweep
from fastsam.cli.config import options_of
from fastsam.cli.errors import InputError
from fastsam.cli.files import CHECKPOINT
from fastsam.cli.results import Epoch, Result, Watcher
from fastsam.cli.sweep import SweepPlan
from fastsam.cli.tables import print_table

__all__ = ["make"]
LINE = ["sweep", "--over", "rho=0.05,0.2", "--over", "batch-size=64,128", "--seeds", "2", "--model", "mlp"]
LINE += ["--epochs", "1", "--out"]


def plan(over, seeds=1, **settings):
    given = {"method": "sam", "base": None, "data": "digits", "model": "mlp", "epochs": 1, "warmup": None}
    return SweepPlan(over, seeds, {}, given | {"schedule": "cosine", "scored_on": "held_out"} | settings)


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_combination_is_trained_with_every_seed(capsys, tmp_path):
    assert main([*LINE, str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "results.csv", "table.md", sweep.PLAN, "runs"}
    printed, runs = capsys.readouterr().out, rows(tmp_path / "results.csv")
    order = [(row["seed"], float(row["rho"]), int(row["batch_size"])) for row in runs]
    assert order == [(seed, rho, size) for seed in "01" for rho in (0.05, 0.2) for size in (64, 128)]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["point"] for row in results["table"]] == [
        {"rho": rho, "batch_size": size} for rho in (0.05, 0.2) for size in (64, 128)
    ]
    for row in results["table"]:
        point = row["point"]
        mine = [r for r in runs if (float(r["rho"]), int(r["batch_size"])) == tuple(point.values())]
        last = [float(r["last_accuracy"]) for r in mine]
        assert row["mean_last"] == pytest.approx(sum(last) / 2)
        # half of the distance of two numbers, times Student's t of one degree of freedom
        assert row["interval_last"] == pytest.approx(12.7062 * abs(last[0] - last[1]) / 2, rel=1e-5)
        assert f"{row['mean_last']:.1f} ± {row['interval_last']:.1f}" in printed
    assert (tmp_path / "table.md").read_text().count("\n| ") == 5
    best = max(results["table"], key=lambda row: row["mean_last"])["point"]
    told = " ".join(printed.split())
    assert f"Highest after the last epoch: rho {best['rho']:g}, batch_size {best['batch_size']}." in told
    assert "Held-out accuracy of sam around sgd on digits, mlp; seeds 0 to 1, mean ± 95 % interval" in told
    assert main([*LINE, str(tmp_path)]) == 2
    assert "already holds a sweep; add --resume to finish it" in capsys.readouterr().err
    assert main([*LINE, str(tmp_path), "--overwrite"]) == 0


def test_an_interrupted_sweep_goes_on_with_the_runs_it_has(capsys, tmp_path, monkeypatch):
    through, broken = tmp_path / "through", tmp_path / "broken"
    assert main([*LINE, str(through)]) == 0
    trained, train = [], compare.train

    def interrupted(config, out, **keywords):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(out / CHECKPOINT)
        return train(config, out, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "train", interrupted)
        assert main([*LINE, str(broken)]) == 130
    assert f"fastsam sweep --out {broken} --resume" in capsys.readouterr().err
    written = {path: path.stat().st_mtime_ns for path in trained}
    for other, message in (
        (
            ["--over", "rho=0.05,0.3"],
            "over {'rho': [0.05, 0.3]} (it has {'rho': [0.05, 0.2], 'batch_size':",
        ),
        (["--seeds", "3"], "seeds 3 (it has 2)"),
        (["--lr", "0.3"], "lr 0.3 (it has None)"),
        (["--method", "sgd"], "method sgd (it has sam)"),
    ):
        assert main(["sweep", "--out", str(broken), "--resume", *other]) == 2
        assert message in capsys.readouterr().err
    assert main([*LINE, str(broken), "--resume"]) == 0
    assert main(["sweep", "--out", str(broken), "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in trained} == written
    last = [[row["last_accuracy"] for row in rows(out / "results.csv")] for out in (through, broken)]
    assert last[0] == last[1]


def test_runs_of_a_sweep_differ_in_the_swept_alone(make, monkeypatch):
    trained = []

    def pretend(config, out, **_):
        trained.append((config, out.name))
        accuracy = 10 * config.options["rho"] + config.warmup + config.seed
        return Result(config, (Epoch(1, 0.0, 0.0, accuracy, 1.0, 1.0, 1.0),))

    monkeypatch.setattr(compare, "train", pretend)
    done = sweep.run(plan({"rho": [0.1, 0.3], "warmup": [0.0, 0.5]}, seeds=2), make("out"), Watcher())
    configs = [config for config, _ in trained]
    assert [(c.seed, c.options["rho"], c.warmup) for c in configs] == [
        (seed, rho, warmup) for seed in (0, 1) for rho in (0.1, 0.3) for warmup in (0.0, 0.5)
    ]
    assert {(c.split_seed, c.scored_on, c.method, c.base) for c in configs} == {(0, "held_out", "sam", "sgd")}
    assert len({name for _, name in trained}) == len(trained)
    assert [row.mean_last for row in done.rows] == [1.5, 2.0, 3.5, 4.0]
    assert done.highest.point == {"rho": 0.3, "warmup": 0.5}


def test_a_swept_base_brings_its_own_defaults():
    swept = plan({"base": ["sgd", "adamw"]}).points()
    configs = [plan({"base": ["sgd", "adamw"]}).config(point, 0) for point in swept]
    assert [c.base for c in configs] == ["sgd", "adamw"]
    assert [c.options for c in configs] == [options_of("sam", "sgd"), options_of("sam", "adamw")]


def test_swept_epochs_bring_the_warm_up_of_onecycle():
    swept = plan({"epochs": [10, 20]}, schedule="onecycle")
    assert [swept.config(point, 0).warmup for point in swept.points()] == [3.0, 6.0]


def test_a_preset_sets_what_is_not_swept(tmp_path):
    line = ["sweep", "--preset", "esam/cifar10/resnet18", "--over", "gamma=0.3,0.7", "--data", "fake:60x3x8x8"]
    assert main([*line, "--model", "mlp", "--epochs", "1", "--out", str(tmp_path)]) == 0
    config = json.loads((tmp_path / sweep.PLAN).read_text())
    assert (config["settings"]["method"], config["settings"]["batch_size"]) == ("esam", 128)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "rho": 0.05, "beta": 0.6}
    assert config["options"] == options
    assert config["over"] == {"gamma": [0.3, 0.7]}


def test_a_plan_that_cannot_be_read_is_refused(make):
    out = make("out")
    (out / sweep.PLAN).write_text("[]")
    with pytest.raises(InputError, match=r"sweep\.json cannot be read as a plan"):
        sweep.read_plan(out)


# comparisons


def test_intervals_are_students():
    assert compare.interval([1.0, 2.0, 3.0]) == pytest.approx(4.302652729911275 / 3**0.5, rel=1e-9)
    assert compare.interval([1.0, 1.0]) == 0
    assert compare.interval([1.0]) is None


def test_a_comparison_around_adamw_has_its_ratios_to_adamw(tmp_path):
    line = [
        "compare",
        "--methods",
        "sgd,adamw,sam",
        "--rho",
        "0.1",
        "--base",
        "adamw",
        "--seeds",
        "1",
        "--model",
        "mlp",
    ]
    line += ["--label-noise", "0", "--epochs", "1", "--schedule", "onecycle", "--clip", "1"]
    assert main([*line, "--out", str(tmp_path)]) == 0
    sgd, adamw, sam = json.loads((tmp_path / "results.json").read_text())["table"]
    assert (sgd["base"], adamw["base"], sam["base"]) == (None, None, "adamw")
    assert sam["step_ratio"] == sam["step_ms"] / adamw["step_ms"]
    assert sam["interval_last"] is None
    told = (tmp_path / "table.md").read_text()
    assert "Methods around adamw, schedule onecycle, gradients clipped at 1. " in told
    read = compare.read_plan(tmp_path)
    assert (read.base, read.schedule, read.clip) == ("adamw", "onecycle", 1.0)
    assert main(["compare", "--resume", "--out", str(tmp_path), "--clip", "2"]) == 2


COMPARISON = {
    "noise": "40%", "method": "looksam", "chosen": "rho 0.05", "last (%)": "75.6 ± 10.1", "best (%)": "91.7",
    "step": "112.5 ms (2.05x adamw)", "run": "63.4 s",
}  # fmt: skip
LABEL = "sam around adamw rho 0.05, 40% noise, seed 0"
NUMBERS = ["0.4321", "-0.04673", "0.04411", "-0.989", "1234", "12.34", "1069", "123.4 s"]
WIDEST = [(list(COMPARISON), list(COMPARISON.values()), ()), (flatness.HEADERS, [LABEL, *NUMBERS], (0,))]


@pytest.mark.parametrize(("titles", "row", "wraps"), WIDEST)
def test_tables_lose_nothing_in_80_columns(titles, row, wraps):
    text = io.StringIO()
    print_table(Console(file=text, width=80), titles, [row], wraps=wraps)
    assert all(word in text.getvalue() for cell in (*titles, *row) for word in cell.split())
