"""skorch and ignite: the lines that docs/frameworks.md gives, beside loops written by hand."""

import copy

import pytest
import torch
from by_hand import METHODS, SGD, ByHand, decay, train_trajectory
from problems import batches, losses_of, mlp
from torch.optim.lr_scheduler import LambdaLR

DATA = batches(6, dtype=torch.float32)
X, Y = (torch.cat(parts) for parts in zip(*DATA, strict=True))


def by_hand(name, model):
    loop = ByHand(name, copy.deepcopy(model), None, torch.optim.SGD, METHODS[name][1], **SGD)
    loop.losses = losses_of(loop.model)
    return loop, LambdaLR(loop.base, decay)


def skorch_net(name, model, **keywords):
    skorch = pytest.importorskip("skorch")
    cls, options = METHODS[name]

    class SAMNet(skorch.NeuralNetClassifier):
        """Takes both passes with losses of the rows."""

        def train_step(self, batch, **fit_params):
            self._set_training(True)
            kept = {}

            def losses(x, y):
                predicted = self.infer(x, **fit_params)
                kept.setdefault("y_pred", predicted.detach())
                return torch.nn.functional.cross_entropy(predicted, y, reduction="none")

            loss = self.optimizer_.step(losses, *batch)
            return {"loss": loss, **kept}

    optimizer = {f"optimizer__{key}": value for key, value in {**options, **SGD}.items()}
    return SAMNet(
        model,
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=cls,
        optimizer__base_optimizer=torch.optim.SGD,
        optimizer__model=model,
        **optimizer,
        batch_size=12,
        max_epochs=1,
        iterator_train__shuffle=False,
        train_split=None,
        verbose=0,
        **keywords,
    )


@pytest.mark.parametrize("name", METHODS)
def test_skorch_with_losses_of_rows(name):
    model = mlp(torch.float32, batchnorm=True)
    loop, schedule = by_hand(name, model)
    callbacks = pytest.importorskip("skorch.callbacks")
    net = skorch_net(name, model, callbacks=[callbacks.LRScheduler(LambdaLR, lr_lambda=decay, step_every="batch")])
    net.fit(X, Y)
    for batch in DATA:
        loop.step(loop.gradient(*batch))
        schedule.step()
    loop.assert_equals(net.module_)
    assert net.history[-1]["train_loss"] == pytest.approx(sum(loop.first) / 6, abs=1e-5)


def test_skorch_as_it_is():
    """Its own training step passes a closure."""
    skorch = pytest.importorskip("skorch")
    model = mlp(torch.float32, batchnorm=True)
    loop, _ = by_hand("sam", model)
    from fastsam import SAM

    net = skorch.NeuralNetClassifier(
        model,
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=SAM,
        optimizer__base_optimizer=torch.optim.SGD,
        optimizer__model=model,
        optimizer__rho=0.1,
        optimizer__momentum=0.9,
        lr=0.1,
        batch_size=12,
        max_epochs=1,
        iterator_train__shuffle=False,
        train_split=None,
        verbose=0,
    )
    net.fit(X, Y)
    for batch in DATA:
        loop.step(loop.gradient(*batch))
    loop.assert_equals(net.module_)
    # the accumulator keeps the first pass's
    assert net.history[-1]["train_loss"] == pytest.approx(sum(loop.first) / 6, abs=1e-5)


def test_skorch_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    whole = skorch_net("esam", mlp(torch.float32, batchnorm=True), warm_start=True)
    whole.fit(X, Y)
    files = {"f_params": tmp_path / "params.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    whole.save_params(**files)
    whole.fit(X, Y)
    resumed = skorch_net("esam", mlp(torch.float32, batchnorm=True, seed=2), warm_start=True)
    resumed.initialize()
    resumed.load_params(**files)
    resumed.fit(X, Y)
    for p, q in zip(whole.module_.state_dict().values(), resumed.module_.state_dict().values(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", METHODS)
def test_ignite_with_an_engine_of_its_own(name):
    engine = pytest.importorskip("ignite.engine")
    model = mlp(torch.float32, batchnorm=True)
    loop, schedule = by_hand(name, model)
    cls, options = METHODS[name]
    opt = cls(model.parameters(), torch.optim.SGD, model=model, **options, **SGD)
    own_schedule, losses = LambdaLR(opt, decay), losses_of(model)
    trainer = engine.Engine(lambda _, batch: opt.step(losses, *batch, clip_grad_norm=0.3).item())
    seen = []
    trainer.add_event_handler(engine.Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output))
    trainer.add_event_handler(engine.Events.ITERATION_COMPLETED, lambda _: own_schedule.step())
    trainer.run(DATA, max_epochs=1)
    for batch in DATA:
        loop.step(loop.gradient(*batch), clip=0.3)
        schedule.step()
    loop.assert_equals(model)
    torch.testing.assert_close(seen, loop.first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inside", ["sgd", "sam"])
@pytest.mark.parametrize("past", ["saf", "mesa"])
def test_losses_of_the_trajectory_in_ignite(past, inside):
    engine = pytest.importorskip("ignite.engine")
    model = mlp(torch.float32, batchnorm=True)

    def prepare(opt):
        def update(_, arguments):
            losses, batch = arguments
            opt.zero_grad()
            if inside == "sam":
                opt.step(losses, *batch)
            else:
                losses(*batch).mean().backward()
                opt.step()

        trainer = engine.Engine(update)
        return lambda losses, *batch: trainer.run([(losses, batch)], max_epochs=1)

    train_trajectory(past, inside, model, prepare).assert_equals(model)


def test_ignites_supervised_trainer_is_refused():
    engine = pytest.importorskip("ignite.engine")
    model = mlp(torch.float32)
    cls, options = METHODS["sam"]
    opt = cls(model.parameters(), torch.optim.SGD, **options, **SGD)
    before = [p.clone() for p in model.parameters()]
    trainer = engine.create_supervised_trainer(model, opt, torch.nn.CrossEntropyLoss())
    with pytest.raises(RuntimeError, match=r"plain SGD step: nothing is perturbed\. Call opt\.backward"):
        trainer.run(DATA, max_epochs=1)
    assert all(map(torch.equal, model.parameters(), before))
