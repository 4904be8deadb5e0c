"""The losses that `python -m benchmarks kernels` measures: inputs, what they are held against, what they move."""

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.table import Call, Kernel, UnavailableError
from fastsam.kernels.reference import Past

TAU, LAM = 5.0, 0.3
WEIGHT = LAM * TAU**2
Shape = tuple[int, int]


class Rows:
    """Logits and targets of a batch, and a history that holds a past of every sample, over and over."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, seed: int) -> None:
        (n, classes), generator = shape, torch.Generator(device).manual_seed(seed)
        kwargs: Any = {"generator": generator, "device": device}
        padded = -(-classes // 16) * 16
        self.classes = classes
        self.logits = torch.randn(n, classes, **kwargs).mul_(3).to(dtype)
        self.targets = torch.randint(classes, (n,), **kwargs)
        # as many bits as the batch's, and half where these are 32
        kept = torch.float16 if dtype == torch.float32 else dtype
        self.history = torch.randn(4 * n, padded, **kwargs).mul_(3).to(kept)
        self.ids = torch.randperm(4 * n, **kwargs)[:n]
        self.tags = torch.ones(4 * n, dtype=torch.int32, device=device)

    @property
    def elements(self) -> int:
        """Logits."""
        return self.logits.numel()

    @property
    def past(self) -> Past:
        """Every call finds what the last one recorded: the epoch does not move."""
        return Past(self.history, None, self.tags, self.ids, epoch=1, wanted=1, record=True)

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.logits, self.history)

    def copy(self, dtype: torch.dtype) -> "Rows":
        """The same logits in another dtype; a history keeps its own, or another would be recorded."""
        twin = Rows((1, 2), dtype, self.logits.device.type, 0)
        vars(twin).update({k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(self).items()})
        twin.logits = self.logits.to(dtype)
        return twin


def _loss(k: ModuleType, x: Rows) -> Call:
    logits, targets, past = x.logits, x.targets, x.past

    def call() -> list[list[Tensor]]:
        loss, gradient, _ = k.trajectory_loss(
            logits, targets, past, tau=TAU, weight=WEIGHT, label_smoothing=0.0, ignore_index=-100, reduction="sum"
        )
        return [[loss], [gradient], [past.rows]]

    return call


def _record(k: ModuleType, x: Rows) -> Call:
    logits, past = x.logits, x.past

    def call() -> list[list[Tensor]]:
        k.record_(logits, past, None, -100)
        return [[past.rows]]

    return call


def _separate(x: Rows, cross_entropy: Callable[[Tensor, Tensor], Tensor], divergence: Callable) -> Call:
    """What one writes with a library's losses: gather, two losses, record, backward."""
    z, history, kept = x.logits.detach().requires_grad_(), x.history, x.history[:, : x.classes]

    def call() -> list[list[Tensor]]:
        t = kept.index_select(0, x.ids).float()
        log_q, log_p = (z.float() / TAU).log_softmax(1), (t / TAU).log_softmax(1)
        loss = cross_entropy(z.float(), x.targets) + WEIGHT * divergence(log_q, log_p)
        kept.index_copy_(0, x.ids, z.detach().to(history.dtype))
        (gradient,) = torch.autograd.grad(loss, z)
        return [[loss.detach()], [gradient], [history]]

    return call


def _torch(x: Rows) -> Call:
    return _separate(x, partial(F.cross_entropy, reduction="sum"), partial(F.kl_div, reduction="sum", log_target=True))


def _compiled_torch(x: Rows) -> Call:
    torch._dynamo.reset()
    backend = "inductor" if x.logits.is_cuda else "eager"

    def losses(z: Tensor, t: Tensor) -> Tensor:
        log_q, log_p = (z.float() / TAU).log_softmax(1), (t.float() / TAU).log_softmax(1)
        pull = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        return F.cross_entropy(z.float(), x.targets, reduction="sum") + WEIGHT * pull

    compiled: Any = torch.compile(losses, dynamic=False, backend=backend)
    z, kept = x.logits.detach().requires_grad_(), x.history[:, : x.classes]

    def call() -> list[list[Tensor]]:
        loss = compiled(z, kept.index_select(0, x.ids))
        kept.index_copy_(0, x.ids, z.detach().to(kept.dtype))
        (gradient,) = torch.autograd.grad(loss, z)
        return [[loss.detach()], [gradient], [x.history]]

    return call


def _liger(x: Rows) -> Call:
    if not x.logits.is_cuda:
        raise UnavailableError("Liger's kernels need a GPU")
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss
    except ImportError:
        raise UnavailableError("liger-kernel is not installed; pip install liger-kernel") from None
    cross_entropy = LigerCrossEntropyLoss(reduction="sum")
    # it writes the gradient over its input, which the divergence needs: the copy is part of its time
    return _separate(x, lambda z, y: cross_entropy(z.clone(), y), LigerKLDIVLoss(reduction="sum", log_target=True))


def _torch_record(x: Rows) -> Call:
    kept = x.history[:, : x.classes]

    def call() -> list[list[Tensor]]:
        kept.index_copy_(0, x.ids, x.logits.to(kept.dtype))
        return [[x.history]]

    return call


_SIZES = (128, 10), (256, 1000), (4096, 1000), (2048, 50257)
_SHAPES = {f"{n} x {classes}": partial(tuple, (n, classes)) for n, classes in _SIZES}
_WITH = {"torch": _torch, "torch.compile of torch": _compiled_torch, "Liger": _liger}
_COMMON: dict[str, Any] = {
    "make": Rows, "workloads": _SHAPES, "small": (7, 37), "cut": lambda shape: (min(shape[0], 64), min(shape[1], 1000))
}  # fmt: skip
LOSSES: dict[str, Kernel] = {
    # float32: logits and gradient of 4 bytes, the past read and recorded in 2; bfloat16: all of 2
    "trajectory_loss": Kernel(_loss, _WITH, 3, (torch.float32,), "trajectory_loss", **_COMMON),
    "trajectory_loss bf16": Kernel(_loss, _WITH, 4, (torch.bfloat16,), "trajectory_loss", **_COMMON),
    "record_": Kernel(_record, {"torch": _torch_record}, 1.5, (torch.float32,), "record", **_COMMON),
}
"""The loss kernels, by the name of their launcher."""
