"""accelerate: `opt.backward` with `accelerator.backward`; what `prepare` returns has the optimizer as `.optimizer`."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import MSAM


def main():
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x[:1500] / 16, dtype=torch.float32), torch.tensor(y[:1500]))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = MSAM(model.parameters(), torch.optim.SGD, rho=0.05, num_shards=2, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=15)
    model, opt, schedule, loader = accelerator.prepare(model, opt, schedule, DataLoader(data, batch_size=50))
    # the wrapper comes later than the optimizer
    opt.optimizer.bind(model)

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    for x, y in loader:
        with accelerator.accumulate(model):
            loss = opt.optimizer.backward(losses, x, y, backward=accelerator.backward)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            schedule.step()
            opt.zero_grad()
    accelerator.print(f"last loss {loss:.3f}")
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
