"""Base, schedule, warm-up, clipping, first weights and frozen statistics of a run, and that it resumes with them."""

import csv
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_training import Stop, assert_equal, config, make, numbers, state

from fastsam.__main__ import main
from fastsam.cli.config import Config, options_for, read_config
from fastsam.cli.errors import InputError
from fastsam.cli.files import CHECKPOINT, read_checkpoint, write_checkpoint
from fastsam.cli.models import batch_norms
from fastsam.cli.results import Watcher
from fastsam.cli.steps import schedule_of
from fastsam.cli.training import TrainingRun, train
from fastsam.methods import METHODS

__all__ = ["make"]


def around(method, **changes):
    return config(method, base="adamw", options=options_for(method, {}, "adamw"), **changes)


# base


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.kind != "base"])
def test_every_method_goes_around_adamw(method):
    run = TrainingRun(around(method))
    inner = getattr(run.optimizer, "base_optimizer", run.optimizer)
    assert type(inner) is torch.optim.AdamW
    group = run.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (3e-3, 0.01)
    run.train_epoch(Watcher())
    assert math.isfinite(run.history[0].train_loss)


def test_the_base_is_that_of_the_row_unless_told_otherwise():
    assert config("sam").base == "sgd"
    assert config("adamw").base == "adamw"
    with pytest.raises(InputError, match="sgd is a base itself and goes around none; take --method adamw, or leave"):
        config("sgd", base="adamw")
    with pytest.raises(InputError, match="sam around adamw has no --momentum; it has --lr, --weight-decay, --rho"):
        options_for("sam", {"momentum": 0.9}, "adamw")


# schedules


def rates(wanted, done=0):
    """The rates of all steps, ten in each epoch."""
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=wanted.options["lr"])
    schedule, found = schedule_of(optimizer, wanted, 10, done), []
    for _ in range(done, 10 * wanted.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_warm_up_rises_by_equal_parts_and_the_cosine_takes_the_rest():
    found = rates(config("sgd", epochs=6, warmup=1.5))
    lr = METHODS["sgd"].options["lr"]
    assert found[:16] == pytest.approx([lr * (i + 1) / 16 for i in range(16)], rel=1e-12)
    assert found[15:] == pytest.approx([lr * (1 + math.cos(math.pi * i / 45)) / 2 for i in range(45)], rel=1e-9)


@pytest.mark.parametrize("warmup", [None, 0.0, 0.5, 2.0])
def test_onecycle_is_torchs(warmup):
    wanted = config("sgd", epochs=4, schedule="onecycle", warmup=warmup)
    assert wanted.warmup == (1.2 if warmup is None else warmup)
    plain = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    share = 0.3 if warmup is None else warmup / 4
    schedule = torch.optim.lr_scheduler.OneCycleLR(plain, 0.1, 40, pct_start=share, cycle_momentum=False)
    expected = []
    for _ in range(40):
        expected.append(plain.param_groups[0]["lr"])
        plain.step()
        schedule.step()
    assert rates(wanted) == expected


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
@pytest.mark.parametrize("done", [10, 20])
def test_a_schedule_that_goes_on_gives_the_same_rates(schedule, done):
    wanted = config("sgd", epochs=3, schedule=schedule, warmup=1.3)
    assert rates(wanted, done) == rates(wanted)[done:]


def test_a_rise_that_has_no_room_is_refused():
    with pytest.raises(InputError, match="--warmup 2 leaves no epoch of 2 for the rate to fall in"):
        config("sgd", epochs=2, warmup=2.0)
    with pytest.raises(InputError, match=r"--warmup 0\.1 is a single step here"):
        rates(config("sgd", epochs=4, schedule="onecycle", warmup=0.1))


# clipping


@pytest.mark.parametrize(("method", "graph"), [("sgd", False), ("sam", False), ("saf", False), ("sam", True)])
def test_no_step_is_longer_than_the_clip_allows(method, graph):
    options = options_for(method, {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0})
    run = TrainingRun(config(method, options=options, clip=0.01, epochs=100, graph=graph))
    weights, step, moved = list(run.model.parameters()), run._step, []

    def watched(batch):
        before = [p.detach().clone() for p in weights]
        loss = step(batch)
        moved.append(torch.stack([(p.detach() - q).norm() for p, q in zip(weights, before, strict=True)]).norm().item())
        return loss

    run._step = watched
    run.train_epoch(Watcher())
    assert max(moved) <= 0.01 * (1 + 1e-4)
    assert moved[0] == pytest.approx(0.01, rel=1e-3)


# resume

CHANGES = [
    ("sam", {"base": "adamw"}),
    ("mesa", {"base": "adamw"}),
    ("sam", {"schedule": "onecycle"}),
    ("adamw", {"schedule": "onecycle", "warmup": 0.7, "amp": "fp16"}),
    ("esam", {"warmup": 1.4}),
    ("saf", {"clip": 0.5}),
    ("msam", {"clip": 0.5, "amp": "fp16"}),
]


@pytest.mark.parametrize(("method", "changes"), CHANGES)
def test_interrupted_and_resumed_equals_uninterrupted(method, changes, make):
    through, broken = make("through"), make("broken")
    wanted = config(method, epochs=3, **changes | {"options": options_for(method, {}, changes.get("base"))})
    steps = TrainingRun(wanted).steps_per_epoch
    expected = train(wanted, through)
    plain = train(config(method, epochs=3), make("plain"))
    assert numbers(plain) != numbers(expected)
    with pytest.raises(KeyboardInterrupt):
        train(wanted, broken, watcher=Stop(after=steps + 1))
    assert numbers(train(wanted, broken, resume=True)) == numbers(expected)
    assert_equal(state(broken), state(through))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "adamw", "options": options_for("sam", {}, "adamw")}, r"base adamw \(it has sgd\)"),
        ({"schedule": "onecycle", "warmup": 0.5}, r"schedule onecycle \(it has cosine\), warmup 0.5 \(it has 0.0\)"),
        ({"clip": 1.0}, r"clip 1.0 \(it has None\)"),
        ({"init": "a", "freeze_bn": True}, r"init a \(it has None\), freeze-bn True \(it has False\)"),
        ({"preset": "esam/cifar10/resnet18"}, r"preset esam/cifar10/resnet18 \(it has None\)"),
    ],
)
def test_resume_refuses_another_setting(changes, message, make):
    out = make("out")
    run = TrainingRun(config("sam", model="cnn"))
    run.save(out / CHECKPOINT)
    other = Config(**{**vars(run.config), **changes})
    with pytest.raises(InputError, match=message):
        train(other, out, resume=True)


def test_a_checkpoint_from_before_these_settings_goes_on(make):
    through, broken = make("through"), make("broken")
    wanted = config("adamw", epochs=3)
    expected = train(wanted, through)
    with pytest.raises(KeyboardInterrupt):
        train(wanted, broken, watcher=Stop(after=TrainingRun(wanted).steps_per_epoch + 1))
    checkpoint = read_checkpoint(broken / CHECKPOINT)
    for name in ("base", "schedule", "warmup", "clip", "init", "freeze_bn", "preset"):
        del checkpoint["config"][name]
    write_checkpoint(broken / CHECKPOINT, checkpoint)
    assert read_config(checkpoint, broken) == wanted
    assert numbers(train(wanted, broken, resume=True)) == numbers(expected)
    assert_equal(state(broken), state(through))


# first weights


FINE_TUNED = {"data": "fake:40x1x8x8", "model": "cnn", "batch_size": 20, "epochs": 2, "label_noise": 0.0}


@pytest.fixture
def pretrained(make):
    out = make("pretrained")
    train(config("sgd", model="cnn", epochs=1), out)
    return out / CHECKPOINT


@pytest.mark.parametrize("method", ["sgd", "sam", "mesa"])
def test_a_run_begins_with_the_weights_of_a_checkpoint(method, pretrained):
    run = TrainingRun(config(method, **FINE_TUNED, init=str(pretrained)))
    assert run.drawn_anew == []
    saved = read_checkpoint(pretrained)["model"]
    assert_equal(dict(run.model.state_dict()), dict(saved))
    if method == "mesa":
        assert_equal(dict(run.criterion.loss.teacher.state_dict()), dict(saved))


def test_a_plain_state_dict_will_do_and_other_classes_get_a_last_layer_of_their_own(pretrained, make):
    saved = read_checkpoint(pretrained)["model"]
    last = [name for name, tensor in saved.items() if len(tensor.shape) and tensor.shape[0] == 10]
    assert len(last) == 2
    cut = {name: tensor[:7] if name in last else tensor for name, tensor in saved.items()}
    path = make("plain") / "weights.pt"
    torch.save(cut, path)
    told, watcher = [], Watcher()
    watcher.told = told.append
    train(config("sgd", **FINE_TUNED | {"epochs": 1}, init=str(path)), make("out"), watcher=watcher)
    assert told == [f"{', '.join(last)}: drawn anew, since {path} has other classes"]
    run, fresh = (TrainingRun(config("sgd", **FINE_TUNED, init=init)) for init in (str(path), None))
    assert run.drawn_anew == last
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, fresh.model.state_dict()[name] if name in last else saved[name])


def refused(saved, make, message):
    path = make("refused") / "weights.pt"
    torch.save(saved, path)
    with pytest.raises(InputError, match=message):
        TrainingRun(config("sgd", **FINE_TUNED, init=str(path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "0.weight"}, "has no 0.weight: it is of another model"),
        (lambda s: s | {"more": s["0.weight"]}, "has more, which the model has not"),
        (
            lambda s: s | {"0.weight": s["0.weight"][:5]},
            r"0.weight is \[5, 1, 3, 3\] where the model has \[32, 1, 3, 3\]",
        ),
        (lambda s: {"weights": 5}, "holds no weights; name a checkpoint of fastsam train or a state dict"),
    ],
)
def test_weights_of_another_model_are_refused(change, message, pretrained, make):
    refused(change(dict(read_checkpoint(pretrained)["model"])), make, message)


def test_weights_that_are_not_there_or_broken_are_one_line(capsys, tmp_path):
    for name, message in (("none", "does not exist; name a checkpoint"), ("broken", "is broken, or no checkpoint")):
        path = tmp_path / name
        if name == "broken":
            path.write_bytes(b"no archive")
        assert main(["train", "--init", str(path), "--model", "mlp", "--out", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


# frozen statistics


@pytest.mark.parametrize("method", ["sgd", "sam", "esam", "msam", "mesa", "saf"])
def test_frozen_statistics_stay_and_normalise_every_pass(method, pretrained):
    run = TrainingRun(config(method, **FINE_TUNED, init=str(pretrained), freeze_bn=True))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    norms, modes = batch_norms(run.model), []
    norms[0].register_forward_pre_hook(lambda norm, args: modes.append(norm.training))
    run.train_epoch(Watcher())
    assert modes
    assert not any(modes)
    after = run.model.state_dict()
    buffers = {name for name, _ in run.model.named_buffers()}
    assert buffers
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == (name in buffers), name


def test_frozen_statistics_need_no_batch_of_two(pretrained):
    small = FINE_TUNED | {"data": "fake:10x1x8x8", "batch_size": 1}
    TrainingRun(config("sgd", **small, init=str(pretrained), freeze_bn=True)).train_epoch(Watcher())


def test_statistics_to_freeze_come_from_somewhere(pretrained):
    with pytest.raises(InputError, match="--freeze-bn keeps the statistics of --init; name a checkpoint with it"):
        config("sgd", model="cnn", freeze_bn=True)
    with pytest.raises(InputError, match="mlp has no batch norm to freeze; leave --freeze-bn out"):
        TrainingRun(config("sgd", init=str(pretrained), freeze_bn=True))


def test_fine_tuning_resumes_bit_for_bit_without_the_file_it_began_with(pretrained, make):
    through, broken = make("through"), make("broken")
    wanted = config("mesa", **FINE_TUNED, init=str(pretrained), freeze_bn=True)
    wanted = replace(wanted, epochs=3, options=wanted.options | {"start_epoch": 0})
    expected = train(wanted, through)
    with pytest.raises(KeyboardInterrupt):
        train(wanted, broken, watcher=Stop(after=3))
    pretrained.unlink()
    assert numbers(train(wanted, broken, resume=True)) == numbers(expected)
    assert_equal(state(broken), state(through))


# the parts of a loss


@pytest.mark.parametrize(("method", "options"), [("saf", ["--lag", "1"]), ("mesa", ["--decay", "0.9"])])
def test_the_history_tells_cross_entropy_and_divergence_apart(method, options, tmp_path):
    line = ["train", "--method", method, *options, "--start-epoch", "1", "--model", "mlp", "--epochs", "3"]
    assert main([*line, "--label-smoothing", "0.1", "--out", str(tmp_path)]) == 0
    with open(tmp_path / "history.csv", encoding="utf-8", newline="") as file:
        first, second, third = csv.DictReader(file)
    assert float(first["divergence"]) == 0
    assert first["cross_entropy"] == first["train_loss"]
    for row in (second, third):
        assert float(row["divergence"]) > 0
        both = float(row["cross_entropy"]) + float(row["divergence"])
        assert both == pytest.approx(float(row["train_loss"]), rel=1e-12)


def test_the_cross_entropy_is_that_of_the_logits():
    run, found = TrainingRun(config("mesa", label_smoothing=0.2)), []

    def watch(module, args, logits):
        if module.training:
            found.append(logits.detach())

    run.model.register_forward_hook(watch)
    targets, step = [], run._step
    run._step = lambda batch: (targets.append(batch[1]), step(batch))[1]
    run.train_epoch(Watcher())
    losses = F.cross_entropy(torch.cat(found), torch.cat(targets), label_smoothing=0.2)
    assert run.history[0].cross_entropy == pytest.approx(losses.item(), rel=1e-5)


def test_other_methods_have_no_parts_in_their_history(tmp_path):
    assert main(["train", "--method", "sam", "--model", "mlp", "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert "cross_entropy" not in (tmp_path / "history.csv").read_text()


def test_a_history_whose_first_epochs_lack_a_column_is_written(make, tmp_path):
    out = make("out")
    wanted = config("saf", epochs=2)
    train(wanted, out)
    checkpoint = read_checkpoint(out / CHECKPOINT)
    for name in ("cross_entropy", "divergence"):
        del checkpoint["history"][0][name]
    write_checkpoint(out / CHECKPOINT, checkpoint)
    assert main(["train", "--resume", "--out", str(out)]) == 0
    with open(out / "history.csv", encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert first["divergence"] == ""
    assert second["divergence"] == "0.0"
