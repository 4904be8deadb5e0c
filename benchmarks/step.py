"""Time of whole training steps, method by method, side by side.

    python -m benchmarks.step --models resnet18,vit --methods base,sam,esam --out benchmarks/results/step_cpu.json

Every round runs each arm once, in an order that changes from round to round, so that drifts of the machine hit all
alike; ratios are medians of the ratios within a round. The base optimizer is timed twice: what its two arms differ by
is the noise that no other difference may be smaller than. Beside the time stand the passes that ran: rows through
forward passes, with and without a graph, and rows and tensors through backward passes.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.eager_sam import EagerSAM
from benchmarks.models import MODELS
from fastsam import ESAM, MESA, MSAM, SAF, SAM

BASES: dict[str, Callable] = {
    "cnn": partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4),
    "resnet18": partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4),
    "vit": partial(torch.optim.AdamW, lr=1e-3),
}
CLASSES = 10
Step = Callable[[Tensor, Tensor, Tensor], Any]
"""Takes one step on inputs, labels and sample ids."""


def plain(model: nn.Module, base: partial, n_samples: int, **options: Any) -> Step:
    """The base optimizer, and nothing else."""
    return with_loss(base(model.parameters(), **options), model, lambda z, x, y, ids: F.cross_entropy(z, y))


def with_loss(opt: torch.optim.Optimizer, model: nn.Module, loss_of: Callable) -> Step:
    def step(x: Tensor, y: Tensor, ids: Tensor) -> None:
        opt.zero_grad()
        loss_of(model(x), x, y, ids).backward()
        opt.step()

    return step


def eager(model: nn.Module, base: partial, n_samples: int) -> Step:
    """SAM as in davda54/sam."""
    params = list(model.parameters())
    opt = EagerSAM(params, base(params))

    def step(x: Tensor, y: Tensor, ids: Tensor) -> None:
        F.cross_entropy(model(x), y).backward()
        opt.first_step()
        opt.base.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.second_step()
        opt.base.zero_grad()

    return step


def kozistr(model: nn.Module, base: partial, n_samples: int) -> Step:
    """SAM of the pytorch_optimizer package."""
    import pytorch_optimizer

    opt = pytorch_optimizer.SAM(model.parameters(), base_optimizer=base.func, rho=0.05, **base.keywords)

    def step(x: Tensor, y: Tensor, ids: Tensor) -> None:
        def closure() -> Tensor:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        closure()
        opt.step(closure)
        opt.zero_grad()

    return step


def ours(method: Callable, model: nn.Module, base: partial, n_samples: int) -> Step:
    """One of our optimizers."""
    opt = method(model.parameters(), base.func, rho=0.05, model=model, **base.keywords)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    return lambda x, y, ids: opt.step(losses, x, y)


def saf(model: nn.Module, base: partial, n_samples: int, **options: Any) -> Step:
    """SAF in an epoch whose rows all have a past."""
    loss_of = SAF(n_samples, CLASSES, lag=1, start_epoch=0, **options)
    taken = 0
    inner = with_loss(base(model.parameters()), model, lambda z, x, y, ids: loss_of(z, y, ids))

    def step(x: Tensor, y: Tensor, ids: Tensor) -> None:
        nonlocal taken
        if taken % (n_samples // len(x)) == 0:
            loss_of.set_epoch(1 + taken // (n_samples // len(x)))
        taken += 1
        inner(x, y, ids)

    return step


def mesa(model: nn.Module, base: partial, n_samples: int, **options: Any) -> Step:
    """MESA with its teacher's forward and average."""
    loss_of, opt = MESA(model, start_epoch=0, **options), base(model.parameters())
    loss_of.attach(opt)
    return with_loss(opt, model, lambda z, x, y, ids: loss_of(z, y, x))


Build = Callable[[nn.Module, partial, int], Step]
"""Makes a method's step for a model, its base optimizer, and a number of samples."""
METHODS: dict[str, Build] = {
    "base": plain,
    "base again": plain,
    "base, fused": partial(plain, fused=True),
    "davda54 eager sam": eager,
    **({"pytorch_optimizer sam": kozistr} if find_spec("pytorch_optimizer") else {}),
    "sam": partial(ours, SAM),
    "esam": partial(ours, partial(ESAM, beta=0.6, gamma=0.5)),
    "esam, element mask": partial(ours, partial(ESAM, beta=0.6, gamma=0.5, mask="element")),
    "esam, reuse": partial(ours, partial(ESAM, beta=0.6, gamma=0.5, selection="reuse")),
    "esam, perturbation only": partial(ours, partial(ESAM, beta=0.6, gamma=1.0)),
    "esam, selection only": partial(ours, partial(ESAM, beta=1.0, gamma=0.5)),
    "msam, 4 shards": partial(ours, partial(MSAM, num_shards=4)),
    "saf": saf,
    "mesa": mesa,
    "mesa, bf16 teacher": partial(mesa, teacher_dtype=torch.bfloat16),
}
BATCHES = 8
"""Of an epoch, for what remembers samples."""


class Arm:
    """One method on its own copy of one model."""

    def __init__(self, model_name: str, build: Build, rows: int, device: str) -> None:
        torch.manual_seed(0)
        self.model = MODELS[model_name]().to(device)
        self._step = build(self.model, BASES[model_name], BATCHES * rows)
        self.x = torch.randn(rows, 3, 32, 32, device=device)
        self.y = torch.randint(0, CLASSES, (rows,), device=device)
        self.ids = torch.arange(BATCHES * rows, device=device).split(rows)
        self.device, self.taken = device, 0
        self.times: list[float] = []
        self.passes: dict[str, float] = {}

    def step(self) -> None:
        self._step(self.x, self.y, self.ids[self.taken % BATCHES])
        self.taken += 1

    def time(self, steps: int) -> None:
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append((time.perf_counter() - start) / steps)

    def count(self, steps: int) -> None:
        """Run steps and count, per step and as shares of the batch, what passes through the model."""
        seen = {"forward rows": 0, "forward rows without graph": 0, "backward rows": 0, "weight gradients": 0}
        n_params = len(list(self.model.parameters()))

        def forward(module: nn.Module, args: Any, out: Tensor) -> None:
            seen["forward rows"] += len(out)
            if out.requires_grad:
                out.register_hook(backward)
            else:
                seen["forward rows without graph"] += len(out)

        def backward(grad: Tensor) -> None:
            seen["backward rows"] += len(grad)

        def accumulated(p: Tensor) -> None:
            seen["weight gradients"] += 1

        handles: list[Any] = [self.model.register_forward_hook(forward)]
        handles += [p.register_post_accumulate_grad_hook(accumulated) for p in self.model.parameters()]
        for _ in range(steps):
            self.step()
        for handle in handles:
            handle.remove()
        units = {"weight gradients": n_params}
        self.passes = {k: round(v / steps / units.get(k, len(self.x)), 3) for k, v in seen.items()}


def measure(model: str, methods: list[str], rows: int, rounds: int, steps: int, device: str) -> dict[str, Any]:
    arms = {method: Arm(model, METHODS[method], rows, device) for method in ["base", "base again", *methods]}
    for arm in arms.values():
        arm.count(10)  # the tensor mask is random: its share of weight gradients is a mean
    order = list(arms)
    for i in range(rounds):
        random.Random(i).shuffle(order)
        for method in order:
            arms[method].time(steps)
    reference = arms["base"].times
    sam = arms["sam"].times if "sam" in arms else None

    def ratio(times: list[float], other: list[float]) -> float:
        return round(statistics.median(t / o for t, o in zip(times, other, strict=True)), 3)

    return {
        method: {
            "milliseconds": round(statistics.median(arm.times) * 1e3, 2),
            "spread": [round(min(arm.times) * 1e3, 2), round(max(arm.times) * 1e3, 2)],
            "over base": ratio(arm.times, reference),
            "over sam": ratio(arm.times, sam) if sam else None,
            "passes": arm.passes,
        }
        for method, arm in arms.items()
    }


def environment(device: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def table(model: str, results: dict[str, Any]) -> str:
    lines = [
        f"{model:26} {'ms':>9} {'over base':>10} {'over SAM':>9}  forward (no graph) / backward rows / weight gradients"
    ]
    for method, row in results.items():
        p = row["passes"]
        lines.append(
            f"{method:26} {row['milliseconds']:9.1f} {row['over base']:10.3f} {row['over sam'] or 0:9.3f}  "
            f"{p['forward rows']:.2f} ({p['forward rows without graph']:.2f}) / {p['backward rows']:.2f} / "
            f"{p['weight gradients']:.2f}"
        )
    return "\n".join(lines)


def plot(record: dict[str, Any], models: list[str], path: Path) -> None:
    """Draw each method's step time over the base's, and the base's own noise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 + 0.28 * sum(len(record[model]) for model in models)), layout="constrained")
    for axes, model in zip(figure.subplots(len(models), squeeze=False)[:, 0], models, strict=True):
        ratios = {method: row["over base"] for method, row in record[model].items() if method != "base"}
        bars = axes.barh(list(ratios), list(ratios.values()))
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.axvline(1, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(f"{model}: step time over {BASES[model].func.__name__}")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet18,vit", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--methods", default=",".join(m.replace(",", "+") for m in list(METHODS)[2:]),
                        help="joined by commas, with + for a comma inside a name")  # fmt: skip
    parser.add_argument("--rows", type=int, default=32, help="batch size")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of an arm in a round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the results; a plot goes beside it")
    options = parser.parse_args(arguments)
    methods = [m.replace("+", ",") for m in options.methods.split(",")]
    record: dict[str, Any] = {
        "environment": environment(options.device),
        "options": {k: str(v) for k, v in vars(options).items() if k != "out"},
    }
    for model in options.models.split(","):
        record[model] = measure(model, methods, options.rows, options.rounds, options.steps, options.device)
        print(table(model, record[model]), end="\n\n", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")
        plot(record, options.models.split(","), options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
