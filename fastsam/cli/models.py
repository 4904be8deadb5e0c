"""The models that the command line knows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam.cli.errors import InputError

Shape = tuple[int, ...]


class _MeanOverPixels(nn.Module):
    # a plain mean, since the backward of adaptive pooling adds in no fixed order on GPUs
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def _block(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


def cnn(shape: Shape, classes: int, width: int = 32) -> nn.Module:
    """Return three 3x3 convolutions with batch norm and ReLU, a mean over the pixels and a linear layer.

    Args:
        shape: of one picture, [channels, height, width]; any height and width.
        classes: number of classes.
        width: channels of the first convolution; the second, of stride 2, has twice and the third four times as many.
    """
    return nn.Sequential(
        *_block(shape[0], width, 1),
        *_block(width, 2 * width, 2),
        *_block(2 * width, 4 * width, 2),
        _MeanOverPixels(),
        nn.Linear(4 * width, classes),
    )


def mlp(shape: Shape, classes: int, width: int = 256) -> nn.Module:
    """Return two hidden layers of `width` with ReLU, no batch norm, for pictures of any shape.

    Args:
        shape: of one picture, [channels, height, width].
        classes: number of classes.
        width: of each hidden layer.
    """
    inputs = 1
    for size in shape:
        inputs *= size
    hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet18(shape: Shape, classes: int) -> nn.Module:
    """Return ResNet-18 (He et al. 2015) for small pictures: a 3x3 stem of stride 1 and no pooling after it.

    Args:
        shape: of one picture, [channels, height, width]; any height and width.
        classes: number of classes.
    """
    layers: list[nn.Module] = [nn.Conv2d(shape[0], 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inputs = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_BasicBlock(inputs, width, stride), _BasicBlock(width, width, 1)]
        inputs = width
    return nn.Sequential(*layers, _MeanOverPixels(), nn.Linear(512, classes))


class _PreActivationBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False) if inputs != width else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(out))))


def wide_resnet(shape: Shape, classes: int, depth: int, widen: int) -> nn.Module:
    """Return WRN-depth-widen (Zagoruyko & Komodakis 2016, https://arxiv.org/abs/1605.07146), without dropout.

    Args:
        shape: of one picture, [channels, height, width]; any height and width.
        classes: number of classes.
        depth: 6 n + 4, for n blocks in each of the three stages.
        widen: what the stages' 16, 32 and 64 channels are multiplied with.
    """
    layers: list[nn.Module] = [nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False)]
    inputs = 16
    for width, stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
        for block in range((depth - 4) // 6):
            layers.append(_PreActivationBlock(inputs, width, stride if block == 0 else 1))
            inputs = width
    model = nn.Sequential(*layers, nn.BatchNorm2d(inputs), nn.ReLU(), _MeanOverPixels(), nn.Linear(inputs, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


class _ViT(nn.Module):
    def __init__(self, shape: Shape, classes: int, width: int, depth: int, heads: int, patch: int) -> None:
        super().__init__()
        channels, rows, columns = shape[0], shape[1] // patch, shape[2] // patch
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, rows * columns, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def vit(shape: Shape, classes: int, width: int = 192, depth: int = 6, heads: int = 3, patch: int = 4) -> nn.Module:
    """Return a small vision transformer: pre-norm blocks, learned positions, a mean over the patches, no dropout.

    Args:
        shape: of one picture, [channels, height, width]; height and width are multiples of `patch`.
        classes: number of classes.
        width: size of a token.
        depth: number of blocks.
        heads: of each attention.
        patch: rows and columns of a patch.

    Raises:
        InputError: the patches do not fit.
    """
    if shape[1] % patch or shape[2] % patch:
        raise InputError(f"vit cuts pictures into {patch}x{patch} pixels, which {shape[1]}x{shape[2]} do not fit")
    return _ViT(shape, classes, width, depth, heads, patch)


@dataclass(frozen=True)
class Model:
    """An entry of the table: one line for `--help`, and `build(shape of one picture, number of classes)`."""

    summary: str
    build: Callable[[Shape, int], nn.Module]


MODELS: dict[str, Model] = {
    "cnn": Model("three 3x3 convolutions with batch norm, 93,000 weights on the digits", cnn),
    "mlp": Model("two hidden layers of 256, no batch norm", mlp),
    "resnet18": Model("ResNet-18 with a 3x3 stem, 11.2 million weights", resnet18),
    "wrn16-4": Model("wide ResNet of depth 16, 4 times as wide, 2.7 million", partial(wide_resnet, depth=16, widen=4)),
    "wrn28-10": Model("the same of depth 28, 10 times as wide, 36.5 million", partial(wide_resnet, depth=28, widen=10)),
    "vit": Model("vision transformer of 6 blocks on 4x4 patches, no batch norm, 2.7 million weights", vit),
}


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer computes statistics over the batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
