"""The command line as its users meet it: messages, exit codes, files, Ctrl-C and resume."""

import csv
import io
import json
import shlex
import signal
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from rich.console import Console

from fastsam.__main__ import main
from fastsam.cli import compare, progress
from fastsam.cli.config import Config, options_for
from fastsam.cli.files import CHECKPOINT
from fastsam.cli.results import Epoch

TINY = ["--model", "mlp", "--epochs", "2"]
RUN_FILES = {"history.csv", "result.json", "curve.png", CHECKPOINT}
COMPARISON_FILES = {"results.json", "results.csv", "comparison.png", "table.md", compare.PLAN, "runs"}


def names(directory):
    return {path.name for path in directory.iterdir()}


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def accuracies(out):
    kept = ("epoch", "train_loss", "train_accuracy", "test_accuracy")
    return [[row[key] for key in kept] for row in rows(out / "history.csv")]


def python(*arguments, **keywords):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *arguments], text=True, **pipes, **keywords)


BAD_INPUT = [
    ("train --method frob", "unknown method 'frob'; known are sgd, adamw, sam, asam"),
    (
        "train --data frob",
        "unknown data set 'frob'; known are digits, cifar10:DIR, cifar100:DIR, folder:DIR, npz:FILE, fake:NxCxHxW",
    ),
    ("train --data digits:0", "digits takes no argument, got '0'; use --data digits"),
    ("train --data cifar10", "CIFAR-10 needs a directory after the colon; unpack cifar-10-binary.tar.gz from"),
    ("train --data cifar100:frob", "frob is not a directory; unpack cifar-100-binary.tar.gz from"),
    ("train --data cifar10:.", ". holds no CIFAR-10; unpack"),
    ("train --data fake:512", "fake:512 is not fake:NxCxHxW"),
    ("train --data fake:20x3x30x30 --model vit", "vit cuts pictures into 4x4 pixels, which 30x30 do not fit"),
    ("train --method esam --compile", "esam with --mask tensor cannot be compiled"),
    ("compare --methods sgd,esam --compile", "esam with --mask tensor cannot be compiled"),
    ("train --model frob", "unknown model 'frob'; known are cnn, mlp"),
    ("train --epochs 0", "'--epochs': 0 is not in the range"),
    ("train --epochs many", "'--epochs': 'many' is not a valid integer"),
    ("train --lr nan", "nan is not a finite number"),
    ("train --lr=-0.1", "-0.1 is not in the range"),
    ("train --rho inf", "inf is not a finite number"),
    ("train --method msam --num-shards 0", "num_shards must be at least 1, got 0"),
    ("train --method msam --num-shards 2.5", "'--num-shards': '2.5' is not a valid integer"),
    ("train --method msam --num-shards 33", "batch norm needs at least 2 samples in each of 33 shards"),
    ("train --method msam --model mlp --num-shards 65", "training needs a sample in each of 65 shards"),
    ("train --method sam --num-shards 8", "sam has no --num-shards; it has --lr"),
    ("compare --methods sgd,sam --num-shards 8", "none of the methods (sgd, sam) has --num-shards"),
    ("train --label-noise 40", "40.0 is not in the range 0<=x<=1"),
    ("train --batch-size 1", "batch norm needs at least 2 samples"),
    ("train --seed -1", "-1 is not in the range"),
    ("train --method sgd --rho 0.1", "sgd has no --rho; it has --lr, --momentum, --weight-decay"),
    ("train --when frob", "--when frob is none of every:N, last:X and first:X, such as last:0.3"),
    ("train --when last:2", "--when last:2: fraction must be finite and in (0, 1], got 2.0"),
    ("train --when every:0.5", "--when every:0.5 is none of every:N"),
    ("train --when every:0", "--when every:0: n must be at least 1, got 0"),
    (
        "train --when first:1e-9",
        "fraction=1e-09 of 600 steps rounds to none, so that First would perturb no step; pass more",
    ),
    ("train --method saf --when last:0.3", "saf perturbs in none; sam, asam, esam, msam, gsam, looksam do"),
    ("compare --when last:0.3", "--when"),
    ("train --resume", "nothing to resume"),
    ("train --base rmsprop", "'--base': 'rmsprop' is not one of 'sgd', 'adamw'"),
    ("train --method sgd --base adamw", "sgd is a base itself and goes around none; take --method adamw, or leave"),
    (
        "train --method sam --base adamw --momentum 0.9",
        "sam around adamw has no --momentum; it has --lr,",
    ),
    ("compare --methods sgd --base adamw", "none of the methods (sgd) goes around a base; leave --base out"),
    ("compare --methods sgd,sam --base adamw --mask element", "none of the methods (sgd, sam) has --mask"),
    ("train --schedule linear", "'--schedule': 'linear' is not one of 'cosine', 'onecycle'"),
    ("train --epochs 3 --warmup 3", "--warmup 3 leaves no epoch of 3 for the rate to fall in"),
    ("compare --epochs 3 --warmup 3", "--warmup 3 leaves no epoch of 3 for the rate to fall in"),
    ("train --warmup -1", "-1.0 is not in the range x>=0"),
    ("train --clip 0", "0.0 is not in the range x>0"),
    ("train --init frob", "frob does not exist; name a checkpoint of fastsam train, its directory, or a state dict"),
    ("train --freeze-bn", "--freeze-bn keeps the statistics of --init; name a checkpoint with it"),
    ("sweep", "nothing is swept; name an option and its values, as in --over rho=0.05,0.1"),
    ("sweep --over rho", "'rho' is not NAME=X,... as in rho=0.05,0.1"),
    ("sweep --over seed=1,2", "'seed' cannot be swept; what can is --epochs, --batch-size, --base, --lr"),
    ("sweep --over rho=0.1,-1", "-1.0 is not in the range x>=0"),
    ("sweep --over rho=0.1,0.1", "0.1 is there twice"),
    ("sweep --over rho=0.1 --over rho=0.2", "rho is there twice in --over; list all its values in one"),
    ("sweep --over rho=1,2 --over lr=1,2 --over epochs=1,2", "--over takes one or two options, got 3"),
    ("sweep --over rho=1,2 --rho 0.1", "--rho is swept with --over; leave it out beside that"),
    ("sweep --over num-shards=2,4", "sam has no --num-shards; it has --lr, --momentum, --weight-decay, --rho"),
    ("sweep --over rho=1,2 --num-shards 4", "sam has no --num-shards; it has"),
    ("sweep --over warmup=1,40", "--warmup 40 leaves no epoch of 30 for the rate to fall in"),
    ("sweep --over rho=1,2 --resume", "nothing to resume"),
    ("sweep --resume", "nothing to resume"),
    ("presets frob", "unknown preset 'frob'; near it are"),
    ("train --resume --overwrite", "choose one of them"),
    ("train --frob", "--frob"),
    ("frob", "frob"),
    ("compare --methods sgd,frob", "unknown method 'frob'; known are"),
    ("compare --methods sgd,sgd", "sgd is there twice"),
    ("compare --methods sgd --rho 0.1", "none of the methods (sgd) has --rho"),
    ("compare --label-noise 0,2", "2.0 is not in the range"),
    ("compare --label-noise 0,,0.4", "not a valid number"),
    ("compare --seeds 0", "0 is not in the range"),
    ("compare --resume", "nothing to resume"),
]


@pytest.mark.parametrize(("line", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("fastsam: ")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_directory_that_cannot_be_written_is_refused(command, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main([command, *TINY, "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert f"cannot write to {out}" in err
        assert err.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the message is for machines without CUDA")
def test_cuda_is_taken_where_it_is(tmp_path):
    assert main(["train", *TINY, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["config"]["device"] == "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_it_is_not(capsys, tmp_path):
    assert main(["train", *TINY, "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["click", "rich", "matplotlib", "sklearn", "scipy"])
def test_a_missing_extra_is_one_line(module, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["train"]) == 2
    err = capsys.readouterr().err
    assert "pip install 'fastsam-torch[cli]'" in err
    assert err.count("\n") == 1


def test_importing_the_package_needs_no_extra():
    code = (
        "import sys, fastsam, fastsam.__main__; "
        "sys.exit(any(name in sys.modules for name in ('click', 'rich', 'matplotlib', 'sklearn', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_entry_points(capsys):
    scripts = [entry for entry in entry_points(group="console_scripts") if entry.name == "fastsam"]
    assert scripts
    assert all(script.load() is main for script in scripts)
    assert main([]) == 0
    assert "compare" in capsys.readouterr().out
    process = python("-m", "fastsam", "--version")
    assert process.communicate()[0].startswith("fastsam, version")
    assert process.returncode == 0


def test_train_writes_its_files(capsys, tmp_path):
    out = tmp_path / "made" / "here"
    assert main(["train", *TINY, "--label-noise", "0.2", "--seed", "3", "--out", str(out)]) == 0
    assert names(out) == RUN_FILES
    printed, err = capsys.readouterr()
    assert err == ""
    assert "epoch 2/2" in printed
    assert "\x1b" not in printed  # no terminal, no escapes
    history = rows(out / "history.csv")
    assert [row["epoch"] for row in history] == ["1", "2"]
    columns = {"train_loss", "train_accuracy", "test_accuracy", "samples_per_second", "seconds", "step_ms"}
    assert columns < set(history[0])
    result = json.loads((out / "result.json").read_text())
    assert result["last_test_accuracy"] == float(history[-1]["test_accuracy"])
    assert result["best_test_accuracy"] == max(float(row["test_accuracy"]) for row in history)
    assert result["config"] | {"method": "sam", "label_noise": 0.2, "seed": 3, "split_seed": 3} == result["config"]
    assert result["environment"]["torch"] == torch.__version__
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_of_bytes_train_hold_out_and_resume(capsys, tmp_path):
    data = ["--data", "fake:60x3x8x8", "--model", "cnn", "--channels-last", "--label-noise", "0.2"]
    command = ["train", *data, "--epochs", "2", "--scored-on", "held_out", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    assert "fake:60x3x8x8, cnn, sam" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "result.json").read_text())["config"]
    assert (config["channels_last"], config["compile"]) == (True, False)
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--compile"]) == 2
    assert "compile True (it has False)" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    out = tmp_path / "compare"
    comparison = ["compare", *data, "--methods", "sgd,sam", "--rho", "0.1", "--seeds", "1", "--epochs", "1"]
    assert main([*comparison, "--out", str(out)]) == 0
    table = (out / "table.md").read_text()
    assert "Test accuracy on clean labels of fake:60x3x8x8, cnn, 1 epochs" in table
    assert table.endswith("amp off, channels last.\n")


def test_help_says_how_data_sets_are_asked_for(capsys):
    assert main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    for name in ("cifar10:DIR", "cifar100:DIR", "fake:NxCxHxW", "resnet18", "wrn16-4", "wrn28-10", "vit"):
        assert f"\n  {name} " in printed


@pytest.mark.parametrize(("runs", "prefix"), [(1, ""), (3, "1/3  ")])
def test_a_long_epoch_says_each_minute_how_long_it_takes(runs, prefix, monkeypatch):
    now, text = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Display(Console(file=text, width=100), runs) as display:
        display.started(Config("sgd", options_for("sgd", {}), epochs=2), [], 391)
        for _ in range(21):
            now[0] += 3.9
            display.step(torch.tensor(2.3), "rows 50%")
    said = "epoch 1/2, step 16/391  loss 2.300  rows 50%  an epoch takes 25:25 min"
    assert [line for line in text.getvalue().splitlines() if "step" in line] == [prefix + said]


def test_a_terminal_shows_how_long_an_epoch_takes_until_one_is_over(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    config = Config("sgd", options_for("sgd", {}), epochs=2)
    with progress.Display(Console(file=io.StringIO(), force_terminal=True), 1) as display:
        display.started(config, [], 100)
        now[0] += 0.75
        display.step(torch.tensor(2.3), "")
        assert display.bar.tasks[1].description == "loss 2.300  an epoch takes 1:15 min"
        display.epoch(config, Epoch(1, 2.0, 30.0, 40.0, 500.0, 75.0, 7.0))
        display.step(torch.tensor(1.9), "")
        assert display.bar.tasks[1].description == "loss 1.900  train 30.0 %  test 40.0 %  500 samples/s"


def test_json_is_valid_where_training_diverges(capsys, tmp_path):
    diverging = ["train", *TINY, "--method", "sgd", "--lr", "1e30", "--out", str(tmp_path)]
    assert main(diverging) == 0
    assert "no longer finite" in capsys.readouterr().out
    json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_an_earlier_run_is_kept_unless_told_otherwise(capsys, tmp_path):
    command = ["train", *TINY, "--out", str(tmp_path)]
    assert main(command) == 0
    before = (tmp_path / CHECKPOINT).read_bytes()
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert main([*command, "--resume", "--seed", "0"]) == 0
    assert main([*command, "--resume", "--seed", "1", "--lr", "0.3"]) == 2
    err = capsys.readouterr().err
    assert "seed 1 (it has 0)" in err
    assert "lr 0.3 (it has 0.1)" in err
    assert main([*command, "--overwrite", "--seed", "1"]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["config"]["seed"] == 1


def test_ctrl_c_leaves_a_checkpoint_that_resumes_bit_for_bit(capsys, tmp_path):
    through, broken = tmp_path / "through", tmp_path / "broken"
    command = ["train", "--model", "mlp", "--epochs", "20", "--rho", "0.2", "--label-noise", "0.4", "--out"]
    # a parent that ignores SIGINT, as shells make background jobs do, would hand that on
    process = python(
        "-m", "fastsam", *command, str(broken), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    while "epoch 2/" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.count("\n") == 1
    go_on = shlex.split(err.partition("go on with: ")[2])
    assert go_on == ["fastsam", "train", "--out", str(broken), "--resume"]
    assert names(broken) == {CHECKPOINT}
    assert main(go_on[1:]) == 0
    assert main([*command, str(through)]) == 0
    assert "goes on after epoch" in capsys.readouterr().out
    assert accuracies(broken) == accuracies(through)
    weights = [torch.load(out / CHECKPOINT, weights_only=True)["model"] for out in (broken, through)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


COMPARE = ["compare", "--methods", "sgd,sam", "--seeds", "2", "--label-noise", "0,0.4", *TINY, "--out"]


def test_compare_writes_its_files_and_a_table(capsys, tmp_path):
    assert main([*COMPARE, str(tmp_path)]) == 0
    assert names(tmp_path) == COMPARISON_FILES
    printed = capsys.readouterr().out
    assert "20/20" in printed
    assert "\x1b" not in printed
    assert all(len(line) <= 100 for line in printed.splitlines() if str(tmp_path) not in line)
    runs = rows(tmp_path / "results.csv")
    order = [(float(row["label_noise"]), row["seed"], row["method"]) for row in runs]
    assert order == [(q, s, m) for q in (0.0, 0.4) for s in ("0", "1") for m in ("sgd", "sam")]
    results = json.loads((tmp_path / "results.json").read_text())
    for row in results["table"]:
        mine = [r for r in runs if r["method"] == row["method"] and float(r["label_noise"]) == row["label_noise"]]
        last = [float(r["last_accuracy"]) for r in mine]
        assert row["mean_last"] == pytest.approx(sum(last) / 2)
        assert row["interval_last"] == pytest.approx(12.7062 * row["std_last"] / 2**0.5, rel=1e-5)
        assert f"{row['mean_last']:.1f} ± {row['interval_last']:.1f}" in printed
    sgd, sam = results["table"][:2]
    assert sam["step_ratio"] == sam["step_ms"] / sgd["step_ms"]
    chosen = {choice["label_noise"]: choice["value"] for choice in results["choices"]}
    assert {float(row["label_noise"]): float(row["value"]) for row in runs if row["method"] == "sam"} == chosen
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.md").read_text().count("\n| ") == 5
    assert main([*COMPARE, str(tmp_path)]) == 2
    assert "already holds a comparison" in capsys.readouterr().err


def test_an_interrupted_compare_goes_on_with_the_runs_it_has(capsys, tmp_path, monkeypatch):
    through, broken = tmp_path / "through", tmp_path / "broken"
    assert main([*COMPARE, str(through)]) == 0
    trained, train = [], compare.train

    def interrupted(config, out, **keywords):
        if len(trained) == 6:
            raise KeyboardInterrupt
        trained.append(out / CHECKPOINT)
        return train(config, out, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "train", interrupted)
        assert main([*COMPARE, str(broken)]) == 130
    assert f"fastsam compare --out {broken} --resume" in capsys.readouterr().err
    written = {path: path.stat().st_mtime_ns for path in trained}
    assert main(["compare", "--out", str(broken), "--resume", "--seeds", "3"]) == 2
    assert "seeds 3 (it has 2)" in capsys.readouterr().err
    assert main(["compare", "--out", str(broken), "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in trained} == written
    last = [[row["last_accuracy"] for row in rows(out / "results.csv")] for out in (through, broken)]
    assert last[0] == last[1]


def test_overwrite_forgets_the_runs_of_the_earlier_comparison(tmp_path):
    command = ["compare", "--methods", "sgd", "--seeds", "1", "--label-noise", "0", *TINY]
    assert main([*command, "--out", str(tmp_path)]) == 0
    (other,) = (tmp_path / "runs").iterdir()
    (other / CHECKPOINT).write_bytes(b"broken, so that taking it would fail")
    assert main([*command, "--out", str(tmp_path), "--overwrite"]) == 0


def test_a_refused_compare_does_not_stand_in_the_way(capsys, tmp_path):
    assert main(["compare", "--batch-size", "1", "--out", str(tmp_path)]) == 2
    assert main([*COMPARE[:1], "--methods", "sgd", "--seeds", "1", *TINY, "--out", str(tmp_path)]) == 0


NEW_METHOD = """
import sys
from fastsam import SAM
from fastsam.methods import METHODS, Method
class Newest(SAM):
    def __init__(self, params, base_optimizer, gamma, **keywords):
        assert gamma in (0.5, 0.9), gamma
        super().__init__(params, base_optimizer, rho=0.1, **keywords)
METHODS["newest"] = Method(
    "a new idea", "nobody yet", "optimizer", Newest, {"gamma": 0.75}, base="sgd", tuned="gamma", grid=(0.5, 0.9)
)
from fastsam.__main__ import main
assert main(["train", "--help"]) == 0
assert main(sys.argv[1:]) == 0
"""


def test_a_method_is_added_by_one_entry_in_the_table(tmp_path):
    arguments = ["compare", "--methods", "sgd,newest", "--seeds", "1", "--label-noise", "0.4", *TINY]
    process = python("-c", NEW_METHOD, *arguments, "--out", str(tmp_path))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "a new idea" in out
    assert "--gamma" in out
    assert "newest 0.75" in out
    (row,) = [row for row in json.loads((tmp_path / "results.json").read_text())["table"] if row["method"] == "newest"]
    assert row["value"] in (0.5, 0.9)
    assert row["step_ratio"] > 1
