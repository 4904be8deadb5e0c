"""Communication that a step has to wait for, over a slow link between two processes.

    python -m benchmarks overlap --out benchmarks/results/overlap_cpu.json

mSAM with m pairs before one step under DistributedDataParallel, reduced in three ways: after every shard's backward,
in one flat piece after the last, and by fastsam, which leaves all but the last descent unreduced and lets DDP reduce
bucket by bucket while that one runs. Computing is asleep, as on a GPU: it takes no time from the processor. The link
is a queue, in which a bucket waits for those before it, then sleeps for its size, then is reduced in earnest.

Exposed is the time from the end of the last layer's backward until all gradients are there. It can fall neither below
the last bucket nor below the whole reduction less the last backward, in which the other buckets hide.
"""

import os
import queue
import socket
import statistics
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import harness
from fastsam import SAM

WAYS = ("every shard", "flat", "fastsam")
LAYERS, ENTRIES = 24, 4096
LATENCY = 0.3e-3
WARM_UP = 3
"""Rounds that do not count: DDP makes its buckets anew in them."""


class Options(NamedTuple):
    """What is measured: pairs before a step, milliseconds of the link and of the backward, and samples of each way."""

    shards: list[int]
    link: list[float]
    backward: float
    rounds: int


class Sleep(torch.autograd.Function):
    """A layer that takes its time: `seconds` for a forward and twice that for a backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: "Layer") -> Tensor:
        time.sleep(layer.seconds)
        ctx.layer, ctx.shape = layer, weight.shape
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.layer.started = time.perf_counter()
        time.sleep(2 * ctx.layer.seconds)
        ctx.layer.finished = time.perf_counter()
        return grad, grad.sum().expand(ctx.shape), None


class Layer(nn.Module):
    seconds = started = finished = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ENTRIES))

    def forward(self, x: Tensor) -> Tensor:
        return Sleep.apply(x, self.weight, self)


class Link:
    """Reduces one piece after the other, in a thread of its own."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds  # for all gradients, latencies apart
        self.taken: list[float] = []
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def reduce(self, piece: Tensor) -> torch.futures.Future:
        future: torch.futures.Future = torch.futures.Future()
        self._queue.put((piece, future))
        return future

    def hook(self, _: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        return self.reduce(bucket.buffer())

    def _run(self) -> None:
        while True:
            piece, future = self._queue.get()
            began = time.perf_counter()
            time.sleep(LATENCY + self.seconds * piece.numel() / (LAYERS * ENTRIES))
            dist.all_reduce(piece.div_(dist.get_world_size()))
            self.taken.append(time.perf_counter() - began)
            future.set_result(piece)


class Arm:
    """One way of reducing, with a model of its own."""

    def __init__(self, way: str, m: int, link: Link, backward: float) -> None:
        self.way, self.m, self.link = way, m, link
        self.model = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        for layer in self.model:
            layer.seconds = backward / 2 / LAYERS / m
        # a bucket for each layer
        self.ddp = DistributedDataParallel(self.model, gradient_as_bucket_view=True, bucket_cap_mb=1e-3)
        self.ddp.register_comm_hook(None, link.hook)
        self.opt = SAM(self.model.parameters(), torch.optim.SGD, model=self.ddp, perturb_sync="replica", lr=0.1)

    def step(self) -> dict[str, float]:
        """Take a step; return its exposed time, its goal and how long it took in all, in seconds."""
        x = torch.ones((), requires_grad=True)
        dist.barrier()
        self.link.taken.clear()
        began = time.perf_counter()
        for shard in range(self.m):
            with self.opt.ascent():
                self.ddp(x).backward()
            with self.opt.descent(sync=self._syncs(shard)):
                self.ddp(x).backward()
                if self.way == "flat" and shard == self.m - 1:
                    self._reduce_flat()
                done = time.perf_counter()
        self.opt.step()
        self.opt.zero_grad(set_to_none=False)
        hidden = self.model[0].finished - self.model[-1].started
        buckets = self.link.taken[-LAYERS:]
        return {
            "exposed": done - self.model[0].finished,
            "goal": max(buckets[-1], sum(buckets) - hidden),
            "step": time.perf_counter() - began,
        }

    def _syncs(self, shard: int) -> bool:
        return self.way == "every shard" or (self.way == "fastsam" and shard == self.m - 1)

    def _reduce_flat(self) -> None:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = self.link.reduce(torch.cat(grads)).wait()
        torch._foreach_copy_(grads, list(flat.split(ENTRIES)))


def measure(rank: int, port: int, options: Options, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    for link_ms in options.link:
        link = Link(link_ms / 1e3)
        for m in options.shards:
            steps = {way: Arm(way, m, link, options.backward / 1e3).step for way in WAYS}
            samples = harness.interleaved(steps, options.rounds + WARM_UP)
            for way in WAYS:
                taken = samples[way][WARM_UP:]
                row = {k: round(1e3 * statistics.median(sample[k] for sample in taken), 1) for k in taken[0]}
                if rank == 0:
                    results.put({"reduce all, ms": link_ms, "m": m, "way": way, **row})
    dist.barrier()
    results.put(None)
    dist.destroy_process_group()


def line(row: dict[str, Any]) -> str:
    met = "" if row["way"] != "fastsam" else f"{row['goal']:9.1f}  {row['exposed'] / row['goal'] - 1:+.0%}"
    return f"{row['reduce all, ms']:8.0f} {row['m']:3}  {row['way']:12} {row['exposed']:9.1f} {row['step']:9.1f} {met}"


@click.command("overlap")
@harness.numbers("--shards", "1,2,4,8", click.IntRange(min=1), "Pairs before a step.")
@harness.numbers("--link", "30,90", click.FloatRange(min=0), "Milliseconds to reduce all gradients.")
@click.option("--backward", type=click.FloatRange(min=0), default=60, show_default=True,
              help="Milliseconds of the whole batch's backward.")  # fmt: skip
@harness.rounds_option(7)
@harness.out_option()
def command(shards: list[int], link: list[float], backward: float, rounds: int, out: Path | None) -> None:
    """Time the communication that a step has to wait for, over a slow link between two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results: Any = context.Queue()
    options = Options(shards, link, backward, rounds)
    processes = mp.start_processes(measure, (port, options, results), nprocs=2, join=False, start_method="spawn")
    print(f"{'link ms':>8} {'m':>3}  {'reduced':12} {'exposed':>9} {'step':>9} {'goal':>9}")
    rows = []
    while (row := results.get()) is not None:
        rows.append(row)
        print(line(row), flush=True)
    while not processes.join():
        pass
    if out:
        about = {"backward, ms": backward, "rounds": rounds, "processes": 2}
        harness.write_record(out, {"environment": harness.about_this_run("cpu"), "options": about, "rows": rows})
