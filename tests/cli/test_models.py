"""The models of the command line: as many weights as published, the published arithmetic, and timm's by name."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from benchmarks.arms.tasks import ResNet50
from fastsam.__main__ import main
from fastsam.cli.errors import InputError
from fastsam.cli.models import MODELS, build_model, check_model, cifar_resnet, class_token_vit, pyramidnet

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)
PARAMETERS = [
    ("resnet18", CIFAR, 10, 11_173_962),
    ("resnet18", CIFAR, 100, 11_220_132),
    ("resnet32", CIFAR, 10, 464_154),  # "0.46M" in He et al.'s table 6
    ("resnet50", CIFAR, 10, 23_520_842),
    ("resnet101", CIFAR, 10, 42_512_970),
    ("resnet50", IMAGENET, 1000, 25_557_032),  # this and the next two as torchvision's
    ("resnet101", IMAGENET, 1000, 44_549_160),
    ("resnet152", IMAGENET, 1000, 60_192_808),
    ("wrn16-4", CIFAR, 10, 2_748_890),
    ("wrn16-8", CIFAR, 10, 10_961_370),  # "11.0M" in Zagoruyko & Komodakis's table 4
    ("wrn28-10", CIFAR, 10, 36_479_194),
    ("wrn28-10", CIFAR, 100, 36_536_884),
    ("wrn40-2", CIFAR, 10, 2_243_546),
    ("wrn40-10", CIFAR, 10, 55_841_754),
    ("pyramidnet110", CIFAR, 10, 28_485_477),  # as pytorchcv's; Han et al. say 28.3M
    ("pyramidnet110", CIFAR, 100, 28_511_307),
    ("vit-s16", IMAGENET, 1000, 22_050_664),  # this and the next two as timm's
    ("vit-s32", IMAGENET, 1000, 22_878_952),
    ("vit-b16", IMAGENET, 1000, 86_567_656),
]


@pytest.mark.parametrize(("name", "shape", "classes", "count"), PARAMETERS)
def test_networks_have_as_many_parameters_as_published(name, shape, classes, count):
    with torch.device("meta"):
        model = MODELS[name].build(shape, classes)
        assert model(torch.empty(2, *shape)).shape == (2, classes)
    assert sum(p.numel() for p in model.parameters()) == count


def test_every_model_of_the_table_is_counted():
    assert {name for name, *_ in PARAMETERS} == set(MODELS) - {"cnn", "mlp", "vit"}


def scattered(model):
    """The model in float64, the norms' weights away from 1 and 0."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() < 2 and "norm" not in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model.double()


def batch_norm(weights, x, name):
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    scale, shift = (weights[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("weight", "bias"))
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def conv(weights, x, name, stride=1):
    kernel = weights[f"{name}.weight"]
    return torch.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)


def wider(x, channels):
    return torch.cat([x, x.new_zeros(len(x), channels - x.shape[1], *x.shape[2:])], 1)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_narrow_resnet_has_shortcuts_without_weights():
    model = scattered(cifar_resnet((3, 9, 9), 5, depth=8))
    weights, x = dict(model.named_parameters()), torch.randn(4, 3, 9, 9, dtype=torch.float64)
    expected = torch.relu(batch_norm(weights, conv(weights, x, "0"), "1"))
    for block, width, stride in ((3, 16, 1), (4, 32, 2), (5, 64, 2)):
        inner = torch.relu(batch_norm(weights, conv(weights, expected, f"{block}.conv1", stride), f"{block}.bn1"))
        inner = batch_norm(weights, conv(weights, inner, f"{block}.conv2"), f"{block}.bn2")
        expected = torch.relu(inner + wider(expected[:, :, ::stride, ::stride], width))
    assert_close(model(x), expected.mean((2, 3)) @ weights["7.weight"].T + weights["7.bias"])


def test_the_pyramid_grows_by_equal_parts_and_has_no_relu_before_its_first_convolutions():
    model = scattered(pyramidnet((3, 8, 8), 5, depth=8, alpha=10))
    weights, x = dict(model.named_parameters()), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    expected = batch_norm(weights, conv(weights, x, "0"), "1")
    for block, width, stride in ((2, 19, 1), (3, 23, 2), (4, 26, 2)):
        inner = conv(weights, batch_norm(weights, expected, f"{block}.bn1"), f"{block}.conv1", stride)
        inner = conv(weights, torch.relu(batch_norm(weights, inner, f"{block}.bn2")), f"{block}.conv2")
        if stride == 2:
            expected = sum(expected[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
        expected = batch_norm(weights, inner, f"{block}.bn3") + wider(expected, width)
    expected = torch.relu(batch_norm(weights, expected, "5")).mean((2, 3))
    assert_close(model(x), expected @ weights["8.weight"].T + weights["8.bias"])


def test_large_pictures_meet_the_stem_of_imagenet_and_small_ones_do_not():
    torch.manual_seed(0)
    with torch.no_grad():
        other = ResNet50((3, 128, 128), 7).double()
        model = build_model("resnet50", (3, 128, 128), 7).double()
        pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        for mine, theirs in pairs:
            mine.copy_(theirs)
        x = torch.randn(2, 3, 128, 128, dtype=torch.float64)
        assert_close(model(x), other(x))
        small = build_model("resnet50", (3, 127, 127), 7)
    assert small[0].stride == (1, 1)
    assert not any(isinstance(m, torch.nn.MaxPool2d) for m in small)


def test_the_vision_transformer_reads_its_class_token():
    torch.manual_seed(0)
    model = class_token_vit((3, 8, 12), 5, width=8, heads=2, patch=4).double().eval()
    weights, x = dict(model.named_parameters()), torch.randn(2, 3, 8, 12, dtype=torch.float64)
    patches = F.unfold(x, 4, stride=4).transpose(1, 2) @ weights["patches.weight"].flatten(1).T
    tokens = torch.cat([weights["token"].expand(2, 1, 8), patches + weights["patches.bias"]], 1) + weights["position"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return (
            x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        )

    for i in range(12):
        block = f"blocks.{i}"
        qkv = norm(tokens, f"{block}.norm1") @ weights[f"{block}.self_attn.in_proj_weight"].T
        qkv = (qkv + weights[f"{block}.self_attn.in_proj_bias"]).view(2, 7, 3, 2, 4).permute(2, 0, 3, 1, 4)
        attended = (qkv[0] @ qkv[1].transpose(-1, -2) / 2).softmax(-1) @ qkv[2]
        out = [weights[f"{block}.self_attn.out_proj.{key}"] for key in ("weight", "bias")]
        tokens = tokens + F.linear(attended.transpose(1, 2).reshape(2, 7, 8), *out)
        one, two = ([weights[f"{block}.linear{n}.{key}"] for key in ("weight", "bias")] for n in (1, 2))
        tokens = tokens + F.linear(F.gelu(F.linear(norm(tokens, f"{block}.norm2"), *one)), *two)
    assert_close(model(x), F.linear(norm(tokens[:, 0], "norm"), weights["head.weight"], weights["head.bias"]))


def wrn_by_hand(weights, x, depth):
    """The functional form of the authors' own PyTorch code, in training mode."""

    def normed(x, bn):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        scale, shift = (weights[f"{bn}.{key}"].view(1, -1, 1, 1) for key in ("weight", "bias"))
        return torch.relu((x - mean) / (var + 1e-5).sqrt() * scale + shift)

    blocks = (depth - 4) // 6
    x = torch.conv2d(x, weights["0.weight"], padding=1)
    for i in range(1, 3 * blocks + 1):
        stride = 2 if i in (blocks + 1, 2 * blocks + 1) else 1
        first = normed(x, f"{i}.bn1")
        second = normed(torch.conv2d(first, weights[f"{i}.conv1.weight"], stride=stride, padding=1), f"{i}.bn2")
        if f"{i}.shortcut.weight" in weights:
            x = torch.conv2d(first, weights[f"{i}.shortcut.weight"], stride=stride)
        x = x + torch.conv2d(second, weights[f"{i}.conv2.weight"], padding=1)
    x = normed(x, f"{3 * blocks + 1}").mean((2, 3))
    return x @ weights[f"{3 * blocks + 4}.weight"].T + weights[f"{3 * blocks + 4}.bias"]


def test_wide_resnet_is_pre_activated_as_published():
    torch.manual_seed(0)
    model = MODELS["wrn16-4"].build((3, 16, 16), 10).double()
    for name, p in model.named_parameters():
        if "conv" not in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    expected = wrn_by_hand(dict(model.named_parameters()), x, depth=16)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (2, 12, 20)])
@pytest.mark.parametrize("name", ["cnn", "mlp", "resnet18", "resnet32", "wrn16-4", "wrn40-2", "vit"])
def test_networks_take_pictures_of_any_shape(name, shape):
    x = torch.randn(2, *shape)
    assert MODELS[name].build(shape, 7)(x).shape == (2, 7)


def test_vit_refuses_pictures_that_its_patches_do_not_cover():
    with pytest.raises(InputError, match="vit cuts pictures into 4x4 pixels, which 30x32 do not fit"):
        MODELS["vit"].build((3, 30, 32), 10)


# timm


class Timm(ModuleType):
    """Says what it was asked for, as timm's functions do."""

    def __init__(self, takes_size):
        super().__init__("timm")
        self.takes_size, self.asked = takes_size, []

    def is_model(self, name):
        return name in self.list_models()

    def list_models(self):
        return ["resnet26", "vit_tiny_patch16_224"]

    def create_model(self, name, **keywords):
        if "img_size" in keywords and not self.takes_size:
            raise TypeError("got an unexpected keyword argument 'img_size'")
        self.asked.append((name, keywords))
        if keywords["in_chans"] == 9:
            raise RuntimeError("nine channels are too many")
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(keywords["num_classes"]))


@pytest.fixture
def timm(monkeypatch):
    def install(takes_size=True):
        module = Timm(takes_size)
        monkeypatch.setitem(sys.modules, "timm", module)
        return module

    return install


@pytest.mark.parametrize("takes_size", [True, False])
def test_timm_is_asked_for_the_shape_and_the_classes(takes_size, timm):
    module = timm(takes_size)
    build_model("timm:resnet26.bt_in1k", (1, 8, 12), 7)
    size = {"img_size": (8, 12)} if takes_size else {}
    assert module.asked == [("resnet26.bt_in1k", {"pretrained": False, "num_classes": 7, "in_chans": 1, **size})]


def test_what_timm_does_not_have_or_cannot_build_is_refused(timm):
    timm()
    with pytest.raises(InputError, match="timm has no model 'resnet27'; near it are resnet26"):
        check_model("timm:resnet27")
    with pytest.raises(InputError, match="timm cannot build resnet26 for pictures of 9x8x8: nine channels"):
        build_model("timm:resnet26", (9, 8, 8), 10)


def test_without_timm_the_error_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["train", "--model", "timm:resnet26"]) == 2
    err = capsys.readouterr().err
    assert "timm:resnet26 needs timm: pip install timm; without it there are cnn, mlp, resnet18" in err
    assert err.count("\n") == 1


def test_a_timm_that_does_not_import_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(InputError, match="importing it fails: operator torchvision::nms does not exist"):
        check_model("timm:resnet26")
