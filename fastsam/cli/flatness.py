"""How flat trained models are: what `fastsam sharpness`, `compare --sharpness` and `train --log-sharpness` compute."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam.cli.config import Config, read_config
from fastsam.cli.data import Split, generator, load, short
from fastsam.cli.errors import InputError
from fastsam.cli.files import CHECKPOINT, contents_of, environment, read_checkpoint, write_json
from fastsam.cli.models import build_model
from fastsam.sharpness import (
    Landscape,
    gradient_cosine,
    hessian_eigenvalues,
    landscape,
    line,
    power_iteration,
    sam_sharpness,
)
from fastsam.sharpness.hessian import GRADIENTS_PER_PRODUCT
from fastsam.sharpness.landscape import check_state
from fastsam.sharpness.objective import How, Mode, Objective, Progress

AT_ONCE = 256
"""Pictures in a batch of measures that do not depend on it."""
Stage = Callable[[str], Progress | None]
"""Begins to show a measure by its name, and returns what is told how far it is."""


class Batches:
    """Pictures and labels in batches, in their order and without crops and flips; can be walked repeatedly.

    Args:
        data: says how stored pictures become inputs.
        x: stored pictures.
        y: labels of shape [n].
        size: of a batch; the last one may be smaller.
        layout: torch.channels_last or torch.contiguous_format.
    """

    def __init__(self, data: Split, x: Tensor, y: Tensor, size: int, layout: torch.memory_format) -> None:
        self.data, self.layout = data, layout
        self.parts = list(zip(x.split(size), y.split(size), strict=True))

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.parts:
            yield self.data.normalised(x).contiguous(memory_format=self.layout), y


def losses_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that measures take: cross-entropies of a batch, shape [n], with nothing added to them."""

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).float(), y, reduction="none")

    return losses


class Trained:
    """A model from a checkpoint, and the pictures it was trained and scored on.

    Args:
        path: a checkpoint of `fastsam train`, or the directory that it lies in.
        device: "cpu" or "cuda".
        samples: how many training pictures to measure on, drawn with the seed; None for all.
        seed: of that draw.

    Raises:
        InputError: there is no such checkpoint, its weights are of another architecture, or its data is not there.
    """

    def __init__(self, path: Path, device: str, samples: int | None = None, seed: int = 0) -> None:
        self.path = path / CHECKPOINT if path.is_dir() else path
        if not self.path.exists():
            raise InputError(f"{self.path} does not exist; name a checkpoint of fastsam train, or its directory")
        checkpoint = read_checkpoint(self.path)
        self.config: Config = read_config(checkpoint, self.path)
        with contents_of(self.path):
            self.epochs, self.state = len(checkpoint["history"]), dict(checkpoint["model"])
        self.data = load(
            self.config.data,
            seed=self.config.seed,
            split_seed=self.config.split_seed,
            label_noise=self.config.label_noise,
            scored_on=self.config.scored_on,
            device=device,
        )
        model = build_model(self.config.model, tuple(self.data.x.shape[1:]), self.data.classes)
        self.layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        self.model = model.to(device).to(memory_format=self.layout)  # type: ignore[call-overload]
        try:
            check_state(self.model.state_dict(), self.state, str(self.path))
        except ValueError as error:
            raise InputError(f"{error}; was it written by another version?") from error
        self.model.load_state_dict(self.state)
        rows = torch.randperm(len(self.data.x), generator=generator(seed, "measured samples"))
        # in their order, so that the same batches come of it where all are taken
        rows = rows[:samples].sort().values.to(device)
        self.x, self.y = self.data.x[rows], self.data.y[rows]

    def batches(self, size: int = AT_ONCE) -> Batches:
        """Return the measured training pictures with the labels that were trained on, noisy ones and all."""
        return Batches(self.data, self.x, self.y, size, self.layout)

    def scored(self) -> Batches:
        """Return the pictures that accuracy is measured on."""
        return Batches(self.data, self.data.score_x, self.data.score_y, AT_ONCE, self.layout)

    @property
    def label(self) -> str:
        """The method with what is tuned of it, the label noise and the seed."""
        noise = f", {self.config.label_noise:.0%} noise" if self.config.label_noise else ""
        return f"{self.config.label}{noise}, seed {self.config.seed}"

    @property
    def about(self) -> str:
        """Data and model."""
        return f"{short(self.config.data)}, {self.config.model}"


@dataclass(frozen=True)
class Flatness:
    """What was measured of a model. Losses are means of the cross-entropy.

    Attributes:
        loss: of the measured training pictures, with the labels trained on.
        gap: the loss of the pictures that accuracy is measured on, minus that.
        sharpness: by how much it rises within rho, batch by batch.
        cosine: of the gradients of SAM's two passes.
        eigenvalues: the largest of the Hessian, descending.
        residual: of the first, relative; None where there is none.
        ratio: of the first to the fifth, where there are five.
        power: the first once more, by power iteration, where asked for.
        power_converged: whether that is what it says, and not just a lower bound.
        rho: radius of the perturbation.
        batch_size: m, the pictures that share one.
        tol: relative accuracy of the eigenvalues.
        mode: of batch norm.
        samples: measured training pictures.
        gradients: what it cost, in gradients of all of them.
        seconds: how long that took.
    """

    loss: float
    gap: float
    sharpness: float
    cosine: float
    eigenvalues: tuple[float, ...]
    residual: float | None
    ratio: float | None
    power: float | None
    power_converged: bool
    rho: float
    batch_size: int
    tol: float
    mode: str
    samples: int
    gradients: float
    seconds: float


def measure(
    trained: Trained,
    *,
    rho: float,
    batch_size: int,
    eigenvalues: int,
    tol: float,
    check: bool = False,
    mode: Mode = "eval",
    seed: int = 0,
    stage: Stage = lambda name: None,
) -> Flatness:
    """Measure a model.

    Args:
        trained: the model with its pictures.
        rho: radius of the perturbation.
        batch_size: m, the pictures that share one.
        eigenvalues: how many of the Hessian; 0 for none.
        tol: their relative accuracy.
        check: whether to find the largest once more, by power iteration.
        mode: of batch norm, "eval" or "train".
        seed: of what is drawn.
        stage: begins to show a measure. Default: shows nothing.

    Raises:
        InputError: more eigenvalues than weights, or a loss that is not finite.
    """
    begin = time.perf_counter()
    model, losses = trained.model, losses_of(trained.model)
    how: dict[str, Any] = {"mode": mode, "seed": seed}
    batches, at_once = trained.batches(batch_size), trained.batches()
    found = sam_sharpness(model, losses, batches, rho, progress=stage("sharpness"), **how)
    turned = gradient_cosine(model, losses, batches, rho, progress=stage("cosine of the gradients"), **how)
    gradients, top, power = found.gradients + 2, None, None
    name = "Hessian-vector products"
    try:
        if eigenvalues:
            top = hessian_eigenvalues(model, losses, at_once, eigenvalues, tol=tol, progress=stage(name), **how)
            gradients += top.gradients
        if check:
            power = power_iteration(model, losses, at_once, progress=stage(f"{name}, power iteration"), **how)
            gradients += power.products * GRADIENTS_PER_PRODUCT
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{trained.path}: {error}") from error
    return Flatness(
        loss=found.loss,
        gap=mean_loss(trained.model, trained.scored(), mode) - found.loss,
        sharpness=found.value,
        cosine=turned.mean,
        eigenvalues=top.values if top else (),
        residual=top.residual if top else None,
        ratio=top.ratio if top else None,
        power=power.value if power else None,
        power_converged=power is not None and power.converged,
        rho=rho,
        batch_size=batch_size,
        tol=tol,
        mode=mode,
        samples=found.samples,
        gradients=gradients,
        seconds=time.perf_counter() - begin,
    )


def mean_loss(model: nn.Module, batches: Batches, mode: Mode = "eval") -> float:
    """Return the mean cross-entropy of some pictures.

    Args:
        model: computes logits.
        batches: the pictures.
        mode: of batch norm.
    """
    objective = Objective(model, losses_of(model), batches, How(mode))
    with objective.measuring():
        return float(objective.loss())


HEADERS = ("model", "loss", "gap", "sharpness", "cosine", "lambda_1", "ratio", "cost", "time")


def cells(label: str, found: Flatness) -> list[str]:
    """Return a row of the table, one text for each of `HEADERS`.

    Args:
        label: of the model.
        found: its numbers.
    """
    first = f"{found.eigenvalues[0]:.4g}" if found.eigenvalues else "-"
    power = "" if found.power is None else f" ({'' if found.power_converged else '> '}{found.power:.4g})"
    ratio = f"{found.ratio:.2f}" if found.ratio is not None else "-"
    numbers = [f"{found.loss:.4g}", f"{found.gap:.4g}", f"{found.sharpness:.4g}", f"{found.cosine:.3f}"]
    return [label, *numbers, first + power, ratio, f"{found.gradients:.0f}", f"{found.seconds:.1f} s"]


def caption(found: Flatness) -> str:
    """Return what the table's numbers are."""
    by_power = " (in parentheses: by power iteration, or a lower bound)" if found.power is not None else ""
    largest = f" lambda_1: largest eigenvalue of the Hessian, to {found.tol:g} of itself{by_power}."
    eigenvalues = f"{largest} ratio: of it to the fifth." if found.eigenvalues else ""
    return (
        f"Mean cross-entropy of {found.samples} training pictures with the labels trained on, batch norm in "
        f"{found.mode} mode. gap: the loss of the pictures that accuracy is measured on, minus that. sharpness: by how "
        f"much it rises along SAM's perturbation, rho {found.rho:g}, of each batch of {found.batch_size}. cosine: of "
        f"the gradients of SAM's two passes.{eigenvalues} cost: in gradients of all pictures."
    )


def write(out: Path, models: Sequence[Trained], found: Sequence[Flatness]) -> None:
    """Write the numbers as JSON.

    Args:
        out: the file's path.
        models: what was measured.
        found: the numbers of each.

    Raises:
        InputError: the file cannot be written.
    """
    rows = [
        {"checkpoint": str(model.path), "epochs": model.epochs, "config": asdict(model.config), **asdict(one)}
        for model, one in zip(models, found, strict=True)
    ]
    write_json(out, {"models": rows, "environment": environment(models[0].x.device.type)})


def landscapes(models: Sequence[Trained], stage: Stage, **how: Any) -> list[Landscape]:
    """Return the landscape of each model, along the same random numbers.

    Args:
        models: of one data set, or their losses have nothing in common.
        stage: begins to show a model by its label.
        how: keywords of `fastsam.sharpness.landscape`.

    Raises:
        InputError: the models were trained on several data sets.
    """
    first = models[0]
    for other in models[1:]:
        if other.config.data != first.config.data:
            raise InputError(
                f"{other.path} was trained on {other.config.data} and {first.path} on {first.config.data}; pictures on "
                "one scale need one data set"
            )
    return [landscape(m.model, losses_of(m.model), m.batches(), progress=stage(m.label), **how) for m in models]


def line_between(start: Trained, end: Trained, stage: Stage, **how: Any) -> Landscape:
    """Return the losses on the line from one model to another, on the first one's pictures.

    Args:
        start: at 0.
        end: at 1.
        stage: begins to show it by its label.
        how: keywords of `fastsam.sharpness.line`.

    Raises:
        InputError: the models are of two architectures.
    """
    try:
        check_state(start.state, end.state, str(end.path))
    except ValueError as error:
        raise InputError(f"{error} in {start.path}") from error
    model, label = start.model, f"{start.label} to {end.label}"
    return line(model, losses_of(model), start.batches(), start.state, end.state, progress=stage(label), **how)
