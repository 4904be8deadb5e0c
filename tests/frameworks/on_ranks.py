"""What two processes train together in each framework, and what one process computes by hand for both."""

import os
import tempfile
import warnings

import foreign_torchvision  # noqa: F401
import torch
from by_hand import METHODS, SGD
from problems import batches, losses_of, mlp

WORLD = 2
DATA = batches(4, rows=24, dtype=torch.float32)


def enter(rank, port):
    """Surroundings of a process that torchrun has started."""
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "GROUP_RANK": "0"}


def own_rows(batch):
    """This rank's half of a batch."""
    rank = torch.distributed.get_rank()
    return tuple(t[12 * rank : 12 * rank + 12] for t in batch)


def clip_of(accumulated):
    """Steps of one batch are clipped; those of several are not, since clipping would hide a wrong factor."""
    return 0.3 if accumulated == 1 else None


def optimizer(name, model, **keywords):
    cls, options = METHODS[name]
    return cls(model.parameters(), torch.optim.SGD, **options, **SGD, **keywords)


def assert_equals(model, expected, tolerance=1e-6):
    """All ranks hold the same weights, bit for bit, and those that are expected."""
    for p, q in zip(model.parameters(), expected, strict=True):
        others = [torch.empty_like(p) for _ in range(WORLD)]
        torch.distributed.all_gather(others, p.detach())
        assert torch.equal(*others), "ranks have drifted apart"
        assert (p - q).abs().max().item() <= tolerance, f"differs by {(p - q).abs().max().item()}"


def by_accelerate(name, expected, port, accumulated=1, reduces_each_batch=False):
    enter(torch.distributed.get_rank(), port)
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    plugin = GradientAccumulationPlugin(num_steps=accumulated, sync_each_batch=reduces_each_batch)
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_plugin=plugin), mlp(torch.float32)
    opt = optimizer(name, model)
    wrapped, opt = accelerator.prepare(model, opt)
    assert type(wrapped).__name__ == "DistributedDataParallel"
    opt.optimizer.bind(wrapped)
    losses = losses_of(wrapped)
    for batch in DATA:
        with accelerator.accumulate(wrapped):
            opt.optimizer.backward(losses, *own_rows(batch), backward=accelerator.backward)
            if accumulated == 1:
                accelerator.clip_grad_norm_(wrapped.parameters(), clip_of(accumulated))
            opt.step()
            opt.zero_grad()
    assert_equals(model, expected)


def by_fabric(name, expected, port, accumulated=1):
    enter(torch.distributed.get_rank(), port)
    from lightning.fabric import Fabric

    fabric, model = Fabric(accelerator="cpu", devices=WORLD, strategy="ddp"), mlp(torch.float32)
    fabric.launch()
    wrapped, opt = fabric.setup(model, optimizer(name, model))
    opt.bind(wrapped)
    losses = losses_of(wrapped)
    for i, batch in enumerate(DATA):
        is_last = (i + 1) % accumulated == 0
        with fabric.no_backward_sync(wrapped, enabled=not is_last):
            opt.backward(losses, *own_rows(batch), backward=lambda loss: fabric.backward(loss / accumulated))
        if is_last:
            if accumulated == 1:
                fabric.clip_gradients(wrapped, opt, max_norm=clip_of(accumulated))
            opt.step()
            opt.zero_grad()
    assert_equals(model, expected)


def by_lightning(name, expected, port, accumulated=1, automatic=False):
    enter(torch.distributed.get_rank(), port)
    import lightning as L
    from torch.utils.data import DataLoader

    from fastsam.integrations.lightning import SAMCallback

    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization, self.net = automatic, mlp(torch.float32)

        def losses(self, x, y):
            return losses_of(self.net)(x, y)

        def training_step(self, batch, batch_idx):
            batch = own_rows(batch)
            if automatic:
                loss = self.losses(*batch).mean()
                self.log("loss", loss, sync_dist=True, on_step=False, on_epoch=True)
                return loss
            opt = self.optimizers()
            with opt.toggle_model(sync_grad=(batch_idx + 1) % accumulated == 0):
                opt.backward(self.losses, *batch, backward=lambda loss: self.manual_backward(loss / accumulated))
            if (batch_idx + 1) % accumulated == 0:
                self.clip_gradients(opt, gradient_clip_val=clip_of(accumulated), gradient_clip_algorithm="norm")
                opt.step()
                opt.zero_grad()
            return None

        def configure_optimizers(self):
            return optimizer(name, self)

    options = {"accumulate_grad_batches": accumulated, "gradient_clip_val": clip_of(accumulated)} if automatic else {}
    net = Net()
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=WORLD,
        strategy="ddp",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SAMCallback()],
        **options,
    )
    trainer.fit(net, DataLoader(DATA, batch_size=None))
    assert type(trainer.strategy).__name__ == "DDPStrategy"
    assert_equals(net.net, expected)


def by_trainer(name, expected, port, accumulated=1, reduces_each_batch=False):
    enter(torch.distributed.get_rank(), port)
    from texts import ROWS, continued, gpt2
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import Trainer, TrainingArguments

    from fastsam.integrations.transformers import SAMTrainerMixin

    class SAMTrainer(SAMTrainerMixin, Trainer):
        pass

    model, data = gpt2(), continued(4)
    args = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=ROWS // WORLD,
        gradient_accumulation_steps=accumulated,
        num_train_epochs=1,
        max_grad_norm=clip_of(accumulated) or 0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": reduces_each_batch}},
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    opt = optimizer(name, model)
    SAMTrainer(model, args, train_dataset=data, optimizers=(opt, LambdaLR(opt, lambda _: 1.0))).train()
    assert type(opt.model).__name__ == "DistributedDataParallel"
    assert_equals(model, expected)
