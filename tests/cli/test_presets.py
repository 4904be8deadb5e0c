"""The papers' settings: each builds its optimizer or loss, what a paper leaves open is asked for by name."""

import shlex
import subprocess
import sys

import pytest
import torch

import fastsam
from fastsam import presets
from fastsam.__main__ import main
from fastsam.cli.config import SCHEDULES, options_of
from fastsam.cli.files import CHECKPOINT, read_checkpoint
from fastsam.methods import METHODS
from fastsam.presets import BASE_OPTIONS, METHOD_OPTIONS

GIVEN = {"lr": 0.3, "weight_decay": 0.02, "rho": 0.07, "decay": 0.99}
"""What is passed for what a paper does not give."""
BASES = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
RUN = {"data", "model", "epochs", "batch_size", "schedule", "warmup", "clip", "label_smoothing", "label_noise"}
TOLD = {"freeze_bn", "pretrained", "seeds", "steps", "resolution", "shard_size", "warmup_steps"}


def filled(preset, names):
    return {name: GIVEN[name] for name in names if name in preset.gaps}


def keywords(preset):
    own = preset.method_keywords(**filled(preset, METHOD_OPTIONS[preset.method]))
    return own, preset.base_keywords(**filled(preset, BASE_OPTIONS))


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_builds_its_optimizer_and_its_loss(name):
    preset, model = presets.load(name), torch.nn.Linear(3, 2)
    row, (own, of_base) = METHODS[preset.method], keywords(preset)
    if row.kind == "loss":
        sizes = {"num_samples": 8, "num_classes": 2}
        loss = row.build_loss(model=model, **sizes, **own)
        assert {key: getattr(loss, key) for key in own} == own
        own = {}
    opt = row.build(model.parameters(), BASES[preset.base], model=model, base_options=of_base, **own)
    group = opt.param_groups[0]
    for key, value in {**own, **of_base}.items():
        assert (group[key] if key in group else getattr(opt, key)) == value, key
    if preset.base == "adamw":
        # the papers' betas are torch's own
        assert group["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_says_what_a_run_needs_or_that_it_is_open(name):
    preset = presets.load(name)
    known = set(preset.values) | set(preset.gaps)
    assert not set(preset.values) & set(preset.gaps)
    assert {"lr", "weight_decay", "data", "model", "epochs", "batch_size", "schedule"} <= known
    assert known <= RUN | TOLD | set(BASE_OPTIONS) | set(METHOD_OPTIONS[preset.method])
    assert ("momentum" in known) == (preset.base == "sgd") or name == "looksam"
    assert preset.name == name
    assert all(value.source for value in preset.values.values())
    assert "https://" in preset.paper
    assert METHODS[preset.method].base in (None, "sgd")


def test_the_options_that_presets_may_set_are_the_constructors():
    for method, names in METHOD_OPTIONS.items():
        own = {"adaptive", "rho_min", "lr_max", "lr_min"} & set(names)
        assert set(names) - own <= set(options_of(method)), method


PRINTED = [
    ("sam/cifar10/wrn28-10", {"epochs": 200, "lr": 0.1, "weight_decay": 5e-4, "rho": 0.05, "batch_size": 256}),
    ("sam/cifar100/wrn28-10/1800", {"epochs": 1800, "lr": 0.05, "weight_decay": 1e-3, "rho": 0.1}),
    ("sam/imagenet/resnet101/400", {"epochs": 400, "lr": 1.0, "weight_decay": 1e-4, "rho": 0.05, "batch_size": 4096}),
    ("esam/cifar10/resnet18", {"lr": 0.05, "weight_decay": 1e-3, "rho": 0.05, "beta": 0.6, "gamma": 0.5}),
    ("esam/cifar100/resnet18/sgd", {"lr": 0.05, "weight_decay": 5e-4, "epochs": 200, "batch_size": 128}),
    ("esam/imagenet/resnet50", {"lr": 0.2, "weight_decay": 1e-4, "rho": 0.05, "beta": 0.6, "gamma": 0.7}),
    ("saf/imagenet/resnet50", {"lam": 0.3, "tau": 5.0, "lag": 3, "start_epoch": 5, "lr": 1.4, "batch_size": 4096}),
    ("msam/cifar10/wrn28-10", {"lr": 0.75, "rho": 0.2, "num_shards": 32, "warmup": 0.05, "schedule": "onecycle"}),
    ("msam/qqp/roberta-base", {"lr": 2e-5, "epochs": 15, "rho": 0.05, "num_shards": 8, "weight_decay": 0.01}),
    ("gsam/imagenet/vit-b16", {"rho": 0.6, "rho_min": 0.2, "alpha": 0.4, "lr": 3e-3, "lr_min": 3e-5}),
]


@pytest.mark.parametrize(("name", "values"), PRINTED)
def test_values_are_those_printed(name, values):
    preset = presets.load(name)
    assert {key: preset[key] for key in values} == values


def test_sams_presets_carry_the_samples_of_a_perturbation():
    found = {n: presets.load(n).shard_size for n in presets.names() if n.startswith("sam/")}
    assert {n for n, size in found.items() if size is None} == {
        *(f"sam/cifar10/resnet32/noise{percent}" for percent in (20, 40, 60, 80)),
        "sam/imagenet/efficientnet-b7",
        "sam/imagenet/efficientnet-l2",
    }
    assert found["sam/cifar10/wrn28-10"] == 32
    assert found["sam/imagenet/resnet50"] == 128


def test_what_a_paper_does_not_give_is_refused_by_name():
    preset = presets.load("saf/imagenet/resnet50")
    message = r"saf/imagenet/resnet50: the paper does not give weight_decay \(the authors' code has 0.0001, .*; pass"
    with pytest.raises(ValueError, match=message + r" weight_decay=\.\.\."):
        preset.base_keywords()
    with pytest.raises(ValueError, match=message):
        preset["weight_decay"]
    assert preset.base_keywords(weight_decay=0.1) == {"lr": 1.4, "momentum": 0.9, "weight_decay": 0.1}
    with pytest.raises(ValueError, match=r"does not give decay \(the authors' code has 0.9998\); pass decay="):
        presets.load("mesa/cifar10/resnet18").method_keywords()
    with pytest.raises(TypeError, match="has no 'rho' here; it has lam, tau, lag, start_epoch"):
        preset.method_keywords(rho=0.1)
    with pytest.raises(KeyError, match="has no 'rho'; it has"):
        preset["rho"]


def test_presets_are_there_with_the_package():
    code = "import fastsam; print(fastsam.presets.load('esam/cifar10/resnet18')['rho'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0.05\n", "")
    assert fastsam.presets is presets


def test_a_value_of_ones_own_takes_the_place_of_the_papers():
    assert presets.load("sam/cifar10/wrn28-10").method_keywords(rho=0.3) == {"rho": 0.3}


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="unknown preset 'esam/cifar10/resnet-18'; near it are esam/cifar10/resnet18,"):
        presets.load("esam/cifar10/resnet-18")
    with pytest.raises(ValueError, match="unknown preset '!'; near it are"):
        presets.load("!")
    with pytest.raises(TypeError, match="must be a string, got 5"):
        presets.load(5)


def test_a_preset_cannot_be_changed():
    preset = presets.load("sam/cifar10/wrn28-10")
    with pytest.raises(TypeError):
        preset.values["rho"] = presets.Value(1.0, "nowhere")
    own = preset.method_keywords()
    own["rho"] = 1.0
    assert presets.load("sam/cifar10/wrn28-10")["rho"] == 0.05


# the command line

FAKE = "--data fake:60x3x8x8 --model mlp --epochs 1"
REFUSED = [
    ("frob", "unknown preset 'frob'; near it are"),
    ("sam/cifar10/wrn28-10", "is for cifar10; pass --data, as in --data cifar10:DIR"),
    ("saf/imagenet/resnet50 --data digits", "(the authors' code has cosine); pass --weight-decay ..., --schedule ..."),
    ("sam/svhn/wrn28-10 --data digits", "the paper does not give epochs; pass --epochs ..."),
    ("gsam/imagenet/vit-s16", "sets rho_min, lr_max, lr_min, for which there is no option; build it in Python with"),
    ("asam/cifar10/wrn16-8 --data digits", "has a step schedule, which is not here; pass --schedule"),
    ("msam/cola/roberta-base --data digits", "is for roberta-base, which is not built here; pass --model"),
    (f"sam/flowers/efficientnet-b7 {FAKE}", "fine-tunes a network trained before; pass --init with its weights"),
    (f"esam/cifar10/resnet18 --method sam {FAKE}", "is for esam, not for sam; leave --method out"),
    (f"esam/cifar10/resnet18 --base adamw {FAKE}", "is around sgd, not around adamw; leave --base out"),
    (
        f"sam/cifar10/wrn28-10 --method msam --batch-size 33 {FAKE}",
        "has 32 samples in a shard, which do not fit into a",
    ),
    (f"sam/cifar10/wrn28-10 --beta 0.5 {FAKE}", "sam has no --beta; it has"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED)
def test_what_the_command_line_cannot_take_from_a_preset_is_one_line(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", *shlex.split(line)]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)
    assert list(tmp_path.iterdir()) == []


def trained(out, line):
    assert main(["train", *shlex.split(line), "--out", str(out)]) == 0
    return read_checkpoint(out / CHECKPOINT)["config"]


def test_a_run_has_the_presets_settings_but_for_those_typed(tmp_path, capsys):
    config = trained(tmp_path, f"--preset esam/cifar10/resnet18 {FAKE} --gamma 0.7")
    assert config["preset"] == "esam/cifar10/resnet18"
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "rho": 0.05, "beta": 0.6, "gamma": 0.7}
    assert config["options"] == options | {"mask": "tensor"}
    assert (config["method"], config["batch_size"], config["epochs"]) == ("esam", 128, 1)
    printed = capsys.readouterr().out
    assert "esam/cifar10/resnet18: Du et al. 2021" in printed
    assert main(["train", "--resume", "--out", str(tmp_path), "--preset", "esam/cifar10/resnet18"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(tmp_path), "--preset", "esam/cifar100/resnet18"]) == 2
    assert "preset esam/cifar100/resnet18 (it has esam/cifar10/resnet18)" in capsys.readouterr().err


def test_the_warm_up_is_a_share_of_the_epochs_and_msam_takes_sams_samples(tmp_path, capsys):
    fake = "--data fake:60x3x8x8 --model mlp"
    config = trained(tmp_path / "a", f"--preset msam/cifar10/resnet50 {fake} --epochs 2 --batch-size 32")
    assert (config["schedule"], config["warmup"], config["label_smoothing"]) == ("onecycle", 0.1, 0.1)
    config = trained(tmp_path / "b", f"--preset sam/cifar10/wrn28-10 --method msam {fake} --epochs 1 --batch-size 64")
    assert (config["method"], config["options"]["num_shards"], config["options"]["rho"]) == ("msam", 2, 0.05)
    assert "that of 32 samples" not in capsys.readouterr().out
    trained(tmp_path / "c", f"--preset sam/cifar10/wrn28-10 {fake} --epochs 1")
    assert "A perturbation there is that of 32 samples, not of the batch" in capsys.readouterr().out


def test_presets_are_listed_and_shown_with_their_sources(capsys):
    assert main(["presets"]) == 0
    assert capsys.readouterr().out.split() == presets.names()
    assert main(["presets", "mesa/imagenet/resnet50"]) == 0
    printed = capsys.readouterr().out
    assert "not given; the authors' code has 0.9998" in printed
    assert " lr 1.4 the paper's text " in " ".join(printed.split())


def test_schedules_of_presets_are_the_command_lines_or_named_otherwise():
    found = {
        preset.values["schedule"].value for preset in map(presets.load, presets.names()) if "schedule" in preset.values
    }
    assert found == {*SCHEDULES, "linear", "step"}
