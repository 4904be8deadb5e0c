"""A whole step, both passes and the update, as one CUDA graph: `graph_step` returns what is called in the step's place.

On a CPU there are no graphs: every call takes the step of `opt.step(losses, x, y)`, so that the script runs everywhere.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fastsam import SAM, graph_step


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = (torch.from_numpy(array).to(device) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, model=model, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5)

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    # pictures like those of the steps to come; nothing is run yet
    step = graph_step(opt, losses, x[:100], y[:100])
    for _ in range(5):
        # the last batch has 60 rows, another shape, and takes the usual step
        for rows in torch.randperm(1460, device=device).split(100):
            loss = step(x[rows], y[rows])
        schedule.step()
    with torch.no_grad():
        accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
    print(f"{'CUDA graphs' if device == 'cuda' else 'usual steps'}: loss {loss:.3f}, test accuracy {accuracy:.1%}")
    return model


if __name__ == "__main__":
    main()
