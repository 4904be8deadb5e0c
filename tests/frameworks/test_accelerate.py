"""accelerate: `opt.optimizer.backward(losses, *batch, backward=accelerator.backward)`, beside loops written by hand."""

import pytest
import torch

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from by_hand import (
    METHODS,
    SGD,
    assert_same_weights,
    by_hand,
    by_plain_steps,
    decay,
    train_trajectory,
)
from problems import batches, losses_of, mlp
from torch.optim.lr_scheduler import LambdaLR

DATA = batches(6, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepared(name, model, **options):
    accelerator = Accelerator(cpu=True, **options)
    cls, own = METHODS[name]
    opt = cls(model.parameters(), torch.optim.SGD, **own, **SGD)
    model, opt, schedule = accelerator.prepare(model, opt, LambdaLR(opt, decay))
    opt.optimizer.bind(model)
    return accelerator, model, opt, schedule


def train(accelerator, model, opt, schedule, data=DATA, clip=None):
    losses = losses_of(model)
    for x, y in data:
        with accelerator.accumulate(model):
            opt.optimizer.backward(losses, x, y, backward=accelerator.backward)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
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


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("name", ["sam", "esam", "gsam"])
def test_accumulated_batches_are_perturbed_each_by_itself(name, clip):
    model = mlp(torch.float32, batchnorm=True)
    loop, schedule = by_hand(name, model)
    train(*prepared(name, model, gradient_accumulation_steps=2), clip=clip)
    loop.train(DATA, schedule, accumulated=2, clip=clip)
    loop.assert_equals(model)


@pytest.mark.parametrize("name", METHODS)
def test_bf16(name):
    model = mlp(torch.float32)
    expected = by_plain_steps(name, model, lambda model, x: model(x), DATA)
    train(*prepared(name, model, mixed_precision="bf16"))
    assert_same_weights(model, expected)


def test_a_closure():
    model = mlp(torch.float32, batchnorm=True)
    loop, schedule = by_hand("sam", model)
    accelerator, model, opt, prepared_schedule = prepared("sam", model)
    for x, y in DATA:

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = losses_of(model)(x, y).mean()
            accelerator.backward(loss)
            return loss

        opt.step(closure)
        prepared_schedule.step()
        loop.step(loop.gradient(x, y))
        schedule.step()
    loop.assert_equals(model)


@pytest.mark.parametrize("name", ["esam", "looksam"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(name, tmp_path):
    whole = mlp(torch.float32, batchnorm=True)
    parts = prepared(name, whole)
    train(*parts, data=DATA[:3])
    parts[0].save_state(str(tmp_path / "state"))
    train(*parts, data=DATA[3:])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    resumed = mlp(torch.float32, batchnorm=True, seed=2)
    parts = prepared(name, resumed)
    parts[0].load_state(str(tmp_path / "state"))
    train(*parts, data=DATA[3:])
    for p, q in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("inside", ["sgd", "sam"])
@pytest.mark.parametrize("past", ["saf", "mesa"])
def test_losses_of_the_trajectory(past, inside):
    model = mlp(torch.float32, batchnorm=True)
    accelerator = Accelerator(cpu=True)

    def prepare(opt):
        prepared = accelerator.prepare(opt)

        def step(losses, *batch):
            if inside == "sam":
                prepared.optimizer.backward(losses, *batch, backward=accelerator.backward)
            else:
                accelerator.backward(losses(*batch).mean())
            prepared.step()
            prepared.zero_grad()

        return step

    train_trajectory(past, inside, model, prepare).assert_equals(model)


def test_a_loop_without_passes_is_refused():
    accelerator, model, opt, _ = prepared("sam", mlp(torch.float32))
    accelerator.backward(losses_of(model)(*DATA[0]).mean())
    with pytest.raises(RuntimeError, match=r"plain SGD step: nothing is perturbed\. Call opt\.backward"):
        opt.step()
