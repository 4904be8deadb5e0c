"""Shapes of the parameters of well-known networks, in the order of their modules."""

Shape = tuple[int, ...]


def _conv_bn(out: int, inputs: int, size: int) -> list[Shape]:
    return [(out, inputs, size, size), (out,), (out,)]


def resnet18_cifar(classes: int = 10) -> list[Shape]:
    """ResNet-18 with a 3x3 stem for 32x32 pictures: 62 tensors, 11.17 million parameters."""
    shapes, inputs = _conv_bn(64, 3, 3), 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for block in range(2):
            shapes += _conv_bn(width, inputs, 3) + _conv_bn(width, width, 3)
            if block == 0 and stride == 2:
                shapes += _conv_bn(width, inputs, 1)
            inputs = width
    return [*shapes, (classes, 512), (classes,)]


def resnet50(classes: int = 1000) -> list[Shape]:
    """ResNet-50 for 224x224 pictures: 161 tensors, 25.56 million parameters."""
    shapes, inputs = _conv_bn(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _conv_bn(width, inputs, 1) + _conv_bn(width, width, 3) + _conv_bn(4 * width, width, 1)
            if block == 0:
                shapes += _conv_bn(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (classes, 2048), (classes,)]


def vit_s16(classes: int = 1000) -> list[Shape]:
    """ViT-S/16 for 224x224 pictures: 152 tensors, 22.05 million parameters."""
    d = 384
    shapes: list[Shape] = [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,)]
    for _ in range(12):
        shapes += [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [*shapes, (d,), (d,), (classes, d), (classes,)]


def gpt2(vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """GPT-2 small, its head tied to its embedding: 148 tensors, 124.44 million parameters."""
    d = 768
    shapes: list[Shape] = [(vocabulary, d), (context, d)]
    for _ in range(12):
        shapes += [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [*shapes, (d,), (d,)]


LISTS = {"resnet18": resnet18_cifar, "resnet50": resnet50, "vit_s16": vit_s16, "gpt2": gpt2}
