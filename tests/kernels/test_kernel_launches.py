"""What a launch costs the host and promises it: tables, uploads, launch counts, no waiting, and interrupts."""

import inspect
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, assert_same_bits, copies, kernels, tensors
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsam import SAM
from fastsam.kernels.philox import Draw
from fastsam.kernels.reference import AdamOptions, SGDOptions
from fastsam.kernels.tensor_list import Backup

if kernels is None:
    pytest.skip("triton is not installed", allow_module_level=True)
from fastsam.kernels import launch, launch_tables


class Operations(TorchDispatchMode):
    """Records torch's operations, and refuses those that read a device's memory on the host."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), f"{name} waits for the device"
        self.names.add(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def no_tables():
    """Clear all tables that other tests may have left: a store that is full drops all it holds, at any time."""
    for cache in (launch_tables._splits, launch_tables._hyperparameter_rows, launch_tables._chunk_map):
        getattr(cache, "cache_clear", getattr(cache, "clear", None))()


def uploads():
    """How often pointers, chunks and hyperparameters were uploaded."""
    return [launch_tables.uploads[kind] for kind in ("rows", "chunks", "hyperparameters")]


def lists(n_lists, dtypes=(torch.float32,), sizes=(63, 300)):
    return [[t for t in tensors(dtypes, seed, sizes=sizes) if t.stride() != (6, 2)] for seed in range(n_lists)]


def test_tables_are_rebuilt_only_when_a_pointer_length_or_dtype_changes():
    weights, grads, buffers = lists(3)
    n = len(weights)

    def step(lr=0.1, rho=0.05):
        before = uploads()
        kernels.norm(grads)
        kernels.perturb_(weights, grads, backup, torch.ones((), device=DEVICE), [rho] * n)
        kernels.restore_(backup)
        kernels.restore_sgd_step_(weights, weights, grads, buffers, [SGDOptions(lr, 0.9)] * n)
        kernels.found_nonfinite(grads)
        return [now - then for now, then in zip(uploads(), before, strict=True)]

    backup = Backup(weights)
    step()
    assert step() == [0, 0, 0]
    assert step(lr=0.05) == [0, 0, 1]
    assert step(lr=0.05, rho=0.1) == [0, 0, 1]
    assert step() == [0, 0, 0]  # known from before
    lr = torch.tensor(0.3, device=DEVICE)
    assert step(lr=lr) == [1, 0, 1]
    lr.fill_(0.2)
    assert step(lr=lr) == [0, 0, 0]
    moved = grads[0]
    grads[0] = grads[0].clone()
    assert step() == [4, 0, 0]  # norm, perturb, step, check
    grads[0] = moved
    assert step() == [0, 0, 0]
    weights[0], grads[0], buffers[0] = (torch.zeros(200, device=DEVICE) for _ in range(3))
    backup = Backup(weights)
    pointers, chunk_maps, _ = step()
    assert (pointers, chunk_maps) == (5, 1 if launch.INTERPRETED else 2)
    weights[0], grads[0], buffers[0] = (t.to(torch.float64) for t in (weights[0], grads[0], buffers[0]))
    backup = Backup(weights)
    assert step()[0] == 10  # both dtypes have tables of their own


def test_the_same_memory_seen_in_another_way_is_not_mistaken():
    weights, square = [torch.ones(8, 8, device=DEVICE)], torch.randn(8, 8, device=DEVICE)
    before, backup, one = copies(weights), Backup(weights), torch.ones((), device=DEVICE)
    for grad in (square, square.t(), square):
        kernels.perturb_(weights, [grad], backup, one, [1.0])
        torch.testing.assert_close(weights[0], before[0] + grad)
        kernels.restore_(backup)
    half = torch.randn(64, device=DEVICE).half()
    for grad in (half, half.view(torch.bfloat16), half[:32], half):
        torch.testing.assert_close(kernels.norm([grad]), grad.double().norm(), rtol=1e-6, atol=0)


def test_chunks_cover_every_element_once():
    lengths = [0, 1, 64, 65, 0, 200]
    pairs = launch_tables.chunks_of(lengths, 64).tolist()
    assert pairs == [[1, 0], [2, 0], [3, 0], [3, 1], [5, 0], [5, 1], [5, 2], [5, 3]]
    assert launch_tables.chunks_of([], 64).shape == (0, 2)


@pytest.mark.parametrize(("dtypes", "launched"), [((torch.float32,), 1), ((torch.float32, torch.bfloat16), 2)])
def test_launches_and_operations_of_a_step(launches, dtypes, launched):
    weights, grads, means, squares = lists(4, dtypes)
    for v in squares:
        v.abs_()
    n = len(weights)
    groups = [[0.05, -0.1][i % 2] for i in range(n)]
    sgd = [[SGDOptions(0.1, 0.9), SGDOptions(0.2, 0.5, nesterov=True)][i % 2] for i in range(n)]
    adam = [[AdamOptions(0.1), AdamOptions(0.2, decoupled=True, weight_decay=0.1)][i % 2] for i in range(n)]
    steps = [torch.zeros((), device=DEVICE) for _ in weights]
    backup = Backup(weights)
    scale = torch.ones((), device=DEVICE)

    def run():
        norm = kernels.norm(grads, weights, [None, 0.01] * (n // 2) + [None] * (n % 2))
        kernels.perturb_(weights, grads, backup, norm, groups, None, Draw(0, 1, tuple(range(n))))
        found = kernels.found_nonfinite(grads)
        kernels.restore_sgd_step_(weights, backup.tensors, grads, means, sgd, grad_scale=scale, found_inf=found)
        kernels.restore_adam_step_(
            weights, backup.tensors, grads, means, squares, [None] * n, steps, adam, found_inf=found
        )
        kernels.restore_(backup)

    run()
    del launches[:]
    with Operations() as operations:
        run()
    stages = ["_squares", "_perturb", "_nonfinite", "_restore_sgd_step", "_restore_adam_step", "_restore"]
    expected = [f"{name}_kernel" for name in stages for _ in range(launched)]
    assert launches == [*expected[:launched], "_finish_norm_kernel", *expected[launched:]]
    assert operations.names <= {"empty", "slice", "detach"}  # nothing that a device would have to run


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU())
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


def train(net, base, steps, **keywords):
    def losses(x, y):
        return F.cross_entropy(net(x), y, reduction="none")

    generator = torch.Generator().manual_seed(1)
    optimizer = SAM(net.parameters(), base, model=net, rho=0.05, **keywords)
    history = []
    for _ in range(steps):
        x, y = torch.randn(32, 1, 8, 8, generator=generator), torch.arange(32) % 10
        x[:, 0, 0, :] += y[:, None]
        history.append(optimizer.step(losses, x.to(DEVICE), y.to(DEVICE)).item())
        optimizer.zero_grad()
    return history


@pytest.mark.parametrize(("check_finite", "count"), [(True, 5), (False, 4)])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_launches_of_sam(launches, choose, base, check_finite, count):
    choose("triton")
    train(Net().to(DEVICE), base, 1, lr=0.1, check_finite=check_finite)
    assert len(launches) == count + 4, "and four copies of all buffers"


def test_buffers_of_any_number_and_dtype_are_copied_in_four_launches(launches, choose):
    choose("triton")
    net = Net().to(DEVICE)
    for i, dtype in enumerate((torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool) * 5):
        net.register_buffer(f"kept_{i}", torch.zeros(4 * (1 + i), dtype=dtype, device=DEVICE))
    train(net, torch.optim.SGD, 1, lr=0.1)
    assert len(launches) == 9


@pytest.mark.parametrize("base", [(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.003})])
def test_a_small_network_trains_alike_on_both_backends(choose, base):
    found = []
    for backend in ("torch", "triton"):
        choose(backend)
        torch.manual_seed(0)
        found.append(train(Net().to(DEVICE), base[0], 12, **base[1]))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][-1] < found[0][0]


class Interrupt(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


class InterruptAt:
    """Raises at the n-th entry into or return from a call that the launchers and kernels make; with none, counts them.

    Whatever lies deeper is torch's or the interpreter's, whose own state an interrupt there could spoil for good.
    """

    def __init__(self, n=None):
        self.n, self.count = n, 0

    def __call__(self, frame, event, argument):
        code = frame.f_code
        # an exception in a generator that is being closed is not raised anywhere
        if event not in ("call", "return") or code.co_flags & inspect.CO_GENERATOR:
            return
        if KERNELS in (code.co_filename[: len(KERNELS)], frame.f_back.f_code.co_filename[: len(KERNELS)]):
            self.count += 1
            if self.count == self.n:
                raise Interrupt

    def run(self, function):
        sys.setprofile(self)
        try:
            function()
        except Interrupt:
            return True
        finally:
            sys.setprofile(None)
        return False


KERNELS = str(Path(launch.__file__).parent)


@pytest.mark.skipif(not launch.INTERPRETED, reason="a kernel on a GPU runs to its end once it is launched")
def test_an_interrupt_anywhere_in_a_perturbation_can_be_undone(monkeypatch):
    monkeypatch.setattr(launch, "_INTERPRETED_BLOCK_SIZE", 64)
    originals = [torch.randn(80), torch.randn(21)[1:].bfloat16(), torch.randn(6, 4)[:, ::2]]
    grads = [torch.ones_like(t) for t in originals]
    weights, backup = copies(originals), None
    changed = 0

    def perturb_all():
        kernels.perturb_(weights, grads, backup, torch.ones(()), [0.5] * 3)

    backup = Backup(weights)
    for _ in range(2):  # the first time other things happen besides
        profile = InterruptAt()
        assert not profile.run(perturb_all)
        kernels.restore_(backup)
    assert_same_bits(weights, originals)
    assert profile.count > 300
    for n in range(1, profile.count + 1, 7):
        for copy in backup.tensors:
            copy.fill_(torch.nan)  # what lies there from the step before must never be trusted
        assert InterruptAt(n).run(perturb_all)
        changed += not all(map(torch.equal, weights, originals))
        for _ in range(2):  # the restore is interrupted, and comes again
            InterruptAt(n // 3 + 1).run(lambda: kernels.restore_(backup))
        kernels.restore_(backup)
        assert not backup.valid
        assert_same_bits(weights, originals)
    assert changed > 10
    perturb_all()  # and nothing is left behind that would hurt the next step
    kernels.restore_(backup)
    assert_same_bits(weights, originals)


@pytest.mark.skipif(not launch.INTERPRETED, reason="a kernel on a GPU runs to its end once it is launched")
def test_an_interrupt_in_a_step_leaves_counters_that_count(monkeypatch):
    monkeypatch.setattr(launch, "_INTERPRETED_BLOCK_SIZE", 64)
    weights, grads, means, squares = ([torch.ones(100)] for _ in range(4))
    steps = [torch.zeros(())]

    def step():
        kernels.restore_adam_step_(weights, weights, grads, means, squares, [None], steps, [AdamOptions(0.1)])

    step()
    profile = InterruptAt()
    profile.run(step)
    assert steps[0].item() == 2
    for n in range(1, profile.count, profile.count // 20):
        assert InterruptAt(n).run(step)
        before = steps[0].item()
        step()
        assert steps[0].item() == before + 1
        InterruptAt(n).run(lambda: kernels.found_nonfinite(grads))
        assert kernels.found_nonfinite(grads).item() == 0
        assert kernels.found_nonfinite([torch.full((100,), torch.inf)]).item() == 1
