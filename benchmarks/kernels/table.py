"""What `python -m benchmarks kernels` measures: every kernel, its inputs, what it is held against, what it moves.

A new kernel is one more line of `KERNELS`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.arms.eager import EagerSAM
from benchmarks.arms.parameter_lists import LISTS, Shape
from fastsam.kernels import reference
from fastsam.kernels.philox import Draw
from fastsam.kernels.reference import AdamOptions, SGDOptions
from fastsam.kernels.tensor_list import Backup

RHO = 1.0  # moves a small list by about its own length, so that a wrong baseline shows
SGD = SGDOptions(lr=0.1, momentum=0.9, weight_decay=5e-4)
ADAM = AdamOptions(lr=0.1, beta2=0.9, weight_decay=0.1, decoupled=True)
STEPS_TAKEN = 10.0
DECAY = 0.9

Call = Callable[[], Sequence[Sequence[Tensor]]]
"""One call of what is timed; returns lists of tensors, which hold its results."""


class UnavailableError(Exception):
    """A baseline that does not exist here, and why."""


class Lists:
    """What an optimizer has at hand for one list of parameters, each part made when it is first asked for.

    Nothing is zero, and no kernel of the table lets its values grow without bound however often it is called.
    """

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: str, seed: int) -> None:
        self.shapes, self.dtype, self.device = shapes, dtype, device
        self._seed = seed

    def _randn(self, part: int, scale: float) -> list[Tensor]:
        # drawn in float32, and each part from a seed of its own: the same numbers whoever asks for what first
        generator = torch.Generator(self.device).manual_seed(8 * self._seed + part)
        kwargs: Any = {"generator": generator, "device": self.device}
        return [torch.randn(shape, **kwargs).mul_(scale).to(self.dtype) for shape in self.shapes]

    @cached_property
    def weights(self) -> list[Tensor]:
        return self._randn(0, 0.05)

    @cached_property
    def grads(self) -> list[Tensor]:
        return self._randn(1, 0.02)

    @cached_property
    def backup(self) -> Backup:
        backup = Backup(self.weights)
        torch._foreach_copy_(backup.tensors, self._randn(2, 0.05))
        return backup

    @cached_property
    def means(self) -> list[Tensor]:
        return self._randn(3, 0.02)

    @cached_property
    def squares(self) -> list[Tensor]:
        return [t.square_() for t in self._randn(4, 0.05)]

    @cached_property
    def steps(self) -> list[Tensor]:
        return [torch.full((), STEPS_TAKEN, device=self.device) for _ in self.shapes]

    @cached_property
    def norm(self) -> Tensor:
        return reference.norm(self.grads, (), self.every(None), None)

    @property
    def elements(self) -> int:
        """All parameters."""
        return sum(map(math.prod, self.shapes))

    def every(self, value: Any) -> list[Any]:
        """The value once for each parameter."""
        return [value] * len(self.shapes)

    def tensors(self) -> Iterator[Tensor]:
        """All that has been made."""
        made = vars(self)
        for name in ("weights", "grads", "means", "squares"):
            yield from made.get(name, ())
        yield from made["backup"].tensors if "backup" in made else ()

    def copy(self, dtype: torch.dtype) -> "Lists":
        """The same numbers in another dtype and in memory of their own."""
        twin = Lists(self.shapes, dtype, self.device, 0)
        for name in ("weights", "grads", "means", "squares"):
            vars(twin)[name] = [t.to(dtype, copy=True) for t in getattr(self, name)]
        vars(twin)["backup"] = Backup(twin.weights)
        torch._foreach_copy_(twin.backup.tensors, self.backup.tensors)
        return twin

    def parameters(self) -> list[nn.Parameter]:
        """Parameters with gradients, in the memory of `weights` and `grads`."""
        params = [nn.Parameter(w) for w in self.weights]
        for p, g in zip(params, self.grads, strict=True):
            p.grad = g
        return params


class Losses:
    """Per-sample losses of a batch at the weights and at the perturbed ones."""

    def __init__(self, n_rows: int, dtype: torch.dtype, device: str, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        kwargs: Any = {"generator": generator, "device": device}
        self.before, self.after = (torch.rand(n_rows, **kwargs).to(dtype) for _ in range(2))

    @property
    def elements(self) -> int:
        """Rows."""
        return len(self.after)

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.before, self.after)

    def copy(self, dtype: torch.dtype) -> "Losses":
        twin = Losses(0, dtype, self.before.device.type, 0)
        twin.before, twin.after = (t.to(dtype, copy=True) for t in (self.before, self.after))
        return twin


class _Copies:
    """A backup without its bookkeeping, which a compiler would have to trace; all that the twin asks for."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def mark_complete(self) -> None:
        pass


# ours: `k` is `ops`, or `reference` for what is compiled and for the truth


def _norm(k: ModuleType, x: Lists) -> Call:
    none = x.every(None)
    return lambda: [[k.norm(x.grads, (), none, None)]]


def _norm_adaptive(k: ModuleType, x: Lists) -> Call:
    weights, etas = x.weights, x.every(0.0)
    return lambda: [[k.norm(x.grads, weights, etas, None)]]


def _found_nonfinite(k: ModuleType, x: Lists) -> Call:
    return lambda: [[k.found_nonfinite(x.grads)]]


def _perturb(k: ModuleType, x: Lists, keep: float | None = None, rounding: bool = False) -> Call:
    backup: Any = _Copies(x.backup.tensors) if k is reference else x.backup
    weights, grads, norm, rho, none = x.weights, x.grads, x.norm, x.every(RHO), x.every(None)
    numbers = tuple(range(len(weights)))
    drawn = keep is not None or rounding
    draw = Draw(7, 8, numbers, rounding, None if keep is None else tuple(x.every(keep))) if drawn else None

    def call() -> list[list[Tensor]]:
        k.perturb_(weights, grads, backup, norm, rho, none, draw, reference.E0)
        return [weights, backup.tensors]

    return call


def _restore(k: ModuleType, x: Lists) -> Call:
    def call() -> list[list[Tensor]]:
        if k is reference:
            k.restore_(x.weights, x.backup.tensors)
        else:
            x.backup.mark_complete()
            k.restore_(x.backup)
        return [x.weights]

    return call


def _sgd(k: ModuleType, x: Lists) -> Call:
    lists = x.weights, x.backup.tensors, x.grads, x.means
    options = x.every(SGD)

    def call() -> list[list[Tensor]]:
        k.restore_sgd_step_(*lists, options, grad_scale=None, found_inf=None)
        return [lists[0], lists[3]]

    return call


def _adam(k: ModuleType, x: Lists) -> Call:
    lists = x.weights, x.backup.tensors, x.grads, x.means, x.squares
    none, options, steps = x.every(None), x.every(ADAM), x.steps

    def call() -> list[list[Tensor]]:
        k.restore_adam_step_(*lists, none, steps, options, grad_scale=None, found_inf=None)
        return [lists[0], lists[3], lists[4]]

    return call


def _ema(k: ModuleType, x: Lists) -> Call:
    averages, values = x.backup.tensors, x.weights

    def call() -> list[list[Tensor]]:
        k.ema_(averages, values, DECAY, None)
        return [averages]

    return call


def _select(k: ModuleType, x: Losses) -> Call:
    return lambda: [[k.select_largest_increase(x.after, x.before, len(x.after) // 2)]]


# what they are held against


def _missing(reason: str) -> Callable[[Any], Call]:
    def build(x: Any) -> Call:
        raise UnavailableError(reason)

    return build


def _foreach_norm(x: Lists) -> Call:
    return lambda: [[nn.utils.get_total_norm(x.grads, foreach=True)]]


def _foreach_norm_adaptive(x: Lists) -> Call:
    def call() -> list[list[Tensor]]:
        products = torch._foreach_abs(x.weights)
        torch._foreach_mul_(products, x.grads)
        return [[nn.utils.get_total_norm(products, foreach=True)]]

    x.weights  # noqa: B018 - made before the clock runs
    return call


def _foreach_nonfinite(x: Lists) -> Call:
    return lambda: [[(~nn.utils.get_total_norm(x.grads, math.inf, foreach=True).isfinite()).float()]]


def _scaler_nonfinite(x: Lists) -> Call:
    one = torch.ones((), device=x.device)

    def call() -> list[list[Tensor]]:
        found = torch.zeros((), device=x.device)
        torch._amp_foreach_non_finite_check_and_unscale_(x.grads, found, one)
        return [[found]]

    return call


def _foreach_perturb(x: Lists) -> Call:
    weights, copies, grads, norm = x.weights, x.backup.tensors, x.grads, x.norm.to(x.dtype)

    def call() -> list[list[Tensor]]:
        torch._foreach_copy_(copies, weights)
        torch._foreach_add_(weights, torch._foreach_mul(grads, RHO / (norm + reference.E0)))
        return [weights, copies]

    return call


def _foreach_restore(x: Lists) -> Call:
    def call() -> list[list[Tensor]]:
        torch._foreach_copy_(x.weights, x.backup.tensors)
        return [x.weights]

    return call


def _foreach_ema(x: Lists) -> Call:
    averages, values = x.backup.tensors, x.weights

    def call() -> list[list[Tensor]]:
        torch._foreach_lerp_(averages, values, 1 - DECAY)
        return [averages]

    return call


def _eager_ema(x: Lists) -> Call:
    averages, values = x.backup.tensors, x.weights

    def call() -> list[list[Tensor]]:
        for v, w in zip(averages, values, strict=True):
            v.copy_(v * DECAY + (1 - DECAY) * w)
        return [averages]

    return call


def _eager(x: Lists, stage: str, adaptive: bool = False) -> Call:
    eager = EagerSAM(x.parameters(), rho=RHO, adaptive=adaptive)
    if stage == "norm":
        return lambda: [[eager.norm()]]
    norm = x.norm.to(x.dtype)

    def call() -> list[list[Tensor]]:
        eager.perturb(norm)
        return [x.weights, list(eager.old.values())]

    return call


def _eager_step(x: Lists, base: Callable[[Lists, list[nn.Parameter]], Any]) -> Call:
    params = x.parameters()
    eager = EagerSAM(params, base(x, params))
    eager.old = dict(zip(params, x.backup.tensors, strict=True))
    states = [x.means, x.squares] if "squares" in vars(x) else [x.means]

    def call() -> list[list[Tensor]]:
        eager.second_step()
        return [[p.data for p in params], *states]

    return call


def _torch_sgd(x: Lists, params: list[nn.Parameter], **kwargs: Any) -> torch.optim.Optimizer:
    opt = torch.optim.SGD(params, lr=SGD.lr, momentum=SGD.momentum, weight_decay=SGD.weight_decay, **kwargs)
    for p, m in zip(params, x.means, strict=True):
        opt.state[p] = {"momentum_buffer": m}
    return opt


def _torch_adamw(x: Lists, params: list[nn.Parameter], **kwargs: Any) -> torch.optim.Optimizer:
    betas = ADAM.beta1, ADAM.beta2
    opt = torch.optim.AdamW(params, lr=ADAM.lr, betas=betas, eps=ADAM.eps, weight_decay=ADAM.weight_decay, **kwargs)
    # where torch keeps them itself: a counter on the device would make all but the fused step wait for it
    steps = x.steps if kwargs.get("fused") else [step.cpu() for step in x.steps]
    for p, m, v, step in zip(params, x.means, x.squares, steps, strict=True):
        opt.state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
    return opt


def _apex_sgd(x: Lists, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    kwargs: Any = {"lr": SGD.lr, "momentum": SGD.momentum, "weight_decay": SGD.weight_decay}
    opt = _apex("apex.optimizers").FusedSGD(params, **kwargs)
    for p, m in zip(params, x.means, strict=True):
        opt.state[p] = {"momentum_buffer": m}
    return opt


def _apex_adamw(x: Lists, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    kwargs: Any = {"lr": ADAM.lr, "betas": (ADAM.beta1, ADAM.beta2), "eps": ADAM.eps}
    opt = _apex("apex.optimizers").FusedAdam(params, weight_decay=ADAM.weight_decay, adam_w_mode=True, **kwargs)
    opt.param_groups[0]["step"] = int(STEPS_TAKEN)
    for p, m, v in zip(params, x.means, x.squares, strict=True):
        opt.state[p] = {"exp_avg": m, "exp_avg_sq": v}
    return opt


def _apex(module: str) -> Any:
    """A module of NVIDIA apex; PyPI's `apex` is something else, and has no amp_C."""
    try:
        __import__("amp_C")
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise UnavailableError("NVIDIA apex with its CUDA extensions is not installed") from None


def _apex_norm(x: Lists) -> Call:
    amp, applier = _apex("amp_C"), _apex("apex.multi_tensor_apply").multi_tensor_applier
    overflow = torch.zeros(1, dtype=torch.int32, device=x.device)
    return lambda: [[applier(amp.multi_tensor_l2norm, overflow, [x.grads], False)[0]]]


def _copy_then_step(x: Lists, base: Callable[[Lists, list[nn.Parameter]], Any]) -> Call:
    params = x.parameters()
    opt, weights, copies = base(x, params), x.weights, x.backup.tensors
    states = [x.means, x.squares] if "squares" in vars(x) else [x.means]

    def call() -> list[list[Tensor]]:
        torch._foreach_copy_(weights, copies)
        opt.step()
        return [weights, *states]

    return call


def _torch_select(x: Losses) -> Call:
    return lambda: [[(x.after - x.before).topk(len(x.after) // 2).indices.sort().values]]


def _plant_inf(x: Lists) -> None:
    x.grads[len(x.grads) // 2].view(-1)[-1] = math.inf


class Kernel(NamedTuple):
    """One line of the benchmark."""

    ours: Callable[[ModuleType, Any], Call]
    """Builds a call of our launcher, or of its twin, on inputs."""
    baselines: Mapping[str, Callable[[Any], Call]]
    """Build calls that compute the same on the same inputs; `UnavailableError` says why there is none."""
    accesses: float
    """Reads and writes of an element, as the kernel's docstring counts them."""
    dtypes: tuple[torch.dtype, ...]
    gate: str
    """The kernel's name in static_gate.json, without its dtype."""
    make: Callable[[Any, torch.dtype, str, int], Any] = Lists
    """Builds inputs for a workload, dtype, device and seed."""
    workloads: Mapping[str, Callable[[], Any]] = LISTS
    small: Any = ((33, 65), (129,), (2, 3, 5, 7), (1,))
    """The workload on which every call is verified."""
    cut: Callable[[Any], Any] = lambda shapes: [(min(math.prod(shape), 1000),) for shape in shapes]
    """What a dry run makes of a workload."""
    plant: Callable[[Any], None] | None = None
    """Changes inputs so that the answer is another; verified too."""


_BOTH, _FP32, _BF16 = (torch.float32, torch.bfloat16), (torch.float32,), (torch.bfloat16,)
_OTHER_DRAWS = {"torch foreach": _missing("torch draws other random numbers, in kernels of their own")}
_STEP = {
    "sgd": {
        "torch foreach": partial(_copy_then_step, base=partial(_torch_sgd, foreach=True)),
        "torch fused": partial(_copy_then_step, base=partial(_torch_sgd, fused=True)),
        "davda54 eager": partial(_eager_step, base=_torch_sgd),
        "apex": partial(_copy_then_step, base=_apex_sgd),
    },
    "adamw": {
        "torch foreach": partial(_copy_then_step, base=partial(_torch_adamw, foreach=True)),
        "torch fused": partial(_copy_then_step, base=partial(_torch_adamw, fused=True)),
        "davda54 eager": partial(_eager_step, base=_torch_adamw),
        "apex": partial(_copy_then_step, base=_apex_adamw),
    },
}
KERNELS: dict[str, Kernel] = {
    "norm": Kernel(
        _norm,
        {"torch foreach": _foreach_norm, "davda54 eager": partial(_eager, stage="norm"), "apex": _apex_norm},
        1, _BOTH, "squares",
    ),
    "norm adaptive": Kernel(
        _norm_adaptive,
        {"torch foreach": _foreach_norm_adaptive, "davda54 eager": partial(_eager, stage="norm", adaptive=True)},
        2, _FP32, "squares adaptive",
    ),
    "found_nonfinite": Kernel(
        _found_nonfinite, {"torch foreach": _foreach_nonfinite, "torch fused": _scaler_nonfinite},
        1, _BOTH, "nonfinite", plant=_plant_inf,
    ),
    "perturb_": Kernel(
        _perturb, {"torch foreach": _foreach_perturb, "davda54 eager": partial(_eager, stage="perturb")},
        4, _BOTH, "perturb",
    ),
    "perturb_ masked": Kernel(partial(_perturb, keep=0.5), _OTHER_DRAWS, 4, _FP32, "perturb masked"),
    "perturb_ stochastic": Kernel(partial(_perturb, rounding=True), _OTHER_DRAWS, 4, _BF16, "perturb stochastic"),
    "restore_": Kernel(
        _restore,
        {"torch foreach": _foreach_restore, "davda54 eager": _missing("swaps storages, which moves no bytes")},
        2, _BOTH, "restore",
    ),
    "restore_sgd_step_": Kernel(_sgd, _STEP["sgd"], 5, _BOTH, "restore_sgd_step momentum"),
    "restore_adam_step_": Kernel(_adam, _STEP["adamw"], 7, _BOTH, "restore_adam_step"),
    "ema_": Kernel(_ema, {"torch foreach": _foreach_ema, "timm eager": _eager_ema}, 3, _BOTH, "ema"),
    # both losses, and 8 bytes for each chosen row: half of them
    "select_largest_increase": Kernel(
        _select, {"torch": _torch_select}, 3, _FP32, "select", make=Losses, small=100,
        workloads={f"{n} rows": partial(int, n) for n in (128, 1024, 4096, 65536)}, cut=int,
    ),
}  # fmt: skip
"""The kernels of the optimizers and the teacher, by the name of their launcher."""


def bytes_moved(kernel: Kernel, inputs: Any, dtype: torch.dtype) -> int:
    """What one call has to read and write: accesses times the elements' size."""
    return round(kernel.accesses * inputs.elements * dtype.itemsize)
