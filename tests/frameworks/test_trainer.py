"""Hugging Face's Trainer with `SAMTrainerMixin`, number by number beside loops written by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from by_hand import METHODS, SGD, ByHand, assert_same_weights, by_plain_steps, decay, halved
from methods import ORACLES
from texts import ROWS, bert, classified, continued, gpt2, stacked
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments

from fastsam import ESAM, MESA, SAF, SAM
from fastsam.integrations.transformers import SAMTrainerMixin


class SAMTrainer(SAMTrainerMixin, Trainer):
    pass


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": ROWS,
        "num_train_epochs": 1,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def optimizer(name, model, **keywords):
    cls, options = METHODS[name]
    opt = cls(model.parameters(), torch.optim.SGD, **options, **SGD, **keywords)
    return opt, LambdaLR(opt, decay)


def by_hand(name, model, losses):
    loop = ByHand(name, model, losses, torch.optim.SGD, METHODS[name][1] if name in METHODS else {}, **SGD)
    return loop, LambdaLR(loop.base, decay)


def train(model, data, args, optimizers, cls=SAMTrainer, **keywords):
    trainer = cls(model, args, train_dataset=data, optimizers=optimizers, **keywords)
    trainer.train()
    return trainer


def logged(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def row_losses(model):
    def losses(ids, labels):
        return F.cross_entropy(model(input_ids=ids).logits, labels, reduction="none")

    return losses


def token_sums(model, smoothing=0.0):
    """The sum of the token losses of each row."""

    def losses(ids, labels):
        logits = model(input_ids=ids).logits.float()[:, :-1]
        shape = labels[:, 1:].shape
        tokens = F.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none", label_smoothing=smoothing
        )
        return tokens.view(shape).sum(1)

    return losses


def tokens_of(labels):
    return (labels[:, 1:] != -100).sum().item()


@pytest.mark.parametrize("name", METHODS)
def test_classification_with_clipping_and_a_scheduler(name, tmp_path):
    model, data = bert(), classified(5)
    loop, schedule = by_hand(name, copy.deepcopy(model), None)
    loop.losses = row_losses(loop.model)
    trainer = train(model, data, arguments(tmp_path, max_grad_norm=0.3), optimizer(name, model))
    assert trainer.optimizer.optimizer.model is model
    for i in range(5):
        loop.step(loop.gradient(*stacked(data, i * ROWS)), clip=0.3)
        schedule.step()
    loop.assert_equals(model)
    torch.testing.assert_close(logged(trainer), loop.first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["sam", "gsam"])
def test_the_token_mean_over_accumulated_batches(name, smoothing, tmp_path):
    """Every micro-batch is perturbed by itself, and each token of the step counts the same."""
    model, data = gpt2(), continued(6)
    loop, schedule = by_hand(name, copy.deepcopy(model), None)
    loop.losses = token_sums(loop.model, smoothing)
    args = arguments(tmp_path, gradient_accumulation_steps=2, label_smoothing_factor=smoothing)
    trainer = train(model, data, args, optimizer(name, model))
    means = []
    for i in range(0, 6, 2):
        parts = [stacked(data, (i + k) * ROWS) for k in (0, 1)]
        total = sum(tokens_of(labels) for _, labels in parts)
        # the oracle takes the mean over rows
        gradients = [[g * ROWS / total for g in loop.gradient(*part)] for part in parts]
        means.append(sum(loop.first[-2:]) * ROWS / total)
        loop.step(*gradients)
        schedule.step()
    loop.assert_equals(model)
    torch.testing.assert_close(logged(trainer), means, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_shards_of_a_language_model(smoothing, tmp_path):
    """mSAM's shards, with unequal numbers of tokens, of accumulated batches: each token counts the same."""
    model, data = gpt2(), continued(6)
    loop, schedule = by_hand("sam", copy.deepcopy(model), None)
    loop.losses = token_sums(loop.model, smoothing)
    args = arguments(tmp_path, gradient_accumulation_steps=2, label_smoothing_factor=smoothing)
    train(model, data, args, optimizer("msam", model))
    for i in range(0, 6, 2):
        # three shards of eight rows
        sizes = ((0, 3), (3, 3), (6, 2))
        shards = [stacked(data, (i + k) * ROWS + start, n) for k in (0, 1) for start, n in sizes]
        total = sum(tokens_of(labels) for _, labels in shards)
        loop.step(*([g * len(shard[0]) / total for g in loop.gradient(*shard)] for shard in shards))
        schedule.step()
    loop.assert_equals(model)


def test_selected_rows_of_a_language_model(tmp_path):
    """ESAM's delta of a row is the sum over its tokens, and the rows chosen count by their tokens."""
    model, data = gpt2(), continued(4)
    other = copy.deepcopy(model)
    base = torch.optim.SGD(other.parameters(), **SGD)
    schedule, sums, params = LambdaLR(base, decay), token_sums(other), list(other.parameters())
    opt = ESAM(model.parameters(), torch.optim.SGD, rho=0.1, beta=1.0, gamma=0.5, **SGD)
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    train(model, data, args, (opt, LambdaLR(opt, decay)))
    for i in range(0, 4, 2):
        parts = [stacked(data, (i + k) * ROWS) for k in (0, 1)]
        total, d = sum(tokens_of(y) for _, y in parts), [torch.zeros_like(p) for p in params]
        for x, y in parts:
            first = sums(x, y)
            g = torch.autograd.grad(first.sum(), params)
            norm = sum((g_n**2).sum() for g_n in g).sqrt() + 1e-12
            w = [p.detach().clone() for p in params]
            with torch.no_grad():
                for p, g_n in zip(params, g, strict=True):
                    p.add_(0.1 * g_n / norm)
            rows = (sums(x, y) - first).detach().argsort(descending=True)[: ROWS // 2]
            # the part's share of all tokens, in the mean over those of the rows chosen
            loss = sums(x[rows], y[rows]).sum() / tokens_of(y[rows]) * (tokens_of(y) / total)
            for d_n, v in zip(d, torch.autograd.grad(loss, params), strict=True):
                d_n += v
            with torch.no_grad():
                for p, w_n in zip(params, w, strict=True):
                    p.copy_(w_n)
        for p, d_n in zip(params, d, strict=True):
            p.grad = d_n
        base.step()
        schedule.step()
    for p, q in zip(params, model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_heads_that_ignore_the_number_of_items(tmp_path):
    """The Trainer takes the loss of each accumulated batch, a mean, for its share of all items, and adds them up."""
    model, data = bert(), classified(4)
    loop, schedule = by_hand("sam", copy.deepcopy(model), None)
    loop.losses = row_losses(loop.model)
    train(model, data, arguments(tmp_path, gradient_accumulation_steps=2), optimizer("sam", model))
    for i in (0, 2):
        loop.step(*(loop.gradient(*stacked(data, (i + k) * ROWS)) for k in (0, 1)))
        schedule.step()
    loop.assert_equals(model)


class MeansOfRows(SAMTrainer):
    """With losses of its own, whose mean over the micro-batches counts."""

    def compute_losses(self, model, inputs, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"]).logits
        return F.cross_entropy(logits.float(), inputs["labels"], reduction="none")


@pytest.mark.parametrize("cls", [SAMTrainer, MeansOfRows])
def test_losses_of_rows_over_accumulated_batches(cls, tmp_path):
    model, data = bert(), classified(4)
    loop, schedule = by_hand("esam", copy.deepcopy(model), None)
    loop.losses = row_losses(loop.model)
    trainer = train(model, data, arguments(tmp_path, gradient_accumulation_steps=2), optimizer("esam", model), cls)
    for i in (0, 2):
        loop.step(*(halved(loop.gradient(*stacked(data, (i + k) * ROWS))) for k in (0, 1)))
        schedule.step()
    loop.assert_equals(model)
    torch.testing.assert_close(logged(trainer), [sum(loop.first[i : i + 2]) / 2 for i in (0, 2)], rtol=1e-4, atol=1e-4)


def test_a_loss_function_of_the_trainers(tmp_path):
    model, data = bert(), classified(4)
    loop, schedule = by_hand("sam", copy.deepcopy(model), None)

    def loss_func(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits * 2, labels, reduction="sum") / num_items_in_batch

    loop.losses = lambda ids, y: F.cross_entropy(loop.model(input_ids=ids).logits * 2, y, reduction="none")
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    train(model, data, args, optimizer("sam", model), compute_loss_func=loss_func)
    for i in (0, 2):
        loop.step(*(halved(loop.gradient(*stacked(data, (i + k) * ROWS))) for k in (0, 1)))
        schedule.step()
    loop.assert_equals(model)


class RowsTrainer(MeansOfRows):
    """Whose loss is computed outside the autocast, as the losses of rows are."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.compute_losses(model, inputs).mean()


@pytest.mark.parametrize("name", METHODS)
def test_bf16(name, tmp_path):
    """Which accelerate runs as an autocast around the model's forward."""
    model, data = bert(), classified(4)
    batches = [stacked(data, i * ROWS) for i in range(4)]
    expected = by_plain_steps(name, model, lambda model, ids: model(input_ids=ids).logits, batches)
    trainer = train(model, data, arguments(tmp_path, bf16=True), optimizer(name, model), RowsTrainer)
    assert trainer.accelerator.mixed_precision == "bf16"
    assert_same_weights(model, expected)


@pytest.mark.parametrize("name", ["esam", "looksam"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(name, tmp_path):
    data, whole, part = classified(6), bert(), bert()
    train(whole, data, arguments(tmp_path / "whole"), optimizer(name, whole))
    args = arguments(tmp_path / "part", save_strategy="steps", save_steps=3)
    train(part, data, args, optimizer(name, part))
    resumed = bert(seed=2)
    trainer = SAMTrainer(resumed, arguments(tmp_path / "part"), train_dataset=data, optimizers=optimizer(name, resumed))
    trainer.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_optimizer_that_the_trainer_builds(tmp_path):
    model, data = bert(), classified(3)
    args = arguments(tmp_path, lr_scheduler_type="constant", weight_decay=0.0)
    made = SAM, {"base_optimizer": torch.optim.SGD, "rho": 0.1, **SGD}
    trainer = SAMTrainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=made)
    loop = ByHand("sam", copy.deepcopy(model), None, torch.optim.SGD, METHODS["sam"][1], **SGD)
    loop.losses = row_losses(loop.model)
    trainer.train()
    for i in range(3):
        loop.step(loop.gradient(*stacked(data, i * ROWS)))
    loop.assert_equals(model)


class TrajectoryTrainer(Trainer):
    """With SAF or MESA as its loss; the items carry their ids."""

    past = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        ids, labels = inputs.pop("sample_id"), inputs.pop("labels")
        logits = model(**inputs).logits
        return self.past(logits, labels, ids if isinstance(self.past, SAF) else inputs)


class TrajectorySAMTrainer(SAMTrainerMixin, TrajectoryTrainer):
    pass


class Epochs(TrainerCallback):
    def __init__(self, past):
        self.past = past

    def on_epoch_begin(self, args, state, control, **_):
        self.past.set_epoch(round(state.epoch) + 1)


@pytest.mark.parametrize("inside", ["sgd", "sam"])
@pytest.mark.parametrize("name", ["saf", "mesa"])
def test_losses_of_the_trajectory(name, inside, tmp_path):
    model, data = bert().eval(), classified(2)
    items = [{**item, "sample_id": i} for i, item in enumerate(data)]
    options = {"lam": 1.0, "lag": 1, "start_epoch": 1, "decay": 0.9}
    if name == "saf":
        past = SAF(num_samples=len(items), num_classes=3, lam=1.0, lag=1, start_epoch=1)
    else:
        past = MESA(model, lam=1.0, decay=0.9, start_epoch=1, output=lambda outputs: outputs.logits)
    loop, schedule = by_hand("sam" if inside == "sam" else "sgd", copy.deepcopy(model), None)
    oracle = ORACLES[name](LogitsOf(loop.model), options)
    opt, _ = optimizer("sam", model)
    opt = opt if inside == "sam" else torch.optim.SGD(model.parameters(), **SGD)
    if name == "mesa":
        past.attach(opt)
    cls = TrajectorySAMTrainer if inside == "sam" else TrajectoryTrainer
    trainer = cls(
        model,
        arguments(tmp_path, num_train_epochs=4),
        train_dataset=items,
        optimizers=(opt, LambdaLR(opt, decay)),
        callbacks=[Epochs(past)],
    )
    trainer.past = past
    trainer.train()
    for epoch in range(1, 5):
        recorded = {}
        for i in (0, ROWS):
            (x, y), ids, first = stacked(data, i), torch.arange(i, i + ROWS), []

            def losses(x, y, ids, epoch=epoch, first=first):
                z = loop.model(input_ids=x).logits
                first.append(z.detach())
                return oracle.losses(z, x, y, ids, epoch)

            loop.losses = losses
            loop.step(loop.gradient(x, y, ids))
            schedule.step()
            if name == "mesa":
                oracle.after_step(first[0], ids, epoch)
            recorded[i] = first[0].half().double()
        if name == "saf":
            oracle.records[epoch] = torch.cat([recorded[i] for i in sorted(recorded)])
    loop.assert_equals(model)


class LogitsOf(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits


def test_what_would_train_the_base_alone_is_refused(tmp_path):
    model, data = bert(), classified(2)
    with pytest.raises(RuntimeError, match=r"plain SGD step: nothing is perturbed.*opt\.backward"):
        train(model, data, arguments(tmp_path), optimizer("sam", model), Trainer)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"an optimizer of fastsam, handed over as Trainer\(optimizers=.*got SGD"):
        train(model, data, arguments(tmp_path), (base, LambdaLR(base, decay)))


def test_rows_of_an_unknown_kind_are_refused(tmp_path):
    model, data = bert(), [{**item, "labels": item["labels"].float()[None]} for item in classified(2)]
    with pytest.raises(TypeError, match=r"ESAM needs one loss for each row.*labels of shape \[8, 1\].*override"):
        train(model, data, arguments(tmp_path), optimizer("esam", model))
