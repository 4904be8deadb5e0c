"""What the step benchmark runs on: networks with their data, base optimizers and batches, as a method gets them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam import graph_step
from fastsam.cli.models import MODELS as KNOWN
from fastsam.cli.models import vit

Shape = tuple[int, ...]


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


class ResNet50(nn.Sequential):
    """ResNet-50 (He et al. 2015), its strides in the 3x3 convolutions: 161 tensors, 25.56 million parameters."""

    def __init__(self, shape: Shape, classes: int) -> None:
        layers = [nn.Conv2d(shape[0], 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        inputs = 64
        for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for block in range(blocks):
                layers.append(_Bottleneck(inputs, width, stride if block == 0 else 1))
                inputs = 4 * width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class TextTransformer(nn.Module):
    """Classifies sequences of token ids: pre-norm blocks, learned positions, a mean over the tokens, no dropout."""

    def __init__(self, shape: Shape, classes: int, vocabulary: int, width: int = 128, depth: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(1, *shape, width) * 0.02)
        self.blocks = nn.Sequential(*(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        ))  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.position)).mean(1))


class Batch(NamedTuple):
    """Inputs, labels, and sample ids where the inputs lie and on the host."""

    x: Tensor
    y: Tensor
    ids: Tensor
    host_ids: Tensor


class Task(NamedTuple):
    """One line of the table."""

    build: Callable[[Shape, int], nn.Module]
    shape: Shape
    """Of one sample: [channels, height, width], or [tokens]."""
    classes: int
    base: partial
    """The base optimizer, without its parameters."""
    rows: dict[str, int]
    """Batch size by device."""
    is_conv: bool = False
    vocabulary: int | None = None
    """Number of token ids; without it samples are pictures."""

    def batches(self, rows: int, n: int, device: str, memory: torch.memory_format) -> list[Batch]:
        """Return n batches, of one random input and other samples each."""
        generator = torch.Generator(device).manual_seed(0)
        size = (rows, *self.shape)
        if self.vocabulary is None:
            x = torch.randn(size, generator=generator, device=device).contiguous(memory_format=memory)
        else:
            x = torch.randint(self.vocabulary, size, generator=generator, device=device)
        y = torch.randint(self.classes, (rows,), generator=generator, device=device)
        host_ids = torch.arange(n * rows).split(rows)
        return [Batch(x, y, ids.to(device), ids) for ids in host_ids]


_SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)
_ADAMW = partial(torch.optim.AdamW, lr=1e-3)
_CIFAR, _IMAGENET = (3, 32, 32), (3, 224, 224)
_VOCABULARY = 1000
TASKS: dict[str, Task] = {
    "cnn": Task(KNOWN["cnn"].build, _CIFAR, 10, _SGD, {"cuda": 128, "cpu": 32}, is_conv=True),
    "mlp": Task(KNOWN["mlp"].build, _CIFAR, 10, _SGD, {"cuda": 128, "cpu": 32}),
    "resnet18": Task(KNOWN["resnet18"].build, _CIFAR, 10, _SGD, {"cuda": 128, "cpu": 16}, is_conv=True),
    "resnet50": Task(ResNet50, _IMAGENET, 1000, _SGD, {"cuda": 256, "cpu": 4}, is_conv=True),
    "vit": Task(KNOWN["vit"].build, _CIFAR, 10, _ADAMW, {"cuda": 128, "cpu": 16}),
    "vit_s16": Task(
        partial(vit, width=384, depth=12, heads=6, patch=16), _IMAGENET, 1000, _ADAMW, {"cuda": 256, "cpu": 4}
    ),
    "transformer": Task(
        partial(TextTransformer, vocabulary=_VOCABULARY), (64,), 10, _ADAMW, {"cuda": 128, "cpu": 16},
        vocabulary=_VOCABULARY,
    ),
}  # fmt: skip

RHO = 0.05
Step = Callable[[Batch], Any]


class Precision:
    """Autocast, and for fp16 a loss scale."""

    def __init__(self, amp: str, device: str) -> None:
        self.device, self.dtype = device, {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.scaler = torch.amp.GradScaler(device) if amp == "fp16" else None

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, self.dtype) if self.dtype else nullcontext()

    def backward(self, loss: Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(self, opt: torch.optim.Optimizer) -> None:
        if self.scaler:
            self.scaler.step(opt)
            self.scaler.update()
        else:
            opt.step()


@dataclass
class Problem:
    """What a method takes its steps on."""

    model: nn.Module
    base: partial
    """The base optimizer, without its parameters."""
    batches: list[Batch]
    """An epoch, for what remembers samples."""
    classes: int
    precision: Precision
    is_captured: bool = False
    """The whole step is to be one CUDA graph."""
    compile: Callable[[nn.Module], None] | None = None
    """Compiles a module in place, where the model is compiled."""
    graphs: list[Any] = field(default_factory=list)

    @property
    def n_samples(self) -> int:
        return sum(len(batch.y) for batch in self.batches)

    def losses(self, x: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
        with self.precision.autocast():
            return F.cross_entropy(self.model(x), y, reduction=reduction)

    def capture(self, opt: torch.optim.Optimizer, losses: Callable[..., Tensor], parts: int) -> Step:
        """Return steps that are captured, with per-sample `losses` of the first so many parts of a batch."""
        scaler = self.precision.scaler
        graph = graph_step(opt, losses, *self.batches[0][:parts], scaler=scaler)
        self.graphs.append(graph)

        def step(batch: Batch) -> None:
            graph(*batch[:parts])
            if scaler:
                scaler.update()

        return step
