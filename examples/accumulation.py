"""Accumulation: a batch that does not fit goes in as micro-batches, and one step of the optimizer follows.

`opt.backward` perturbs for each micro-batch by itself, which is mSAM; `large_batch` has one perturbation for all of
them, the step that the batch as a whole would give.
"""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fastsam import SAM

MICRO_BATCHES = 4


def main(large_batch=False):
    torch.manual_seed(0)
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    x = x.float() / 16
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, model=model, lr=3e-3)

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    def share(loss):
        (loss / MICRO_BATCHES).backward()

    for _ in range(5):
        for rows in torch.randperm(1500).split(100):
            batches = [(x[part], y[part]) for part in rows.chunk(MICRO_BATCHES)]
            opt.zero_grad()
            if large_batch:
                for one_pass in (opt.ascent, opt.descent):
                    with one_pass():
                        for batch in batches:
                            share(losses(*batch).mean())
            else:
                for batch in batches:
                    opt.backward(losses, *batch, backward=share)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
    with torch.no_grad():
        accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
    print(f"{'one large batch' if large_batch else 'mSAM'}: test accuracy {accuracy:.1%}")
    return model


if __name__ == "__main__":
    main(large_batch="--large-batch" in sys.argv)
