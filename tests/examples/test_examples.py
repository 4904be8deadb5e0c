"""Every example runs, and ends with the weights of a loop written by hand in plain torch, from the same seed."""

import copy
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="not a source tree")


def main_of(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.fixture
def weights_on_two_ranks(tmp_path):
    """A function of an example that torchrun starts: its final weights, from two processes."""

    def run(name):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
        environment.pop("TRITON_INTERPRET", None)
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        line += [str(Path(__file__).with_name("run_on_ranks.py")), str(EXAMPLES / f"{name}.py"), str(tmp_path / "out")]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return torch.load(tmp_path / "out")

    return run


# the loops by hand


def digits():
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def mlp(*between, width=64):
    return nn.Sequential(nn.Linear(64, width), *between, nn.Linear(width, 10))


def batches(size, rows=1500, epochs=5):
    for _ in range(epochs):
        yield from torch.randperm(rows).split(size)


def mean_loss(model, x, y, **options):
    return F.cross_entropy(model(x), y, **options)


class State:
    """Buffers of some modules as they are now."""

    def __init__(self, modules):
        self.buffers = [b for m in modules for b in m.buffers()]
        self.values = [b.clone() for b in self.buffers]

    def put_back(self):
        for buffer, value in zip(self.buffers, self.values, strict=True):
            buffer.copy_(value)


def sam_gradient(params, rho, run_pass, modules=()):
    """Leave SAM's gradient in p.grad, weights as they were, and buffers and draws as the first pass left them."""
    params = list(params)
    found, draws = State(modules), torch.get_rng_state()
    for p in params:
        p.grad = None
    run_pass()
    moved, kept = State(modules), [p.detach().clone() for p in params]
    norm = torch.stack([p.grad.double().square().sum() for p in params]).sum().sqrt().item()
    with torch.no_grad():
        for p in params:
            p.add_(p.grad, alpha=rho / (norm + 1e-12))
            p.grad = None
        found.put_back()
    torch.set_rng_state(draws)
    run_pass()
    with torch.no_grad():
        for p, value in zip(params, kept, strict=True):
            p.copy_(value)
        moved.put_back()


def assert_same(found, expected):
    """Two modules, or state dicts, have the same entries."""
    found, expected = (m.state_dict() if isinstance(m, nn.Module) else m for m in (found, expected))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# one test for each example


def test_every_example_is_tested_and_short():
    examples = sorted(EXAMPLES.glob("*.py"))
    assert [p.name for p in examples if f"test_{p.stem}" not in globals()] == []
    assert [p.name for p in examples if len(p.read_text().splitlines()) >= 60] == []


def cifar10_by_hand(x, y, epochs):
    torch.manual_seed(0)
    layers = []
    for inputs, outputs, stride in ((x.shape[1], 32, 1), (32, 64, 2), (64, 128, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 10))
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs)
    for _ in range(epochs):
        for rows in batches(128, len(x), 1):
            sam_gradient(
                model.parameters(),
                0.05,
                lambda rows=rows: mean_loss(model, x[rows], y[rows], label_smoothing=0.1).backward(),
                [model],
            )
            opt.step()
        schedule.step()
    return model


def test_cifar10():
    x, y = digits()
    assert_same(main_of("cifar10")(), cifar10_by_hand(x[:1500].view(-1, 1, 8, 8), y[:1500], epochs=3))


def test_cifar10_from_files(tmp_path):
    """In CIFAR-10's layout: files of records, each the label and then the red, green and blue plane."""
    x, y = digits()
    pictures = (
        F.interpolate(x.view(-1, 1, 8, 8), (32, 32), mode="bilinear")
        * torch.tensor([255.0, 128.0, 64.0])[:, None, None]
    )
    pictures = pictures.to(torch.uint8)
    records = torch.cat([y.to(torch.uint8)[:, None], pictures.flatten(1)], dim=1).numpy()
    for i in range(5):
        records[50 * i : 50 * (i + 1)].tofile(tmp_path / f"data_batch_{i + 1}.bin")
    records[250:300].tofile(tmp_path / "test_batch.bin")
    model = main_of("cifar10")(str(tmp_path), "2")
    assert_same(model, cifar10_by_hand(pictures[:250].float() / 255, y[:250], epochs=2))


def accumulated_by_hand(step_gradient):
    torch.manual_seed(0)
    x, y = digits()
    model = mlp(nn.ReLU())
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for rows in batches(100):
        step_gradient(model, [mean_loss_of(model, x[part], y[part]) for part in rows.chunk(4)])
        clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    return model


def mean_loss_of(model, x, y):
    return lambda: (mean_loss(model, x, y) / 4).backward()


def test_accumulation():
    def step_gradient(model, passes):
        params = list(model.parameters())
        gradients = []
        for run_pass in passes:
            sam_gradient(params, 0.1, run_pass)
            gradients.append([p.grad for p in params])
        for p, *parts in zip(params, *gradients, strict=True):
            p.grad = sum(parts)

    assert_same(main_of("accumulation")(), accumulated_by_hand(step_gradient))


def test_accumulation_of_a_large_batch():
    def step_gradient(model, passes):
        sam_gradient(model.parameters(), 0.1, lambda: [run_pass() for run_pass in passes])

    assert_same(main_of("accumulation")(large_batch=True), accumulated_by_hand(step_gradient))


def test_amp():
    model = main_of("amp")()
    torch.manual_seed(0)
    x, y = digits()
    expected = mlp(nn.ReLU(), nn.Dropout(0.2), width=128)
    opt = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    for rows in batches(100):

        def run_pass(rows=rows):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(expected(x[rows]), y[rows], reduction="none").mean()
            loss.backward()

        sam_gradient(expected.parameters(), 0.05, run_pass)
        clip_grad_norm_(expected.parameters(), 1.0)
        opt.step()
    assert_same(model, expected)


def on_two_ranks_by_hand(opt_class, rho, halves, **options):
    """One process that has the rows of both ranks; `halves()` yields those of each step."""
    torch.manual_seed(0)
    x, y = digits()
    model = mlp(nn.ReLU())
    opt = opt_class(model.parameters(), **options)
    for rows in halves():
        passes = [lambda part=part: (mean_loss(model, x[part], y[part]) / 2).backward() for part in rows]
        sam_gradient(model.parameters(), rho, lambda passes=passes: [run_pass() for run_pass in passes])
        opt.step()
    return model


@pytest.mark.xdist_group("torchrun")
def test_ddp(weights_on_two_ranks):
    def halves():
        samplers = [DistributedSampler(range(1500), num_replicas=2, rank=rank) for rank in (0, 1)]
        for epoch in range(5):
            orders = []
            for sampler in samplers:
                sampler.set_epoch(epoch)
                orders.append(torch.tensor(list(sampler)).split(50))
            yield from zip(*orders, strict=True)

    expected = on_two_ranks_by_hand(torch.optim.SGD, 0.05, halves, lr=0.1, momentum=0.9)
    assert_same(weights_on_two_ranks("ddp"), expected)


@pytest.mark.xdist_group("torchrun")
def test_fsdp2(weights_on_two_ranks):
    def halves():
        for rows in batches(100):
            yield rows.chunk(2)

    assert_same(weights_on_two_ranks("fsdp2"), on_two_ranks_by_hand(torch.optim.AdamW, 0.1, halves, lr=3e-3))


def test_gan():
    networks = main_of("gan")(epochs=1)
    torch.manual_seed(0)
    pictures, _ = digits()
    generator = nn.Sequential(
        nn.Linear(16, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid()
    )
    discriminator = nn.Sequential(
        spectral_norm(nn.Linear(64, 128)), nn.LeakyReLU(0.2), spectral_norm(nn.Linear(128, 1)), nn.Flatten(0)
    )
    both = [generator, discriminator]
    opt_d = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    opt_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    for rows in batches(100, len(pictures), epochs=1):
        real = pictures[rows]

        def judge(real=real):
            fake = generator(torch.randn(len(real), 16)).detach()
            (F.softplus(-discriminator(real)) + F.softplus(discriminator(fake))).mean().backward()

        def deceive(real=real):
            F.softplus(-discriminator(generator(torch.randn(len(real), 16)))).mean().backward()

        for opt, network, run_pass in ((opt_d, discriminator, judge), (opt_g, generator, deceive)):
            sam_gradient(network.parameters(), 0.05, run_pass, both)
            opt.step()
    for network, expected in zip(networks, both, strict=True):
        assert_same(network, expected)


def trajectory_loss(z, y, past, lam, tau=5.0):
    loss = F.cross_entropy(z, y)
    if past is None:
        return loss
    log_q, log_p = F.log_softmax(z / tau, 1), F.log_softmax(past / tau, 1)
    return loss + lam * tau**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def test_saf():
    model = main_of("saf")()
    torch.manual_seed(0)
    x, y = digits()
    loader = DataLoader(TensorDataset(x[:1500], y[:1500], torch.arange(1500)), batch_size=100, shuffle=True)
    expected = mlp(nn.ReLU())
    opt = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    records = torch.zeros(11, 1500, 10, dtype=torch.float16)
    for epoch in range(1, 11):
        for x_, y_, ids in loader:
            opt.zero_grad()
            z = expected(x_)
            trajectory_loss(z, y_, records[epoch - 3, ids].float() if epoch > 5 else None, 0.3).backward()
            records[epoch, ids] = z.detach().half()
            opt.step()
    assert_same(model, expected)


def test_mesa():
    found = main_of("mesa")()
    torch.manual_seed(0)
    x, y = digits()
    model = mlp(nn.ReLU())
    teacher = copy.deepcopy(model).eval()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(1, 6):
        for rows in batches(100, epochs=1):
            opt.zero_grad()
            with torch.no_grad():
                past = teacher(x[rows]) if epoch > 2 else None
            trajectory_loss(model(x[rows]), y[rows], past, 0.8).backward()
            opt.step()
            with torch.no_grad():
                for average, own in zip(teacher.parameters(), model.parameters(), strict=True):
                    average.lerp_(own, 0.02)
    for module, expected in zip(found, (model, teacher), strict=True):
        assert_same(module, expected)


def test_graph_step():
    model = main_of("graph_step")()
    torch.manual_seed(0)
    x, y = digits()
    expected = mlp(nn.ReLU())
    opt = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5)
    for _ in range(5):
        for rows in batches(100, rows=1460, epochs=1):
            sam_gradient(
                expected.parameters(), 0.05, lambda rows=rows: mean_loss(expected, x[rows], y[rows]).backward()
            )
            opt.step()
        schedule.step()
    assert_same(model, expected)
