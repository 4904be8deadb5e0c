"""timm: a model, an optimizer, a scheduler and an average of its own, with `SAMScaler` for its training line."""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

from fastsam import SAM
from fastsam.integrations.timm import SAMScaler


def made():
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
    return model, create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=1e-4, layer_decay=0.8)


def main():
    model, base = made()
    opt = SAM.wrap(base, rho=0.05, model=model)
    schedule, average = CosineLRScheduler(opt, t_initial=2), ModelEmaV3(model, decay=0.9)
    x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x = x.float().view(-1, 1, 8, 8) / 16
    # float16 on a GPU needs the scale; enabled=False leaves it out
    scaler = SAMScaler(device="cpu", enabled=False)

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none", label_smoothing=0.1)

    for epoch in range(2):
        for rows in torch.arange(1500).split(100):
            loss = scaler(
                losses,
                opt,
                batch=(x[rows], y[rows]),
                clip_grad=0.02,
                clip_mode="agc",
                parameters=model_parameters(model, exclude_head=True),
            )
            opt.zero_grad()
            average.update(model)
        schedule.step(epoch + 1)
    print(f"last loss {loss:.3f}")
    return model


if __name__ == "__main__":
    main()
