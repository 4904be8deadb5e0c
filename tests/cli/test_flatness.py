"""`fastsam sharpness`, `fastsam landscape`, `compare --sharpness` and `train --log-sharpness`."""

import csv
import json
import shutil

import pytest
import torch

from fastsam.__main__ import main
from fastsam.cli import compare
from fastsam.cli.config import Config
from fastsam.cli.files import CHECKPOINT, read_checkpoint
from fastsam.cli.flatness import Batches, Trained, losses_of, mean_loss
from fastsam.cli.results import Epoch, Result
from fastsam.sharpness import hessian_eigenvalues, sam_sharpness

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two methods, and one of another architecture on other data."""
    out = tmp_path_factory.mktemp("runs")
    for name, options in {
        "sgd": "--method sgd --model mlp --label-noise 0.4",
        "sam": "--method sam --rho 0.3 --model mlp --label-noise 0.4 --log-sharpness",
        "other": "--method sgd --model cnn --data fake:40x1x8x8",
    }.items():
        assert main(["train", *options.split(), "--epochs", "2", "--out", str(out / name)]) == 0
    return out


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_numbers_are_those_of_the_measures(runs, capsys, tmp_path):
    out = tmp_path / "new" / "numbers.json"
    options = ["--samples", "100", "--eigenvalues", "1", "--check", "--batch-size", "32", "--out", out]
    assert main(["sharpness", str(runs / "sgd"), str(runs / "sam" / CHECKPOINT), *map(str, options)]) == 0
    text = capsys.readouterr().out
    assert "sgd, 40% noise, seed 0" in text
    assert "sam rho 0.3, 40% noise, seed 0" in text
    assert "100 training pictures" in text
    rows = json.loads(out.read_text())["models"]
    for name, row in zip(("sgd", "sam"), rows, strict=True):
        trained = Trained(runs / name, "cpu", samples=100)
        found = sam_sharpness(trained.model, losses_of(trained.model), trained.batches(32), 0.05)
        assert (row["sharpness"], row["loss"], row["samples"]) == (found.value, found.loss, 100)
        assert row["gap"] == mean_loss(trained.model, trained.scored()) - found.loss
        assert row["config"]["method"] == name
        close = row["power"] == pytest.approx(row["eigenvalues"][0], rel=0.01)
        assert close if row["power_converged"] else 0 < row["power"] < row["eigenvalues"][0]
        assert f"{row['sharpness']:.4g}" in text
        assert f"{row['eigenvalues'][0]:.4g}" in text


def test_eigenvalues_are_those_of_the_exact_hessian(runs):
    """Of the last bias alone, whose Hessian is diag(p) - p p', averaged over the pictures."""
    trained = Trained(runs / "sgd", "cpu", samples=50)
    for p in list(trained.model.parameters())[:-1]:
        p.requires_grad_(False)
    found = hessian_eigenvalues(trained.model, losses_of(trained.model), trained.batches(), 10)
    x, _ = next(iter(trained.batches()))
    p = trained.model(x).softmax(1).detach().double()
    exact = p.mean(0).diag() - p.T @ p / len(p)
    assert found.values == pytest.approx(torch.linalg.eigvalsh(exact).flip(0).tolist(), rel=1e-4, abs=1e-7)


def test_all_pictures_come_in_the_order_and_with_the_labels_of_training(runs):
    trained = Trained(runs / "sgd", "cpu")
    batches = list(trained.batches(100))
    assert torch.equal(torch.cat([x for x, _ in batches]), trained.data.normalised(trained.data.x))
    assert torch.equal(torch.cat([y for _, y in batches]), trained.data.y)
    some = Trained(runs / "sgd", "cpu", samples=30)
    assert len(some.x) == 30
    assert not torch.equal(some.x, trained.x[:30])


@pytest.mark.parametrize(
    ("options", "shape"), [("--points 3 --pairs 2", (2, 3, 3)), ("--points 4 --dimensions 1", (1, 4))]
)
def test_landscapes_of_several_models_are_one_picture_with_its_numbers(runs, tmp_path, options, shape):
    out = tmp_path / "new" / "picture.png"
    paths = [str(runs / "sgd"), str(runs / "sam")]
    assert main(["landscape", *paths, *options.split(), "--samples", "64", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(PNG)
    found = json.loads(out.with_suffix(".json").read_text())
    assert [model["label"] for model in found["models"]] == ["sgd, 40% noise, seed 0", "sam rho 0.3, 40% noise, seed 0"]
    assert found["checkpoints"] == [f"{path}/{CHECKPOINT}" for path in paths]
    for model in found["models"]:
        assert torch.tensor(model["losses"]).shape == shape


def test_a_line_has_both_models_at_its_ends(runs, tmp_path):
    out = tmp_path / "line.png"
    arguments = ["--line", "--points", "7", "--samples", "64", "--out", str(out)]
    assert main(["landscape", str(runs / "sgd"), str(runs / "sam"), *arguments]) == 0
    model = json.loads(out.with_suffix(".json").read_text())["models"][0]
    assert model["label"] == "sgd, 40% noise, seed 0 to sam rho 0.3, 40% noise, seed 0"
    start, end = (Trained(runs / name, "cpu", samples=64) for name in ("sgd", "sam"))
    at, losses = model["at"], model["losses"][0]
    assert losses[at.index(0.0)] == pytest.approx(mean_loss(start.model, start.batches()), rel=1e-6)
    assert losses[at.index(1.0)] == pytest.approx(mean_loss(end.model, start.batches()), rel=1e-6)


def test_points_without_a_finite_loss_are_told_of(runs, tmp_path, capsys):
    """As large weights lead to, in a picture of any scale."""
    out = tmp_path / "far.png"
    arguments = ["--extent", "1e15", "--points", "3", "--samples", "16", "--out", str(out)]
    assert main(["landscape", str(runs / "sgd"), *arguments]) == 0
    assert "points have no finite loss" in capsys.readouterr().out
    assert "null" in out.with_suffix(".json").read_text()


def test_bad_input_is_one_line(runs, capsys, tmp_path):
    assert "frob does not exist; name a checkpoint of fastsam train, or its directory" in refused(
        capsys, "sharpness", "frob"
    )
    assert "checkpoint.pt does not exist" in refused(capsys, "landscape", tmp_path)
    (tmp_path / "text.pt").write_text("text")
    assert "is broken, or no checkpoint" in refused(capsys, "sharpness", tmp_path / "text.pt")
    assert "k must be from 1 to 85002" in refused(
        capsys, "sharpness", runs / "sgd", "--eigenvalues", "90000", "--samples", "9"
    )
    assert "--line goes from one checkpoint to another, got 1" in refused(capsys, "landscape", runs / "sgd", "--line")
    mixed = refused(capsys, "landscape", runs / "sgd", runs / "other")
    assert "was trained on fake:40x1x8x8 and" in mixed
    message = refused(capsys, "landscape", runs / "sgd", runs / "other", "--line")
    assert "is of another architecture than the model: it lacks " in message
    assert "it lacks 5.bias, it has 0.weight as well, and 19 more in " in message
    assert str(runs / "sgd") in message
    (tmp_path / "file").write_text("in the way")
    assert "cannot write" in refused(capsys, "landscape", runs / "sgd", "--out", tmp_path / "file" / "a.png")


def test_a_checkpoint_whose_weights_do_not_fit_says_which(runs, capsys, tmp_path):
    checkpoint = read_checkpoint(runs / "sgd" / CHECKPOINT)
    checkpoint["model"]["frob"] = checkpoint["model"].pop("1.bias")
    torch.save(checkpoint, tmp_path / CHECKPOINT)
    message = refused(capsys, "sharpness", tmp_path)
    assert "it lacks 1.bias, it has frob as well; was it written by another version?" in message


def test_logged_sharpness_changes_no_number_and_is_that_of_the_weights(runs, tmp_path):
    options = "--method sam --rho 0.3 --model mlp --label-noise 0.4 --epochs 2"
    assert main(["train", *options.split(), "--out", str(tmp_path)]) == 0
    histories = []
    for out in (runs / "sam", tmp_path):
        with open(out / "history.csv", encoding="utf-8", newline="") as file:
            histories.append(list(csv.DictReader(file)))
    logged, plain = histories
    assert [row["train_loss"] for row in logged] == [row["train_loss"] for row in plain]
    assert "sharpness" not in plain[0]
    states = [read_checkpoint(out / CHECKPOINT)["model"] for out in (runs / "sam", tmp_path)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    trained = Trained(runs / "sam", "cpu")
    last = sam_sharpness(trained.model, losses_of(trained.model), trained.batches(64)).value
    assert float(logged[-1]["sharpness"]) == pytest.approx(last, rel=1e-6)
    assert (runs / "sam" / "curve.png").read_bytes().startswith(PNG)


def test_a_run_that_is_logged_goes_on_with_its_log(runs, tmp_path, capsys):
    shutil.copytree(runs / "sam", tmp_path / "run")
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert "sharpness" in (tmp_path / "run" / "history.csv").read_text().splitlines()[0]
    message = refused(capsys, "train", "--out", runs / "sgd", "--resume", "--log-sharpness")
    assert "cannot be resumed with log-sharpness True (it has False)" in message


def test_a_comparison_measures_its_runs_once(tmp_path, capsys, monkeypatch):
    arguments = "--methods sgd,sam --rho 0.1 --label-noise 0 --seeds 2 --model mlp --epochs 1 --sharpness"
    assert main(["compare", *arguments.split(), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "largest eigenvalue of its Hessian" in " ".join(text.split())
    results = json.loads((tmp_path / "results.json").read_text())
    by_method = {method: [run for run in results["runs"] if run["method"] == method] for method in ("sgd", "sam")}
    for row in results["table"]:
        for name in ("sharpness", "lambda_max"):
            values = [run[name] for run in by_method[row["method"]]]
            assert row[name] == pytest.approx(sum(values) / 2)
            assert f"{row[name]:.3g}" in (tmp_path / "table.md").read_text()
    trained = Trained(tmp_path / "runs" / "noise0-sgd-seed1", "cpu", 2048)
    expected = sam_sharpness(trained.model, losses_of(trained.model), trained.batches(64)).value
    assert by_method["sgd"][1]["sharpness"] == expected
    monkeypatch.setattr(compare, "measure", None)
    assert main(["compare", "--resume", "--out", str(tmp_path)]) == 0


def test_a_run_that_diverged_has_no_flatness_and_does_not_end_the_comparison(tmp_path):
    arguments = "--methods sgd --lr 1e30 --label-noise 0 --seeds 1 --model mlp --epochs 1 --sharpness"
    assert main(["compare", *arguments.split(), "--out", str(tmp_path)]) == 0
    row = json.loads((tmp_path / "results.json").read_text())["table"][0]
    assert (row["sharpness"], row["lambda_max"]) == (None, None)
    assert "| - | - |" in (tmp_path / "table.md").read_text()


def test_a_history_from_before_is_read():
    epoch = Epoch(1, 2.0, 30.0, 40.0, 500.0, 75.0, 7.0)
    assert "sharpness" not in epoch.numbers()
    assert Epoch(**epoch.numbers()) == epoch
    assert Result(Config("sgd", {}), (epoch,)).last == 40.0


def test_batches_can_be_walked_again(runs):
    trained = Trained(runs / "sgd", "cpu")
    batches = Batches(trained.data, trained.x[:10], trained.y[:10], 4, torch.contiguous_format)
    assert [len(y) for _, y in batches] == [len(y) for _, y in batches] == [4, 4, 2]
    assert len(batches) == 3
