"""skorch and ignite: the lines that docs/frameworks.md gives, beside loops written by hand."""

import pytest
import torch
from by_hand import (
    METHODS,
    PAST_DATA,
    SGD,
    Past,
    assert_same_weights,
    by_hand,
    by_plain_steps,
    decay,
    train_trajectory,
)
from problems import batches, losses_of, mlp
from torch.optim.lr_scheduler import LambdaLR

DATA = batches(6, dtype=torch.float32)
X, Y = (torch.cat(parts) for parts in zip(*DATA, strict=True))


def skorch_net(name, model, bf16=False, **keywords):
    skorch = pytest.importorskip("skorch")
    cls, options = METHODS[name]

    class SAMNet(skorch.NeuralNetClassifier):
        """Takes both passes with losses of the rows."""

        def train_step(self, batch, **fit_params):
            self._set_training(True)
            kept = {}

            def losses(x, y):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    predicted = self.infer(x, **fit_params).float()
                kept.setdefault("y_pred", predicted.detach())
                return torch.nn.functional.cross_entropy(predicted, y, reduction="none")

            self.optimizer_.zero_grad()
            loss = self.optimizer_.backward(losses, *batch)
            named = list(self.get_all_learnable_params())
            self.notify("on_grad_computed", named_parameters=named, batch=batch, training=True)
            self.optimizer_.step()
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


def clipping(clip):
    callbacks = pytest.importorskip("skorch.callbacks")
    return [] if clip is None else [callbacks.GradientNormClipping(gradient_clip_value=clip)]


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("name", METHODS)
def test_skorch_with_losses_of_rows(name, clip):
    """skorch's callbacks see the final gradient."""
    model = mlp(torch.float32, batchnorm=True)
    loop, schedule = by_hand(name, model)
    callbacks = pytest.importorskip("skorch.callbacks")
    scheduler = callbacks.LRScheduler(LambdaLR, lr_lambda=decay, step_every="batch")
    net = skorch_net(name, model, callbacks=[scheduler, *clipping(clip)])
    net.fit(X, Y)
    loop.train(DATA, schedule, clip=clip)
    loop.assert_equals(net.module_)
    assert net.history[-1]["train_loss"] == pytest.approx(sum(loop.first) / 6, abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_skorch_bf16(name):
    model = mlp(torch.float32)
    expected = by_plain_steps(name, model, lambda model, x: model(x), DATA, schedules=lambda _: 1.0)
    skorch_net(name, model, bf16=True).fit(X, Y)
    assert_same_weights(model, expected)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_skorch_as_it_is(clip):
    """Its own training step passes a closure, which clips in both passes; the length of the first does not count."""
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
        callbacks=clipping(clip),
    )
    net.fit(X, Y)
    for batch in DATA:
        loop.step(loop.gradient(*batch), clip=clip)
    loop.assert_equals(net.module_)
    # the accumulator keeps the first pass's
    assert net.history[-1]["train_loss"] == pytest.approx(sum(loop.first) / 6, abs=1e-5)


@pytest.mark.parametrize("inside", ["sgd", "sam"])
@pytest.mark.parametrize("past", ["saf", "mesa"])
def test_losses_of_the_trajectory_in_skorch(past, inside):
    """The loss is the criterion; ids are a second column of the targets."""
    skorch = pytest.importorskip("skorch")
    model = mlp(torch.float32, batchnorm=True)
    both = Past(past, inside, model)

    class Net(skorch.NeuralNet):
        def initialize_optimizer(self, *args, **kwargs):
            super().initialize_optimizer(*args, **kwargs)
            if past == "mesa":
                self.criterion_.attach(self.optimizer_)
            return self

        def on_epoch_begin(self, net, **kwargs):
            super().on_epoch_begin(net, **kwargs)
            self.criterion_.set_epoch(len(self.history))

        def get_loss(self, y_pred, y_true, X=None, training=False):
            classes, ids = y_true.unbind(1)
            return self.criterion_(y_pred, classes, ids if past == "saf" else X)

    own = {"base_optimizer": torch.optim.SGD, "rho": 0.1, "model": model} if inside == "sam" else {}
    net = Net(
        model,
        criterion=both.loss,
        optimizer=METHODS["sam"][0] if inside == "sam" else torch.optim.SGD,
        **{f"optimizer__{key}": value for key, value in {**own, **SGD}.items()},
        batch_size=12,
        max_epochs=4,
        iterator_train__shuffle=False,
        train_split=None,
        verbose=0,
    )
    x, y, ids = (torch.cat(parts) for parts in zip(*PAST_DATA, strict=True))
    net.fit(x, torch.stack([y, ids], 1))
    assert net.module_ is model
    both.train_by_hand(PAST_DATA).assert_equals(model)


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
    loop.train(DATA, schedule, clip=0.3)
    loop.assert_equals(model)
    torch.testing.assert_close(seen, loop.first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_ignite_bf16(name):
    engine = pytest.importorskip("ignite.engine")
    model = mlp(torch.float32)
    expected = by_plain_steps(name, model, lambda model, x: model(x), DATA, schedules=lambda _: 1.0)
    cls, options = METHODS[name]
    opt = cls(model.parameters(), torch.optim.SGD, model=model, **options, **SGD)

    def losses(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            z = model(x)
        return torch.nn.functional.cross_entropy(z.float(), y, reduction="none")

    engine.Engine(lambda _, batch: opt.step(losses, *batch).item()).run(DATA, max_epochs=1)
    assert_same_weights(model, expected)


def accumulating(engine, opt, model, own_schedule, accumulated=2, clip=None):
    """Return an engine that steps with every second batch, or with another number of them."""
    losses = losses_of(model)

    def update(engine, batch):
        loss = opt.backward(losses, *batch, backward=lambda loss: (loss / accumulated).backward())
        if engine.state.iteration % accumulated == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            opt.zero_grad()
            own_schedule.step()
        return loss.item()

    return engine.Engine(update)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("name", ["sam", "esam", "msam", "gsam"])
def test_ignite_accumulates_batches_that_are_perturbed_each_by_itself(name, clip):
    engine = pytest.importorskip("ignite.engine")
    model = mlp(torch.float32, batchnorm=True)
    loop, schedule = by_hand(name, model)
    cls, options = METHODS[name]
    opt = cls(model.parameters(), torch.optim.SGD, model=model, **options, **SGD)
    trainer, seen = accumulating(engine, opt, model, LambdaLR(opt, decay), clip=clip), []
    trainer.add_event_handler(engine.Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output))
    trainer.run(DATA, max_epochs=1)
    loop.train(DATA, schedule, accumulated=2, clip=clip)
    loop.assert_equals(model)
    torch.testing.assert_close(seen, loop.first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_ignite_goes_on_from_a_checkpoint_bit_for_bit(name, tmp_path):
    """With its own handler, at the end of an epoch."""
    engine, handlers = pytest.importorskip("ignite.engine"), pytest.importorskip("ignite.handlers")

    def parts(seed):
        model = mlp(torch.float32, batchnorm=True, seed=seed)
        cls, options = METHODS[name]
        opt = cls(model.parameters(), torch.optim.SGD, model=model, **options, **SGD)
        schedule = LambdaLR(opt, decay)
        trainer = accumulating(engine, opt, model, schedule, accumulated=1 if name == "looksam" else 2)
        return {"model": model, "opt": opt, "schedule": schedule, "trainer": trainer}

    whole, resumed = parts(1), parts(2)
    saver = handlers.Checkpoint(whole, handlers.DiskSaver(str(tmp_path), create_dir=False))
    whole["trainer"].add_event_handler(engine.Events.EPOCH_COMPLETED(once=1), saver)
    whole["trainer"].run(DATA, max_epochs=2)
    (file,) = tmp_path.iterdir()
    handlers.Checkpoint.load_objects(resumed, checkpoint=file)
    assert resumed["trainer"].state.epoch == 1
    resumed["trainer"].run(DATA)
    assert resumed["trainer"].state.iteration == 12
    for p, q in zip(whole["model"].state_dict().values(), resumed["model"].state_dict().values(), strict=True):
        assert torch.equal(p, q)


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
