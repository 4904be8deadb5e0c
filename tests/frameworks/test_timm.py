"""timm: its loop with `SAMScaler`, with its own scaler by first_step() and step(), and its optimizers as bases."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm")

import timm
from by_hand import METHODS, SGD, ByHand, assert_same_weights, by_hand, by_plain_steps, decay, halved, train_trajectory
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, dispatch_clip_grad
from torch.optim.lr_scheduler import LambdaLR

from fastsam import SAM
from fastsam.integrations.timm import SAMScaler

GENERATOR = torch.Generator().manual_seed(0)
DATA = [
    (torch.randn(6, 3, 32, 32, generator=GENERATOR), torch.randint(0, 3, (6,), generator=GENERATOR)) for _ in range(4)
]
CLIPS = [None, ("norm", 0.3), ("value", 0.02), ("agc", 0.02)]


def vit(seed=1):
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=3, pretrained=False
    )


def losses_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def optimizer(name, model):
    cls, own = METHODS[name]
    return cls(model.parameters(), torch.optim.SGD, model=model, **own, **SGD)


def clipped_step(loop, clip, *gradients):
    if clip is None:
        loop.step(*gradients)
        return
    for p, *parts in zip(loop.params, *gradients, strict=True):
        p.grad = sum(parts)
    dispatch_clip_grad(loop.params, clip[1], mode=clip[0])
    loop.step([p.grad.clone() for p in loop.params])


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_timms_loop(name, clip):
    model = vit()
    opt, scaler = optimizer(name, model), SAMScaler(device="cpu")
    loop, schedule = by_hand(name, model, losses_of)
    own_schedule = LambdaLR(opt, decay)
    for batch in DATA:
        clips = {} if clip is None else {"clip_mode": clip[0], "clip_grad": clip[1], "parameters": model.parameters()}
        loss = scaler(losses_of(model), opt, batch=batch, **clips)
        opt.zero_grad()
        own_schedule.step()
        clipped_step(loop, clip, loop.gradient(*batch))
        schedule.step()
        assert loss.item() == pytest.approx(loop.first[-1], abs=1e-5)
    loop.assert_equals(model)


@pytest.mark.parametrize("name", ["sam", "esam", "gsam"])
def test_accumulated_batches(name):
    model = vit()
    opt, scaler = optimizer(name, model), SAMScaler(device="cpu", enabled=False)
    loop, _ = by_hand(name, model, losses_of)
    for i in range(0, 4, 2):
        for k in (0, 1):
            scaler(losses_of(model), opt, batch=DATA[i + k], need_update=k == 1, accum_steps=2)
        opt.zero_grad()
        loop.step(*(halved(loop.gradient(*DATA[i + k])) for k in (0, 1)))
    loop.assert_equals(model)


@pytest.mark.parametrize("name", METHODS)
def test_bf16(name):
    model = vit()
    expected = by_plain_steps(name, model, lambda model, x: model(x), DATA, schedules=lambda _: 1.0)
    opt, scaler = optimizer(name, model), SAMScaler(device="cpu", enabled=False)

    def losses(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            z = model(x)
        return F.cross_entropy(z.float(), y, reduction="none")

    for batch in DATA:
        scaler(losses, opt, batch=batch)
        opt.zero_grad()
    assert_same_weights(model, expected)


def test_timms_own_scaler_ends_a_first_step():
    """`step()` after `first_step()`, also under a GradScaler, which the perturbation does not see."""
    model = vit()
    opt, scaler = optimizer("sam", model), NativeScaler(device="cpu")
    loop, _ = by_hand("sam", model, losses_of)
    scale = scaler._scaler.scale
    for batch in DATA:
        scale(losses_of(model)(*batch).mean()).backward()
        opt.first_step(zero_grad=True)
        loss = losses_of(model)(*batch).mean()
        scaler(loss, opt, clip_grad=0.3, parameters=model.parameters())
        opt.zero_grad()
        clipped_step(loop, ("norm", 0.3), loop.gradient(*batch))
    loop.assert_equals(model)


def test_timms_parts_around_it():
    """Layer decay's groups, a scheduler that writes them, and an average of the weights."""
    model = vit()
    other = copy.deepcopy(model)
    built = [create_optimizer_v2(m, "sgd", lr=0.1, weight_decay=0.01, layer_decay=0.7) for m in (model, other)]
    opt = SAM.wrap(built[0], rho=0.1, model=model)
    schedules = [CosineLRScheduler(o, t_initial=4) for o in (opt, built[1])]
    averages = [ModelEmaV3(m, decay=0.5) for m in (model, other)]
    loop = ByHand("sam", other, losses_of(other), torch.optim.SGD, {"rho": 0.1}, lr=0.1)
    loop.base = built[1]
    for i, batch in enumerate(DATA):
        opt.step(losses_of(model), *batch)
        opt.zero_grad()
        loop.step(loop.gradient(*batch))
        for schedule in schedules:
            schedule.step(i + 1)
        averages[0].update(model)
        averages[1].update(other)
    loop.assert_equals(model)
    for p, q in zip(averages[0].module.parameters(), averages[1].module.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("inside", ["sgd", "sam"])
@pytest.mark.parametrize("past", ["saf", "mesa"])
def test_losses_of_the_trajectory(past, inside):
    """With timm's own scaler around SGD, and ours around SAM."""
    model = vit()
    data = [(*DATA[i], torch.arange(6) + 6 * i) for i in (0, 1)]

    def prepare(opt):
        scaler = (SAMScaler if inside == "sam" else NativeScaler)(device="cpu")

        def step(losses, *batch):
            if inside == "sam":
                scaler(losses, opt, batch=batch)
            else:
                scaler(losses(*batch), opt)
            opt.zero_grad()

        return step

    train_trajectory(past, inside, model, prepare, data).assert_equals(model)


class Run:
    """timm's training in epochs, as its script puts the parts together."""

    def __init__(self, name, seed=1):
        self.model, (cls, own) = vit(seed), METHODS[name]
        built = create_optimizer_v2(self.model, "adamw", lr=0.01, weight_decay=0.01, layer_decay=0.7)
        self.opt = cls.wrap(built, model=self.model, **own)
        self.scaler, self.schedule = SAMScaler(device="cpu"), None

    def train(self, epochs):
        if self.schedule is None:
            self.schedule = CosineLRScheduler(self.opt, t_initial=4)
        for epoch in epochs:
            for batch in DATA[:3]:
                self.scaler(
                    losses_of(self.model), self.opt, batch=batch, clip_grad=0.3, parameters=self.model.parameters()
                )
                self.opt.zero_grad()
            self.schedule.step(epoch + 1)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(name, tmp_path):
    """The checkpoint and its loading are timm's own, which reads weights only; its scheduler's state goes beside it."""
    whole, resumed = Run(name), Run(name, seed=2)
    whole.train(range(2))
    saver = CheckpointSaver(whole.model, whole.opt, amp_scaler=whole.scaler, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=1)
    of_schedule = copy.deepcopy(whole.schedule.state_dict())
    whole.train(range(2, 4))

    epoch = resume_checkpoint(resumed.model, str(tmp_path / "last.pth.tar"), resumed.opt, resumed.scaler)
    assert epoch == 2
    resumed.schedule = CosineLRScheduler(resumed.opt, t_initial=4)
    resumed.schedule.load_state_dict(of_schedule)
    # as timm's script does, since the scheduler was built after the optimizer was loaded
    resumed.schedule.step(epoch)
    resumed.train(range(2, 4))
    for p, q in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    assert [g["lr"] for g in whole.opt.param_groups] == [g["lr"] for g in resumed.opt.param_groups]
    assert whole.scaler.state_dict() == resumed.scaler.state_dict()
    assert whole.schedule.state_dict() == resumed.schedule.state_dict()


def test_what_is_refused():
    model, (x, y) = vit(), DATA[0]
    opt, scaler = optimizer("sam", model), SAMScaler(device="cpu")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(TypeError, match=r"takes the loss function.*got Tensor.*batch=\(input, target\)"):
        scaler(losses_of(model)(x, y).mean(), opt)
    with pytest.raises(TypeError, match=r"needs an optimizer of fastsam.*got SGD"):
        scaler(losses_of(model), torch.optim.SGD(model.parameters(), lr=0.1), batch=(x, y))
    with pytest.raises(ValueError, match="clip_grad needs parameters"):
        scaler(losses_of(model), opt, batch=(x, y), clip_grad=1.0)
    with pytest.raises(ValueError, match="create_graph"):
        scaler(losses_of(model), opt, batch=(x, y), create_graph=True)
    with pytest.raises(RuntimeError, match="plain SGD step: nothing is perturbed"):
        NativeScaler(device="cpu")(losses_of(model)(x, y).mean(), opt)
    assert all(map(torch.equal, model.parameters(), before))
