"""Lightning with `SAMCallback`, automatic and manual, number by number beside loops written by hand."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning")

import lightning as L
import torchmetrics
from by_hand import METHODS as OF_ALL
from by_hand import SGD, ByHand, assert_same_weights, by_hand, by_plain_steps, decay
from methods import ORACLES
from problems import batches, mlp
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from fastsam import ESAM, MESA, SAF, SAM
from fastsam.integrations.lightning import SAMCallback
from fastsam.schedule import Every

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*num_workers.*"),
    pytest.mark.filterwarnings("ignore:.*tensorboardX.*"),
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
    # MESA's average is one
    pytest.mark.filterwarnings("ignore:Found .* in eval mode.*"),
]

METHODS = OF_ALL | {"esam of all rows": (ESAM, {"rho": 0.1, "seed": 4, "gamma": 1.0})}
AUTOMATIC = ["sam", "esam of all rows", "gsam", "looksam"]
DATA = batches(6, dtype=torch.float32)


class Net(L.LightningModule):
    """Counts what its hooks see."""

    def __init__(self, name="sam", automatic=True, batchnorm=True):
        super().__init__()
        self.automatic_optimization, self.name = automatic, name
        self.net = mlp(torch.float32, batchnorm=batchnorm)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
        self.calls = {"before_step": 0, "after_backward": 0, "zero_grad": 0}

    def losses(self, x, y):
        return F.cross_entropy(self.net(x), y, reduction="none")

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            logits = self.net(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            self.accuracy(logits, batch[1])
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
            self.log("loss", loss, on_step=False, on_epoch=True)
            self.log("rows", float(len(batch[0])), on_step=False, on_epoch=True, reduce_fx="sum")
            return loss
        opt = self.optimizers()
        opt.zero_grad()
        loss = opt.backward(self.losses, *batch, backward=self.manual_backward)
        opt.step()
        self.lr_schedulers().step()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return None

    def configure_optimizers(self):
        cls, options = METHODS[self.name]
        opt = cls(self.parameters(), torch.optim.SGD, **options, **SGD)
        return [opt], [{"scheduler": LambdaLR(opt, decay), "interval": "step"}]

    def on_before_optimizer_step(self, optimizer):
        self.calls["before_step"] += 1

    def on_after_backward(self):
        self.calls["after_backward"] += 1

    def on_before_zero_grad(self, optimizer):
        self.calls["zero_grad"] += 1


def fit(net, data=DATA, callbacks=None, ckpt_path=None, **options):
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(**{**defaults, **options}, callbacks=[SAMCallback(), *(callbacks or [])])
    trainer.fit(net, DataLoader(data, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def by_hand_of(name, net):
    return by_hand(name.split()[0], net.net, options=METHODS[name][1])


CLIPS = {"none": {}, "norm": {"clip": 0.3}, "value": {"clip_value": 0.05}}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", AUTOMATIC)
def test_automatic_optimization(name, clip):
    """Clipping, batch norm and the scheduler; logs, metrics and hooks are the first pass's, once."""
    net = Net(name)
    loop, schedule = by_hand_of(name, net)
    options = {"none": {}, "norm": {"gradient_clip_val": 0.3}, "value": {"gradient_clip_val": 0.05}}[clip]
    algorithm = {"gradient_clip_algorithm": clip} if options else {}
    hits = 0
    trainer = fit(net, **options, **algorithm)
    for x, y in DATA:
        with torch.no_grad():
            hits += (copy.deepcopy(loop.model)(x).argmax(1) == y).sum().item()
        loop.step(loop.gradient(x, y), **CLIPS[clip])
        schedule.step()
    loop.assert_equals(net.net, buffers=True)
    logged = trainer.callback_metrics
    assert logged["loss"].item() == pytest.approx(sum(loop.first) / 6, abs=1e-6)
    assert logged["accuracy"].item() == pytest.approx(hits / (6 * 12), abs=1e-6)
    assert logged["rows"].item() == 6 * 12
    assert net.calls == {"before_step": 6, "after_backward": 6, "zero_grad": 6}
    assert trainer.global_step == 6
    assert type(net) is Net


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("name", ["sam", "esam of all rows", "gsam"])
def test_accumulated_batches_are_perturbed_each_by_itself(name, clip):
    net = Net(name)
    loop, schedule = by_hand_of(name, net)
    trainer = fit(net, accumulate_grad_batches=2, gradient_clip_val=clip)
    loop.train(DATA, schedule, accumulated=2, clip=clip)
    loop.assert_equals(net.net)
    assert trainer.global_step == 3
    assert net.calls == {"before_step": 3, "after_backward": 6, "zero_grad": 3}


@pytest.mark.parametrize(
    ("name", "automatic"), [("sam", True), ("gsam", True), ("looksam", True), *((name, False) for name in OF_ALL)]
)
def test_bf16_mixed(name, automatic):
    net = Net(name, automatic, batchnorm=False)
    expected = by_plain_steps(name, net.net, lambda model, x: model(x), DATA)
    fit(net, precision="bf16-mixed")
    assert_same_weights(net.net, expected)


@pytest.mark.parametrize("name", METHODS)
def test_manual_optimization(name):
    net = Net(name, automatic=False)
    loop, schedule = by_hand_of(name, net)
    trainer = fit(net)
    loop.train(DATA, schedule)
    loop.assert_equals(net.net, buffers=True)
    assert trainer.callback_metrics["loss"].item() == pytest.approx(sum(loop.first) / 6, abs=1e-6)
    assert trainer.global_step == 6
    assert net.calls["before_step"] == 6


class ByTwoSteps(Net):
    """davda54's loop."""

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        self.manual_backward(self.losses(*batch).mean())
        opt.first_step(zero_grad=True)
        self.manual_backward(self.losses(*batch).mean())
        if batch_idx % 2:
            opt.second_step(zero_grad=True)
        else:
            opt.step()
            opt.zero_grad()
        self.lr_schedulers().step()


@pytest.mark.parametrize("name", ["sam", "gsam"])
def test_manual_optimization_by_two_steps(name):
    net = ByTwoSteps(name, automatic=False)
    loop, schedule = by_hand_of(name, net)
    trainer = fit(net)
    loop.train(DATA, schedule)
    loop.assert_equals(net.net)
    assert trainer.global_step == 6


@pytest.mark.parametrize(("name", "automatic"), [("looksam", True), ("esam", False)])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(name, automatic, tmp_path):
    whole, part = Net(name, automatic), Net(name, automatic)
    fit(whole, max_epochs=2)
    trainer = fit(part, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Net(name, automatic)
    fit(resumed, max_epochs=2, ckpt_path=str(tmp_path / "one.ckpt"))
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


class WithPast(Net):
    """With SAF or MESA as its loss, on top of SAM or of plain SGD."""

    def __init__(self, past, inside):
        super().__init__("sam")
        self.inside = inside
        if past == "saf":
            self.past = SAF(num_samples=24, num_classes=3, lam=1.0, lag=1, start_epoch=1)
        else:
            self.past = MESA(self.net, lam=1.0, decay=0.9, start_epoch=1)

    def on_train_epoch_start(self):
        self.past.set_epoch(self.current_epoch + 1)

    def training_step(self, batch, batch_idx):
        x, y, ids = batch
        return self.past(self.net(x), y, ids if isinstance(self.past, SAF) else x)

    def configure_optimizers(self):
        if self.inside == "sam":
            opt = SAM(self.net.parameters(), torch.optim.SGD, rho=0.1, **SGD)
        else:
            opt = torch.optim.SGD(self.net.parameters(), **SGD)
        if isinstance(self.past, MESA):
            self.past.attach(opt)
        return opt


@pytest.mark.parametrize("inside", ["sgd", "sam"])
@pytest.mark.parametrize("past", ["saf", "mesa"])
def test_losses_of_the_trajectory(past, inside):
    net = WithPast(past, inside)
    data = [(*DATA[i], torch.arange(12) + 12 * i) for i in (0, 1)]
    loop = ByHand(inside, copy.deepcopy(net.net), None, torch.optim.SGD, {"rho": 0.1} if inside == "sam" else {}, **SGD)
    oracle = ORACLES[past](loop.model, {"lam": 1.0, "lag": 1, "start_epoch": 1, "decay": 0.9})
    trainer = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SAMCallback()] if inside == "sam" else [],
    )
    trainer.fit(net, DataLoader(data, batch_size=None))
    for epoch in range(1, 5):
        recorded = []
        for x, y, ids in data:
            first = []

            def losses(x, y, ids, epoch=epoch, first=first):
                z = loop.model(x)
                first.append(z.detach())
                return oracle.losses(z, x, y, ids, epoch)

            loop.losses = losses
            loop.step(loop.gradient(x, y, ids))
            if past == "mesa":
                oracle.after_step(first[0], ids, epoch)
            recorded.append(first[0].half().double())
        if past == "saf":
            oracle.records[epoch] = torch.cat(recorded)
    loop.assert_equals(net.net)


@pytest.mark.parametrize("automatic", [True, False])
def test_steps_that_a_schedule_leaves_to_the_base(automatic):
    class Every2(Net):
        def configure_optimizers(self):
            opt = SAM(self.parameters(), torch.optim.SGD, rho=0.1, when=Every(2), **SGD)
            return [opt], [{"scheduler": LambdaLR(opt, decay), "interval": "step"}]

    net = Every2("sam", automatic)
    loop, schedule = by_hand_of("sam", net)
    active = SAM([torch.nn.Parameter(torch.zeros(1))], torch.optim.SGD, lr=0.1, when=Every(2))
    fit(net)
    for x, y in DATA:
        loop.options["rho"] = 0.1 if active.needs_second_pass else 0.0
        active.backward(lambda: active.param_groups[0]["params"][0].sum())
        active.step()
        loop.step(loop.gradient(x, y))
        schedule.step()
    loop.assert_equals(net.net)


def test_automatic_optimization_of_methods_that_need_rows_names_the_way_out():
    for name in ("esam", "msam"):
        with pytest.raises(
            RuntimeError, match=r"needs one loss for each row.*automatic_optimization = False.*backward"
        ):
            fit(Net(name))


def test_another_optimizer_is_refused():
    class Plain(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(TypeError, match="what configure_optimizers returns, got SGD"):
        fit(Plain())


@pytest.mark.parametrize("fails_in", [1, 2])
def test_a_step_that_fails_leaves_weights_and_module_as_they_were(fails_in):
    class Failing(Net):
        forwards = 0

        def training_step(self, batch, batch_idx):
            self.forwards += 1
            if self.forwards == 2 + fails_in:
                raise ValueError("planted")
            return super().training_step(batch, batch_idx)

    net = Failing("sam", batchnorm=False)
    loop, _ = by_hand_of("sam", net)
    with pytest.raises(ValueError, match="planted"):
        fit(net)
    loop.step(loop.gradient(*DATA[0]))
    loop.assert_equals(net.net)
    assert type(net) is Failing


def test_a_step_that_training_step_skips():
    class Skipping(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    net = Skipping("sam", batchnorm=False)
    loop, schedule = by_hand_of("sam", net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(net)
    for i, (x, y) in enumerate(DATA):
        if i != 2:
            loop.step(loop.gradient(x, y))
        schedule.step()
    loop.assert_equals(net.net)
