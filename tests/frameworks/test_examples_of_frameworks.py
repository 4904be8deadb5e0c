"""Every script of examples/frameworks ends with the weights of a loop written by hand."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand, halved
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

EXAMPLES = Path(__file__).parents[2] / "examples" / "frameworks"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*tensorboardX.*"),
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
]
SGD = {"lr": 0.1, "momentum": 0.9}


def of_example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def digits():
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def by_hand(row, model, base=torch.optim.SGD, options=None, **base_options):
    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    return ByHand(row, model, losses, base, {"rho": 0.05, "seed": 0, **(options or {})}, **(base_options or SGD))


def test_every_example_is_tested_and_short():
    examples = sorted(EXAMPLES.glob("*.py"))
    assert examples
    assert [p.name for p in examples if f"test_{p.stem}" not in globals()] == []
    assert [p.name for p in examples if len(p.read_text().splitlines()) >= 60] == []


@pytest.mark.parametrize(("cls", "row"), [("Automatic", "sam"), ("Manual", "esam")])
def test_lightning_module(cls, row):
    pytest.importorskip("lightning")
    example, (x, y) = of_example("lightning_module"), digits()
    loop = by_hand(row, mlp())
    for rows in torch.arange(1500).split(100) * 2:
        loop.step(loop.gradient(x[rows], y[rows]))
    loop.assert_equals(example["main"](example[cls]))


def test_fabric_loop():
    pytest.importorskip("lightning")
    example, (x, y) = of_example("fabric_loop"), digits()
    loop, parts = by_hand("esam", mlp()), torch.arange(1500).split(50)
    for pair in zip(parts[::2], parts[1::2], strict=True):
        loop.step(*(halved(loop.gradient(x[rows], y[rows])) for rows in pair), clip=1.0)
    loop.assert_equals(example["main"]())


def test_accelerate_loop():
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    example, (x, y) = of_example("accelerate_loop"), digits()
    loop, parts = by_hand("msam", mlp(), options={"num_shards": 2}), torch.arange(1500).split(50)
    schedule = CosineAnnealingLR(loop.base, T_max=15)
    for pair in zip(parts[::2], parts[1::2], strict=True):
        loop.step(*(halved(loop.gradient(x[rows], y[rows])) for rows in pair), clip=1.0)
        schedule.step()
    try:
        loop.assert_equals(example["main"]())
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def stacked(items):
    return torch.stack([i["input_ids"] for i in items]), torch.stack([i["labels"] for i in items])


def test_hf_trainer():
    pytest.importorskip("transformers")
    example = of_example("hf_trainer")
    model, data = example["tiny_bert"](), example["passages"]()
    loop = by_hand("esam", model, torch.optim.AdamW, lr=1e-3)
    loop.losses = lambda ids, y: F.cross_entropy(model(input_ids=ids).logits, y, reduction="none")
    starts = range(0, len(data), 16)
    schedule = LambdaLR(loop.base, lambda step: 1 - step / (2 * len(starts)))
    for i in [*starts, *starts]:
        loop.step(loop.gradient(*stacked(data[i : i + 16])), clip=1.0)
        schedule.step()
    loop.assert_equals(example["main"]())


def test_hf_lora():
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    example = of_example("hf_lora")
    model, data = example["tiny_gpt2"](), example["passages"]()
    loop = by_hand("sam", model, torch.optim.AdamW, options={"rho": 0.01}, lr=1e-2)

    def losses(ids, labels):
        logits = model(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)

    loop.losses = losses
    for i in range(0, len(data), 16):
        parts = [data[j : j + 8] for j in (i, i + 8) if data[j : j + 8]]
        # what the Trainer counts: the first token of each row too, of a model that does not say what its loss shifts
        total = sum(len(part) for part in parts) * 32
        loop.step(*([g * len(part) / total for g in loop.gradient(*stacked(part))] for part in parts), clip=1.0)
    loop.assert_equals(example["main"]())


def test_timm_train():
    pytest.importorskip("timm")
    from timm.models import model_parameters
    from timm.scheduler import CosineLRScheduler
    from timm.utils import dispatch_clip_grad

    example, (x, y) = of_example("timm_train"), digits()
    model, base = example["made"]()
    loop = by_hand("sam", model)
    loop.base = base
    loop.losses = lambda x, y: F.cross_entropy(model(x), y, reduction="none", label_smoothing=0.1)
    schedule = CosineLRScheduler(base, t_initial=2)
    base.register_step_pre_hook(
        lambda *_: dispatch_clip_grad(model_parameters(model, exclude_head=True), 0.02, mode="agc")
    )
    for epoch in range(2):
        for rows in torch.arange(1500).split(100):
            loop.step(loop.gradient(x[rows].view(-1, 1, 8, 8), y[rows]))
        schedule.step(epoch + 1)
    loop.assert_equals(example["main"]())
