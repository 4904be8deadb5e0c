"""The models that the command line knows."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

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
    """Return two hidden layers of `width` with ReLU, no batch norm, for pictures of `shape` in `classes` classes."""
    inputs = 1
    for size in shape:
        inputs *= size
    hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))


@dataclass(frozen=True)
class Model:
    """An entry of the table: one line for `--help`, and `build(shape of one picture, number of classes)`."""

    summary: str
    build: Callable[[Shape, int], nn.Module]


MODELS: dict[str, Model] = {
    "cnn": Model("three 3x3 convolutions with batch norm, 93,000 weights on the digits", cnn),
    "mlp": Model("two hidden layers of 256, no batch norm", mlp),
}


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer computes statistics over the batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
