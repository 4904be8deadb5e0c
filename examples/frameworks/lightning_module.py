"""Lightning: SAM with automatic optimization by a callback, and ESAM, which needs losses of rows, with manual."""

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import ESAM, SAM
from fastsam.integrations.lightning import SAMCallback


class Automatic(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return SAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)


class Manual(Automatic):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        loss = opt.backward(self.losses, *batch, backward=self.manual_backward)
        opt.step()
        self.log("loss", loss)

    def losses(self, x, y):
        return F.cross_entropy(self.net(x), y, reduction="none")

    def configure_optimizers(self):
        return ESAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)


def main(cls=Automatic):
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x[:1500] / 16, dtype=torch.float32), torch.tensor(y[:1500]))
    model, quiet = cls(), {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=[SAMCallback()], enable_progress_bar=False, **quiet)
    trainer.fit(model, DataLoader(data, batch_size=100))
    print(f"{cls.__name__}: last loss {trainer.callback_metrics['loss']:.3f}")
    return model.net


if __name__ == "__main__":
    main()
    main(Manual)
