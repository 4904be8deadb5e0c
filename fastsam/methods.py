"""The table of training methods: a new one is one row here, and everything that goes over all methods reads it.

The command line makes options and `--help` of it, and `fastsam compare` tunes and times by it. The benchmarks' arms,
the count gate and the tests' laws take their methods and variants from it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from fastsam.esam import ESAM
from fastsam.gsam import GSAM
from fastsam.looksam import LookSAM
from fastsam.mesa import MESA
from fastsam.msam import MSAM
from fastsam.saf import SAF
from fastsam.sam import SAM

WAYS = ("loss_fn", "backward", "closure", "contexts", "two_steps")
"""How a step can be taken: `step(loss_fn, *batch)`; `backward(loss_fn, *batch)` and then `step()`; `step(closure)`;
`ascent()` and `descent()`; `first_step()` and `second_step()`."""
LOSS_ARGUMENTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"sample_ids": ("num_samples", "num_classes"), "inputs": ("model",)}
)
"""What a loss's constructor takes first, for each thing that its call needs beside logits and targets."""


@dataclass(frozen=True)
class Variant:
    """A method with some of its options set otherwise.

    Args:
        options: keywords of the constructor beside those of the row, or in their place.
        ways: those of `WAYS` that it can step in; the others raise RuntimeError.
    """

    options: Mapping[str, Any]
    ways: tuple[str, ...] = WAYS


@dataclass(frozen=True)
class Method:
    """How one method is built, stepped, tuned and compared.

    Args:
        summary: one line for `--help`.
        paper: who and when, and where to read it.
        kind: "base", a plain torch optimizer; "optimizer", one of ours around a base; "loss", one of ours for any
            optimizer.
        cls: the class of the optimizer or of the loss.
        options: its own hyperparameters with the command line's defaults, keywords of the constructor.
        fixed: keywords of the constructor that make the row what it is.
        choices: the words that an option may be, where it is one.
        variants: by name; "default" is the first and has no options.
        loss_needs: what a loss is called with after logits and targets: "sample_ids", or the model's "inputs".
        tuned: the option that a comparison chooses on held-out data; None for none.
        grid: the values it is chosen from, smallest first.
        base: name of the row whose optimizer it builds on unless told otherwise; None for a base.
    """

    summary: str
    paper: str
    kind: Literal["base", "optimizer", "loss"]
    cls: type
    options: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    variants: Mapping[str, Variant] = field(default_factory=lambda: {"default": Variant({})})
    loss_needs: tuple[str, ...] = ()
    tuned: str | None = None
    grid: tuple[float, ...] = ()
    base: str | None = None

    @property
    def ways(self) -> tuple[str, ...]:
        """Those of `WAYS` that the default variant can step in."""
        return self.variants["default"].ways

    def build(
        self,
        params: Iterable,
        base_cls: type[Optimizer] | str,
        *,
        model: nn.Module | None = None,
        base_options: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ) -> Optimizer:
        """Return the optimizer that the method trains with.

        Args:
            params: tensors, named tensors or groups, as for any torch optimizer.
            base_cls: class of the base optimizer; a row of kind "base" takes its own class.
            model: the module that is trained, or its wrapper; for kind "optimizer".
            base_options: keywords of the base optimizer (lr, momentum, ...).
            **options: keywords of the method in place of the row's, for kind "optimizer".

        Raises:
            TypeError, ValueError: what the constructor refuses; options of a loss, which are `build_loss`'s.
        """
        if self.kind == "optimizer":
            own = {**self.options, **self.fixed, **options}
            return self.cls(params, base_cls, model=model, **own, **base_options)
        if options:
            raise TypeError(f"{self.cls.__name__} of kind {self.kind!r} builds its optimizer without {list(options)}")
        cls: Any = self.cls if self.kind == "base" else base_cls
        return cls(params, **base_options)

    def build_loss(
        self,
        *,
        model: nn.Module | None = None,
        num_samples: int | None = None,
        num_classes: int | None = None,
        **options: Any,
    ) -> nn.Module:
        """Return the loss of a row of kind "loss".

        Args:
            model: the module that is trained; for losses that need "inputs".
            num_samples: size of the training set; for losses that need "sample_ids".
            num_classes: number of classes; likewise.
            **options: keywords of the loss in place of the row's.

        Raises:
            TypeError, ValueError: what the constructor refuses.
        """
        known = {"model": model, "num_samples": num_samples, "num_classes": num_classes}
        first = [known[name] for need in self.loss_needs for name in LOSS_ARGUMENTS[need]]
        return self.cls(*first, **{**self.options, **self.fixed, **options})


_SAM_PAPER = "Foret et al. 2020, https://arxiv.org/abs/2010.01412"
_SAF_PAPER = "Du et al. 2022, https://arxiv.org/abs/2205.14083"
# the SAM paper's, section 3.1
_RHO_GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# a plain optimizer has one pass, and torch's own step(closure)
_ONE_PASS = ("loss_fn", "closure")
# rows are selected where the batch is known
_SELECTS = ("loss_fn", "backward")
# the batch is cut where it is known, or by the caller, one pair for each shard
_CUTS = ("loss_fn", "backward", "contexts")

METHODS: dict[str, Method] = {
    "sgd": Method(
        summary="SGD with momentum",
        paper="Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html",
        kind="base",
        cls=torch.optim.SGD,
        # the SAM papers' on CIFAR; torch's own are a rate of 1e-3, no momentum and no decay
        options={"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
        variants={"default": Variant({}, _ONE_PASS)},
    ),
    "adamw": Method(
        summary="AdamW",
        paper="Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101",
        kind="base",
        cls=torch.optim.AdamW,
        # a rate for the digits' small networks, three times torch's own
        options={"lr": 3e-3, "weight_decay": 0.01},
        variants={"default": Variant({}, _ONE_PASS)},
    ),
    "sam": Method(
        summary="Sharpness-Aware Minimization",
        paper=_SAM_PAPER,
        kind="optimizer",
        cls=SAM,
        options={"rho": 0.05},
        variants={"default": Variant({}), "p = 3": Variant({"p": 3.0}), "p = inf": Variant({"p": math.inf})},
        tuned="rho",
        grid=_RHO_GRID,
        base="sgd",
    ),
    "asam": Method(
        summary="adaptive SAM: the perturbation is relative to each weight's size",
        paper="Kwon et al. 2021, https://arxiv.org/abs/2102.11600",
        kind="optimizer",
        cls=SAM,
        # ten times SAM's, whose class this is: lengths are relative to the weights
        options={"rho": 0.5},
        fixed={"adaptive": True},
        variants={"default": Variant({}), "official": Variant({"adaptive": "official"})},
        tuned="rho",
        # ten times SAM's
        grid=tuple(10 * rho for rho in _RHO_GRID),
        base="sgd",
    ),
    "esam": Method(
        summary="Efficient SAM: perturbs tensors drawn with --beta, goes back on the --gamma sharpest rows",
        paper="Du et al. 2021, https://arxiv.org/abs/2110.03141",
        kind="optimizer",
        cls=ESAM,
        options={"rho": 0.05, "beta": 0.6, "gamma": 0.5, "mask": "tensor"},
        choices={"mask": ("tensor", "element")},
        variants={
            "default": Variant({}, _SELECTS),
            "elements": Variant({"mask": "element"}, _SELECTS),
            "no selection": Variant({"gamma": 1.0}),
            "elements, no selection": Variant({"mask": "element", "gamma": 1.0}),
            "selection only": Variant({"beta": 1.0}, _SELECTS),
            "full norm": Variant({"norm": "full"}, _SELECTS),
            "estimated norm": Variant({"norm": "estimated"}, _SELECTS),
            "reuse": Variant({"selection": "reuse"}, _SELECTS),
            "strict": Variant({"strict": True}, _SELECTS),
        },
        tuned="rho",
        grid=_RHO_GRID,
        base="sgd",
    ),
    "msam": Method(
        summary="mSAM: SAM on each of the --num-shards parts of the batch by itself",
        paper="Behdin et al. 2022, https://arxiv.org/abs/2212.04343",
        kind="optimizer",
        cls=MSAM,
        # the class has no default; 16 rows in each shard of the default batch, as the paper's on CIFAR
        options={"rho": 0.05, "num_shards": 4},
        variants={
            "default": Variant({}, _CUTS),
            "sequential statistics": Variant({"bn_update": "sequential"}, _CUTS),
            "batched": Variant({"execution": "batched"}, _CUTS),
            "by shard size": Variant({"num_shards": None, "shard_size": 4}, _CUTS),
            "uniform": Variant({"weighting": "uniform"}, _CUTS),
        },
        tuned="rho",
        grid=_RHO_GRID,
        base="sgd",
    ),
    "gsam": Method(
        summary="Surrogate Gap SAM: also lowers the gap between the loss and the perturbed one, by --alpha",
        paper="Zhuang et al. 2022, https://arxiv.org/abs/2203.08065",
        kind="optimizer",
        cls=GSAM,
        options={"rho": 0.05, "alpha": 0.4},
        variants={
            "default": Variant({}),
            "radius by rate": Variant({"rho_min": 0.02, "lr_max": 0.1}),
        },
        tuned="rho",
        grid=_RHO_GRID,
        base="sgd",
    ),
    "looksam": Method(
        summary="LookSAM: SAM in every --k-th step, its direction kept for the others",
        paper="Liu et al. 2022, https://arxiv.org/abs/2203.02714",
        kind="optimizer",
        cls=LookSAM,
        options={"rho": 0.1, "k": 5, "alpha": 0.7},
        variants={"default": Variant({}), "by tensor": Variant({"scope": "tensor"})},
        tuned="rho",
        grid=_RHO_GRID,
        base="sgd",
    ),
    "saf": Method(
        summary="each picture compared with the model's own outputs --lag epochs ago, after epoch --start-epoch",
        paper=_SAF_PAPER,
        kind="loss",
        cls=SAF,
        options={"lam": 0.3, "tau": 5.0, "lag": 3, "start_epoch": 5},
        # beside a plain optimizer; around one of ours it goes that one's ways
        variants={
            "default": Variant({}, _ONE_PASS),
            "int8 history": Variant({"history_dtype": torch.int8}, _ONE_PASS),
            "on the host": Variant({"storage": "host"}, _ONE_PASS),
        },
        loss_needs=("sample_ids",),
        tuned="lam",
        grid=(0.1, 0.3, 1.0, 3.0),
        base="sgd",
    ),
    "mesa": Method(
        summary="the model compared with a moving average of itself, after epoch --start-epoch",
        paper=_SAF_PAPER,
        kind="loss",
        cls=MESA,
        # the authors' decay of 0.9998 looks back over 5000 steps, eight times as many as the digits' 30 epochs have
        options={"lam": 0.8, "tau": 5.0, "decay": 0.995, "start_epoch": 5},
        # beside a plain optimizer; around one of ours it goes that one's ways
        variants={
            "default": Variant({}, _ONE_PASS),
            "bf16 teacher": Variant({"teacher_dtype": torch.bfloat16}, _ONE_PASS),
        },
        loss_needs=("inputs",),
        tuned="lam",
        grid=(0.1, 0.3, 0.8, 3.0),
        base="sgd",
    ),
}
