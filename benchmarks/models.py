"""Networks of the step benchmark, on CIFAR-10's pictures."""

from functools import partial

from fastsam.models import MODELS as ALL

MODELS = {name: partial(ALL[name].build, (3, 32, 32), 10) for name in ("cnn", "resnet18", "vit")}
