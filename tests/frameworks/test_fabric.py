"""Lightning's Fabric: `opt.backward(losses, *batch, backward=fabric.backward)`, beside loops written by hand."""

import pytest
import torch

pytest.importorskip("lightning")

from by_hand import (
    METHODS,
    SGD,
    assert_same_weights,
    by_hand,
    by_plain_steps,
    decay,
    train_trajectory,
)
from lightning.fabric import Fabric
from problems import batches, losses_of, mlp
from torch.optim.lr_scheduler import LambdaLR

DATA = batches(6, dtype=torch.float32)


def prepared(name, model, **options):
    fabric = Fabric(accelerator="cpu", devices=1, **options)
    cls, own = METHODS[name]
    opt = cls(model.parameters(), torch.optim.SGD, **own, **SGD)
    schedule = LambdaLR(opt, decay)
    model, opt = fabric.setup(model, opt)
    opt.bind(model)
    return fabric, model, opt, schedule


def train(fabric, model, opt, schedule, data=DATA, clip=None, accumulated=1):
    losses = losses_of(model)
    for i, (x, y) in enumerate(data):
        is_last = (i + 1) % accumulated == 0
        with fabric.no_backward_sync(model, enabled=not is_last):
            opt.backward(losses, x, y, backward=lambda loss: fabric.backward(loss / accumulated))
        if is_last:
            if clip is not None:
                fabric.clip_gradients(model, opt, max_norm=clip)
            opt.step()
            schedule.step()
            opt.zero_grad()


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("name", METHODS)
def test_every_batch_is_a_step(name, clip):
    model = mlp(torch.float32, batchnorm=True)
    loop, schedule = by_hand(name, model)
    train(*prepared(name, model), clip=clip)
    loop.train(DATA, schedule, clip=clip)
    loop.assert_equals(model, buffers=True)


@pytest.mark.filterwarnings("ignore:.*no_backward_sync.*")
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("name", ["sam", "esam", "gsam"])
def test_accumulated_batches_are_perturbed_each_by_itself(name, clip):
    model = mlp(torch.float32, batchnorm=True)
    loop, schedule = by_hand(name, model)
    train(*prepared(name, model), clip=clip, accumulated=2)
    loop.train(DATA, schedule, accumulated=2, clip=clip)
    loop.assert_equals(model)


@pytest.mark.parametrize("name", METHODS)
def test_bf16_mixed(name):
    model = mlp(torch.float32)
    expected = by_plain_steps(name, model, lambda model, x: model(x), DATA)
    train(*prepared(name, model, precision="bf16-mixed"))
    assert_same_weights(model, expected)


def test_a_closure_and_two_steps():
    model = mlp(torch.float32, batchnorm=True)
    loop, schedule = by_hand("sam", model)
    fabric, model, opt, own_schedule = prepared("sam", model)
    for i, (x, y) in enumerate(DATA):

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = losses_of(model)(x, y).mean()
            fabric.backward(loss)
            return loss

        if i % 2:
            opt.step(closure)
            opt.zero_grad()
        else:
            closure()
            opt.first_step(zero_grad=True)
            fabric.backward(losses_of(model)(x, y).mean())
            opt.second_step(zero_grad=True)
        own_schedule.step()
        loop.step(loop.gradient(x, y))
        schedule.step()
    loop.assert_equals(model.module)


@pytest.mark.parametrize("name", ["esam", "looksam"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(name, tmp_path):
    whole = mlp(torch.float32, batchnorm=True)
    fabric, model, opt, schedule = prepared(name, whole)
    train(fabric, model, opt, schedule, data=DATA[:3])
    fabric.save(tmp_path / "state.ckpt", {"model": model, "opt": opt, "schedule": schedule})
    train(fabric, model, opt, schedule, data=DATA[3:])
    resumed = mlp(torch.float32, batchnorm=True, seed=2)
    fabric, model, opt, schedule = prepared(name, resumed)
    fabric.load(tmp_path / "state.ckpt", {"model": model, "opt": opt, "schedule": schedule})
    train(fabric, model, opt, schedule, data=DATA[3:])
    for p, q in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("inside", ["sgd", "sam"])
@pytest.mark.parametrize("past", ["saf", "mesa"])
def test_losses_of_the_trajectory(past, inside):
    model, fabric = mlp(torch.float32, batchnorm=True), Fabric(accelerator="cpu", devices=1)

    def prepare(opt):
        prepared = fabric.setup_optimizers(opt)

        def step(losses, *batch):
            if inside == "sam":
                prepared.backward(losses, *batch, backward=fabric.backward)
            else:
                fabric.backward(losses(*batch).mean())
            prepared.step()
            prepared.zero_grad()

        return step

    train_trajectory(past, inside, model, prepare).assert_equals(model)


def test_a_loop_without_passes_is_refused():
    fabric, model, opt, _ = prepared("sam", mlp(torch.float32))
    fabric.backward(losses_of(model)(*DATA[0]).mean())
    with pytest.raises(RuntimeError, match=r"plain SGD step: nothing is perturbed\. Call opt\.backward"):
        opt.step()
