"""MESA: Memory-Efficient Sharpness-Aware Training for Free (Du et al. 2022, https://arxiv.org/abs/2205.14083).

    v_1    = w_1
    t      = f_v(x)                                      in eval mode, without a gradient
    loss   = CE(z, y) + lam tau^2 KL(softmax(t / tau) || softmax(z / tau))     (Eq. 13, from epoch start_epoch + 1 on)
    v     <- decay v + (1 - decay) w                     after every step of the base optimizer (Eq. 10)

The teacher v stands for the trajectory that SAF remembers, for one copy of the weights and a forward a step. See
docs/algorithms.md#mesa.
"""

import operator
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from fastsam.arguments import check_number, shown
from fastsam.distributed.dtensor import is_dtensor
from fastsam.kernels import ops
from fastsam.kernels.calls import Call, run_all
from fastsam.kernels.past import Past
from fastsam.trajectory.loss import Trajectory, uncompiled
from fastsam.trajectory.teacher import Pick, copy_of, filled, logits_of, paired
from fastsam.two_pass import capture
from fastsam.two_pass.batch import leaves, tensors_of
from fastsam.two_pass.forward_alone import ForwardAlone
from fastsam.two_pass.stage import Stage, under_way
from fastsam.two_pass.state import StepState, found_inf_of


class MESA(Trajectory):
    """Cross-entropy plus the divergence from a teacher, the moving average of the model that is trained.

    Call it with the inputs, update it after every step, and `set_epoch(e)` at the start of every epoch from 1 on::

        mesa = MESA(model)
        mesa.attach(opt)                             # or mesa.update() after every opt.step()
        for epoch in range(1, epochs + 1):
            mesa.set_epoch(epoch)
            for x, y in loader:
                loss = mesa(model(x), y, x)

    `mesa.teacher` is a plain module in eval mode and may be evaluated, saved or exported; report its accuracy beside
    the model's, not in its place. The teacher's forward is skipped while the divergence is inactive, its update never.
    Inside a fastsam optimizer's step both passes compare with the same teacher, whose forward runs once if both have
    the same inputs.

    Teacher and model are paired by the names of their tensors. After surgery on the model that changes the names or
    shapes of parameters (a head added or replaced, pruning, a parametrization) build MESA anew. A buffer that a forward
    adds or replaces by one of another shape reaches the teacher as a copy.

    Args:
        model: what is trained, or its DistributedDataParallel or torch.compile wrapper; held, not registered. To
            compile the teacher as well, call `mesa.teacher.compile()`.
        teacher: a second module with the parameters and buffers of `model`, which are copied into it, for models that
            `copy.deepcopy` cannot copy. Default: a deep copy of the model.
        output: how to pick the logits out of what the model returns: a key or attribute, an index, or a function.
            Default: the returned tensor, or its key or attribute "logits".
        lam: weight of the divergence, >= 0.
        tau: temperature, > 0.
        decay: of the average, in (0, 1): about the last 1 / (1 - decay) steps. 0.9998 is the authors' for ImageNet.
        start_epoch: the divergence counts after this epoch, from epoch start_epoch + 1 on.
        label_smoothing: of the cross-entropy, in [0, 1].
        tau_squared: multiply the divergence by tau^2.
        ignore_index: class index of rows that do not count.
        reduction: "mean" over the rows that count, "sum", or "none" for a loss per row.
        teacher_dtype: dtype of autocast in the teacher's forward. Default: as the model's, that is that of the context
            around the call, or of the logits where they are 16 bits.

    Raises:
        TypeError: model is no module, cannot be deep-copied, or an argument has the wrong type.
        ValueError: an argument out of range, a model whose parameters are DTensors (FSDP2, tensor parallel), or a
            teacher that shares tensors with the model or has others.
    """

    teacher: nn.Module

    def __init__(
        self,
        model: nn.Module,
        *,
        lam: float = 0.8,
        tau: float = 5.0,
        decay: float = 0.9998,
        start_epoch: int = 5,
        label_smoothing: float = 0.0,
        tau_squared: bool = True,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
        teacher_dtype: torch.dtype | None = None,
        teacher: nn.Module | None = None,
        output: Pick = None,
    ) -> None:
        super().__init__(lam, tau, start_epoch, label_smoothing, tau_squared, ignore_index, reduction)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_number("decay", decay, lambda value: 0 < value < 1, "in (0, 1)")
        is_floating = isinstance(teacher_dtype, torch.dtype) and teacher_dtype.is_floating_point
        if teacher_dtype is not None and not is_floating:
            raise TypeError(f"teacher_dtype must be a floating dtype or None, got {shown(teacher_dtype)}")
        student = _unwrap(model)
        if any(map(is_dtensor, student.parameters())):
            raise ValueError("the model's parameters are DTensors, which MESA cannot average; use SAF, or DDP")
        if isinstance(output, bool) or not (output is None or isinstance(output, (str, int)) or callable(output)):
            raise TypeError(f"output must be a key, an index or a function, got {output!r}")
        self.decay, self.teacher_dtype, self.output = decay, teacher_dtype, output
        # In a tuple, so that the model is not registered as a part of this module.
        self._student = (student,)
        self.teacher = (copy_of(student) if teacher is None else filled(teacher, student)).requires_grad_(False).eval()
        self._forward_alone = ForwardAlone()
        self._first_pass: tuple[Any, Tensor] | None = None
        """Inputs and teacher logits of the step's first pass, for its second one."""
        self._begun: tuple[Any, Tensor, torch.cuda.Stream | None] | None = None
        """Inputs, teacher logits and stream of a forward that `begin` started."""

    def train(self, mode: bool = True) -> "MESA":
        """Set the mode of the loss; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    @uncompiled
    def forward(self, logits: Tensor, targets: Tensor, inputs: Any) -> Tensor:
        """Return the loss.

        Args:
            logits: the model's, float64, float32, float16 or bfloat16 of shape [n, classes].
            targets: int64 class indices of shape [n], or class probabilities of shape [n, classes].
            inputs: what the model got for them: a tensor, a tuple of arguments, or a dict of keywords.

        Returns:
            The loss, 0-dim or of shape [n]: while the divergence is inactive that of `F.cross_entropy`, else float32,
            or float64 for float64 logits.

        Raises:
            ValueError: a wrong shape, or a teacher that answers in another one.
        """
        self._check(logits, targets)
        capture.watch(lambda: (self.active, self.lam, self.tau, self.decay))
        if not self.active:
            return self._cross_entropy(logits, targets)
        past = self._teacher_logits(inputs, logits)
        if past.shape != logits.shape:
            raise ValueError(
                f"the teacher's logits have shape {list(past.shape)}, the model's {list(logits.shape)}; pass the "
                "inputs that the model had for these logits"
            )
        return self._loss(logits, targets, Past(past))

    def begin(self, inputs: Any) -> None:
        """Start the teacher's forward ahead of the model's, on a GPU on a stream of its own, beside it.

        Optional; the next call with the same `inputs` object waits for it. The precision is that of the context around
        this call, or `teacher_dtype`. Does nothing while the divergence is inactive.
        """
        if not self.active:
            return
        device = next(self.teacher.parameters()).device
        if device.type != "cuda":
            self._begun = _Batch(inputs), self._teacher_forward(inputs, self.teacher_dtype), None
            return
        stream = _stream_of_teachers(device)
        # The inputs and the teacher's last update were queued on the current stream.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._begun = _Batch(inputs), self._teacher_forward(inputs, self.teacher_dtype), stream

    def _teacher_logits(self, inputs: Any, logits: Tensor) -> Tensor:
        step = under_way()
        stage = None if step is None else step.stage
        if stage is Stage.DESCENT and self._first_pass is not None and self._first_pass[0] == _Batch(inputs):
            return self._first_pass[1]
        is_begun = self._begun is not None and self._begun[0] == _Batch(inputs)
        past = self._finish_begun() if is_begun else self._teacher_forward(inputs, self._dtype(logits))
        self._first_pass = (_Batch(inputs), past) if stage is Stage.ASCENT else None
        return past

    def _finish_begun(self) -> Tensor:
        """Return the logits of the forward that `begin` started; the current stream waits for them."""
        assert self._begun is not None
        (_, past, stream), self._begun = self._begun, None
        if stream is not None:
            current = torch.cuda.current_stream(past.device)
            current.wait_stream(stream)
            past.record_stream(current)
        return past

    def _teacher_forward(self, inputs: Any, dtype: torch.dtype | None) -> Tensor:
        """Return the teacher's logits, in the precision of the context around it or under autocast to `dtype`."""
        kind = next(self.teacher.parameters()).device.type

        def forward() -> Any:
            if isinstance(inputs, Mapping):
                return self.teacher(**inputs)
            return self.teacher(*inputs) if isinstance(inputs, tuple) else self.teacher(inputs)

        with nullcontext() if dtype is None else torch.autocast(kind, dtype):
            output = self._forward_alone(forward)
        return logits_of(output, self.output).detach()

    def _dtype(self, logits: Tensor) -> torch.dtype | None:
        is_half = logits.dtype in (torch.float16, torch.bfloat16)
        if self.teacher_dtype is None and is_half and not torch.is_autocast_enabled(logits.device.type):
            return logits.dtype
        return self.teacher_dtype

    # the average

    def update(self, found_inf: Tensor | None = None) -> None:
        """Move the teacher towards the model, one step of the average; call it after the optimizer's step.

        Floating-point parameters and buffers are averaged, in one launch for each dtype; all others are copied.

        Args:
            found_inf: 0-dim tensor; where it is not 0 the step was skipped, and the teacher stays where it is.

        Raises:
            RuntimeError: the weights are perturbed now, or the model has other parameters than the teacher.
        """
        with torch.no_grad():
            run_all(self._update_calls(found_inf))

    @torch.no_grad()
    def _update_calls(self, found_inf: Tensor | None) -> list[Call]:
        """Return the calls that do what `update` does."""
        step = under_way()
        if step is not None and step.stage in (Stage.DESCENT, Stage.FIRST):
            raise RuntimeError(
                f"update() cannot be called {step.stage.value}: the weights are perturbed; call it after step()"
            )
        self._first_pass = None
        # A forward that is still running reads the teacher's weights, which this changes.
        if self._begun is not None:
            self._finish_begun()
        pairs = paired(self.teacher, self._student[0])
        averaged = [(v, w) for v, w in pairs if v.is_floating_point() or v.is_complex()]
        averages = [torch.view_as_real(v) if v.is_complex() else v for v, _ in averaged]
        values = [torch.view_as_real(w) if w.is_complex() else w for _, w in averaged]
        moves = ops.ema_calls(averages, [w.detach() for w in values], self.decay, found_inf) if averages else []
        others = [(v, w) for v, w in pairs if not (v.is_floating_point() or v.is_complex())]
        return [*moves, *(partial(v.copy_, w) for v, w in others)]

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Update with every step of this optimizer from now on; not with a fastsam optimizer's step that was skipped.

        With a fastsam optimizer's it is a part of the step, which an interrupt leaves whole or not taken; else a hook.

        Returns:
            A handle whose `remove()` ends it.
        """
        run = getattr(optimizer, "_run", None)
        if isinstance(run, StepState):
            handle = RemovableHandle(run.followers)
            run.followers[handle.id] = self._update_calls
            return handle

        def follow(stepped: torch.optim.Optimizer, *_: Any) -> None:
            self.update(found_inf_of(stepped))

        follow.can_be_captured = True  # type: ignore[attr-defined]
        return optimizer.register_step_post_hook(follow)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the epoch; the teacher is part of the state dict as a module."""
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on in the epoch of a saved state."""
        self.epoch = state["epoch"]


class _Batch:
    """Inputs as they are now: equal to those that hold the same objects, whose tensors nobody has written into since.

    The containers need not be the same: a loss function gets new ones in every pass.
    """

    def __init__(self, inputs: Any) -> None:
        self._kind, self._held = type(inputs), list(leaves(inputs))
        self._versions = [None if t.is_inference() else t._version for t in tensors_of(inputs, every=True)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Batch) or (other._kind, other._versions) != (self._kind, self._versions):
            return False
        return len(other._held) == len(self._held) and all(map(operator.is_, other._held, self._held))

    __hash__ = None  # type: ignore[assignment]


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside of DDP and torch.compile."""
    while True:
        inner: Any = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if inner is None:
            return model
        model = inner


@cache
def _stream_of_teachers(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for each device: the allocator and cuBLAS keep memory for every stream that is used."""
    return torch.cuda.Stream(device)
