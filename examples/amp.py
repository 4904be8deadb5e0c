"""Mixed precision: autocast stands inside the loss function, so that both passes run under it.

bfloat16 needs no scaler and is used on a CPU; on a GPU this runs float16 with a GradScaler, which `opt.step` is given
and whose `update()` comes next as always.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fastsam import SAM


def main():
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.bfloat16)
    x, y = (torch.from_numpy(array).to(device) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10)).to(device)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, model=model, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    def losses(x, y):
        with torch.autocast(device, dtype):
            return F.cross_entropy(model(x), y, reduction="none")

    for _ in range(5):
        for rows in torch.randperm(1500).split(100):
            loss = opt.step(losses, x[rows], y[rows], scaler=scaler, clip_grad_norm=1.0)
            scaler.update()
    model.eval()
    with torch.no_grad():
        accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
    print(
        f"{dtype} on {device}: last loss {loss:.3f}, test accuracy {accuracy:.1%}, skipped {opt.skipped_steps:d} steps"
    )
    return model


if __name__ == "__main__":
    main()
