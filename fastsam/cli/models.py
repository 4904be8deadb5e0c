"""The models that the command line knows: its own, and those of timm by name where that is installed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

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


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


LARGE = 128
"""Pixels in height from which pictures are large ones, of ImageNet's kind."""


def bottleneck_resnet(shape: Shape, classes: int, blocks: Sequence[int]) -> nn.Module:
    """Return a ResNet of bottlenecks (He et al. 2015), their strides in the 3x3 convolutions.

    Pictures of `LARGE` pixels and more meet a 7x7 stem of stride 2 and a pooling, as on ImageNet; smaller ones a 3x3
    stem of stride 1 alone.

    Args:
        shape: of one picture, [channels, height, width]; any height and width.
        classes: number of classes.
        blocks: in each of the four stages.
    """
    if shape[1] < LARGE:
        layers: list[nn.Module] = [nn.Conv2d(shape[0], 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    else:
        layers = [nn.Conv2d(shape[0], 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count, stride in zip((64, 128, 256, 512), blocks, (1, 2, 2, 2), strict=True):
        for block in range(count):
            layers.append(_Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, _MeanOverPixels(), nn.Linear(inputs, classes))


def _shrunk(x: Tensor, channels: int, stride: int) -> Tensor:
    """Return a shortcut without weights: a mean over each stride x stride pixels, and channels of zeros behind."""
    if stride != 1:
        x = F.avg_pool2d(x, stride, ceil_mode=True, count_include_pad=False)
    return F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))


class _PlainBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.width, self.stride = width, stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        # the published shortcut takes every second pixel
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.width - x.shape[1]))
        return F.relu(out + shortcut)


def cifar_resnet(shape: Shape, classes: int, depth: int) -> nn.Module:
    """Return the narrow ResNet for CIFAR (He et al. 2015, section 4.2), with shortcuts that have no weights.

    Args:
        shape: of one picture, [channels, height, width]; any height and width.
        classes: number of classes.
        depth: 6 n + 2, for n blocks in each of the three stages of 16, 32 and 64 channels.
    """
    layers: list[nn.Module] = [nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for block in range((depth - 2) // 6):
            layers.append(_PlainBlock(inputs, width, stride if block == 0 else 1))
            inputs = width
    return _with_normal_convolutions(nn.Sequential(*layers, _MeanOverPixels(), nn.Linear(64, classes)))


class _PyramidBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.width, self.stride = width, stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.bn2(self.conv1(self.bn1(x)))))
        return self.bn3(out) + _shrunk(x, self.width, self.stride)


def pyramidnet(shape: Shape, classes: int, depth: int, alpha: int) -> nn.Module:
    """Return PyramidNet (Han et al. 2017, https://arxiv.org/abs/1610.02915) of basic blocks, without ShakeDrop.

    Args:
        shape: of one picture, [channels, height, width]; any height and width.
        classes: number of classes.
        depth: 6 n + 2, for n blocks in each of the three stages.
        alpha: channels that the blocks add one by one to the first 16, each as many, rounded to whole ones.
    """
    layers: list[nn.Module] = [nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)]
    per_stage, inputs = (depth - 2) // 6, 16
    for block in range(3 * per_stage):
        width = round(16 + alpha * (block + 1) / (3 * per_stage))
        stride = 2 if block in (per_stage, 2 * per_stage) else 1
        layers.append(_PyramidBlock(inputs, width, stride))
        inputs = width
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(), _MeanOverPixels(), nn.Linear(inputs, classes)]
    return _with_normal_convolutions(nn.Sequential(*layers))


def _with_normal_convolutions(model: nn.Module) -> nn.Module:
    """Draw the weights of all convolutions as He et al. 2015 do, and return the model."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


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
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(), _MeanOverPixels(), nn.Linear(inputs, classes)]
    return _with_normal_convolutions(nn.Sequential(*layers))


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
    _check_patches(shape, patch)
    return _ViT(shape, classes, width, depth, heads, patch)


def _check_patches(shape: Shape, patch: int) -> None:
    if shape[1] % patch or shape[2] % patch:
        raise InputError(f"vit cuts pictures into {patch}x{patch} pixels, which {shape[1]}x{shape[2]} do not fit")


class _ClassTokenViT(nn.Module):
    def __init__(self, shape: Shape, classes: int, width: int, depth: int, heads: int, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(shape[0], width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 1 + (shape[1] // patch) * (shape[2] // patch), width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, 1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def class_token_vit(shape: Shape, classes: int, width: int, heads: int, patch: int) -> nn.Module:
    """Return a vision transformer as published (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929).

    Twelve pre-norm blocks, learned positions, a class token that is read at the end, no dropout.

    Args:
        shape: of one picture, [channels, height, width]; height and width are multiples of `patch`.
        classes: number of classes.
        width: size of a token.
        heads: of each attention.
        patch: rows and columns of a patch.

    Raises:
        InputError: the patches do not fit.
    """
    _check_patches(shape, patch)
    return _ClassTokenViT(shape, classes, width, 12, heads, patch)


@dataclass(frozen=True)
class Model:
    """An entry of the table: one line for `--help`, and `build(shape of one picture, number of classes)`."""

    summary: str
    build: Callable[[Shape, int], nn.Module]


def _resnet(depth: int, blocks: Sequence[int], millions: str) -> Model:
    return Model(
        f"ResNet-{depth} of bottlenecks, {millions} million; 7x7 stem for pictures of {LARGE} pixels and more",
        partial(bottleneck_resnet, blocks=blocks),
    )


def _vit(name: str, millions: str, width: int, heads: int, patch: int) -> Model:
    return Model(
        f"ViT-{name} with a class token, {millions} million on ImageNet",
        partial(class_token_vit, width=width, heads=heads, patch=patch),
    )


MODELS: dict[str, Model] = {
    "cnn": Model("three 3x3 convolutions with batch norm, 93,000 weights on the digits", cnn),
    "mlp": Model("two hidden layers of 256, no batch norm", mlp),
    "resnet18": Model("ResNet-18 with a 3x3 stem, 11.2 million weights", resnet18),
    "resnet32": Model("narrow ResNet for CIFAR, 0.46 million", partial(cifar_resnet, depth=32)),
    "resnet50": _resnet(50, (3, 4, 6, 3), "23.5"),
    "resnet101": _resnet(101, (3, 4, 23, 3), "42.5"),
    "resnet152": _resnet(152, (3, 8, 36, 3), "58.2"),
    "wrn16-4": Model("wide ResNet of depth 16, 4 times as wide, 2.7 million", partial(wide_resnet, depth=16, widen=4)),
    "wrn16-8": Model("the same 8 times as wide, 11.0 million", partial(wide_resnet, depth=16, widen=8)),
    "wrn28-10": Model("the same of depth 28, 10 times as wide, 36.5 million", partial(wide_resnet, depth=28, widen=10)),
    "wrn40-2": Model("the same of depth 40, twice as wide, 2.2 million", partial(wide_resnet, depth=40, widen=2)),
    "wrn40-10": Model("the same of depth 40, 10 times as wide, 55.8 million", partial(wide_resnet, depth=40, widen=10)),
    "pyramidnet110": Model("PyramidNet-110, alpha 270, 28.5 million", partial(pyramidnet, depth=110, alpha=270)),
    "vit": Model("vision transformer of 6 blocks on 4x4 patches, no batch norm, 2.7 million weights", vit),
    "vit-s16": _vit("S/16", "22.1", width=384, heads=6, patch=16),
    "vit-s32": _vit("S/32", "22.9", width=384, heads=6, patch=32),
    "vit-b16": _vit("B/16", "86.6", width=768, heads=12, patch=16),
}
TIMM = "timm:"
"""What goes before the name of a model of timm."""


def check_model(name: str) -> str:
    """Return the name of a model that can be built: a key of `MODELS`, or "timm:NAME".

    Raises:
        InputError: there is no such model, or timm is not installed.
    """
    if name.startswith(TIMM):
        _check_timm(name.removeprefix(TIMM))
    elif name not in MODELS:
        raise InputError(f"unknown model {name!r}; known are {', '.join(MODELS)}, and timm:NAME")
    return name


def build_model(name: str, shape: Shape, classes: int) -> nn.Module:
    """Return a model with weights drawn anew.

    Args:
        name: a key of `MODELS`, or "timm:NAME".
        shape: of one picture, [channels, height, width].
        classes: number of classes.

    Raises:
        InputError: pictures of this shape do not fit, or timm is not installed or cannot build it.
    """
    if not name.startswith(TIMM):
        return MODELS[name].build(shape, classes)
    timm, name = _check_timm(name.removeprefix(TIMM)), name.removeprefix(TIMM)
    wanted = {"pretrained": False, "num_classes": classes, "in_chans": shape[0]}
    try:
        try:
            return timm.create_model(name, img_size=tuple(shape[1:]), **wanted)
        except TypeError:
            # a convolutional network takes pictures of any size, and no word of it
            return timm.create_model(name, **wanted)
    except Exception as error:
        raise InputError(f"timm cannot build {name} for pictures of {'x'.join(map(str, shape))}: {error}") from error


def _check_timm(name: str) -> Any:
    """Return timm, which has a model of that name."""
    try:
        # takes seconds to import
        timm = import_module("timm")
    except ImportError as error:
        known = ", ".join(MODELS)
        raise InputError(f"timm:{name} needs timm: pip install timm; without it there are {known}") from error
    except Exception as error:
        # as where torchvision is of another version than torch
        raise InputError(f"timm:{name}: timm is installed, but importing it fails: {error}") from error
    if not timm.is_model(name.partition(".")[0]):
        near = get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise InputError(f"timm has no model {name!r}" + (f"; near it are {', '.join(near)}" if near else ""))
    return timm


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return the layers that compute statistics over the batch."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer computes statistics over the batch."""
    return bool(batch_norms(model))
