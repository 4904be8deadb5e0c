"""The settings of the papers' tables, each value with where it stands, and what a paper does not give.

    preset = presets.load("esam/cifar10/resnet18")
    opt = ESAM(model.parameters(), torch.optim.SGD, model=model, **preset.method_keywords(), **preset.base_keywords())

A name is method/data/model, and a fourth part tells rows of one table apart: the epochs, the share of noisy labels, or
the method that the table compares with. What a paper leaves open is asked for by name, never filled in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

__all__ = ["Preset", "Value", "load", "names"]

BASE_OPTIONS = ("lr", "momentum", "weight_decay")
METHOD_OPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sgd": (),
        "sam": ("rho",),
        "asam": ("rho", "adaptive"),
        "esam": ("rho", "beta", "gamma"),
        "msam": ("rho", "num_shards"),
        "gsam": ("rho", "rho_min", "alpha", "lr_max", "lr_min"),
        "looksam": ("rho", "k", "alpha"),
        "saf": ("lam", "tau", "lag", "start_epoch"),
        "mesa": ("lam", "tau", "decay", "start_epoch"),
    }
)
"""Keywords of each method's constructor that a preset may set; `BASE_OPTIONS` are its base optimizer's."""


@dataclass(frozen=True)
class Value:
    """A setting, and where it stands."""

    value: Any
    source: str


@dataclass(frozen=True)
class Preset:
    """What one row of a paper's table says of a training run.

    Args:
        name: method/data/model, and what tells rows of one table apart.
        method: row of the table of methods.
        base: "sgd" or "adamw".
        paper: who and when, and where to read it.
        values: settings by name: the base optimizer's, the method's, and those of the run: data, model, epochs,
            batch_size, schedule ("cosine", "onecycle"), warmup (share of the epochs), clip, label_smoothing,
            label_noise (share), freeze_bn; further what is told but not set: seeds, steps, resolution, shard_size.
        gaps: settings that the paper does not give, with what else is known of them.
        notes: what a user has to know beside that, in whole sentences.
    """

    name: str
    method: str
    base: str
    paper: str
    values: Mapping[str, Value]
    gaps: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # one user's changes are not to be another's
        for name in ("values", "gaps"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __getitem__(self, name: str) -> Any:
        """Return the setting of that name.

        Raises:
            ValueError: the paper does not give it; the message says what else is known.
            KeyError: it is no setting of this preset.
        """
        if name in self.gaps:
            raise ValueError(self.refusal([name]))
        if name not in self.values:
            raise KeyError(f"{self.name} has no {name!r}; it has {', '.join([*self.values, *self.gaps])}")
        return self.values[name].value

    @property
    def shard_size(self) -> int | None:
        """Samples that shared a perturbation in the authors' set-up, where that was not the whole batch."""
        return self.values["shard_size"].value if "shard_size" in self.values else None

    def method_keywords(self, **given: Any) -> dict[str, Any]:
        """Return the keywords of the method's constructor.

        Args:
            **given: values for what the paper does not give, or in place of its own.

        Raises:
            ValueError: the paper does not give a keyword, and neither do you.
            TypeError: no such keyword.
        """
        return self._keywords(METHOD_OPTIONS[self.method], given)

    def base_keywords(self, **given: Any) -> dict[str, Any]:
        """Return the keywords of the base optimizer's constructor; arguments and errors as of `method_keywords`."""
        return self._keywords(BASE_OPTIONS, given)

    def refusal(self, missing: list[str], spelled: Mapping[str, str] = MappingProxyType({})) -> str:
        """Return what to say where settings are asked for that the paper does not give.

        Args:
            missing: names of gaps.
            spelled: how to pass each. Default: as a keyword.
        """
        listed = [f"{name} ({self.gaps[name]})" if self.gaps[name] else name for name in missing]
        ways = ", ".join(spelled.get(name, f"{name}=...") for name in missing)
        return f"{self.name}: the paper does not give {', '.join(listed)}; pass {ways}"

    def _keywords(self, names: tuple[str, ...], given: Mapping[str, Any]) -> dict[str, Any]:
        mine = [name for name in names if name in self.values or name in self.gaps]
        if unknown := [name for name in given if name not in mine]:
            raise TypeError(f"{self.name} has no {unknown[0]!r} here; it has {', '.join(mine) or 'nothing to set'}")
        if missing := [name for name in mine if name in self.gaps and name not in given]:
            raise ValueError(self.refusal(missing))
        return {name: given[name] if name in given else self.values[name].value for name in mine}


def names() -> list[str]:
    """Return the names of all presets, sorted."""
    return sorted(_PRESETS)


def load(name: str) -> Preset:
    """Return a preset.

    Args:
        name: method/data/model, one of `names()`.

    Raises:
        TypeError: the name is no string.
        ValueError: there is no such preset; the message names the nearest ones.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a preset must be a string, got {name!r}")
    if name not in _PRESETS:
        near = get_close_matches(name, _PRESETS, n=3, cutoff=0.5) or list(_PRESETS)[:3]
        raise ValueError(f"unknown preset {name!r}; near it are {', '.join(near)}; presets.names() lists all")
    return _PRESETS[name]


_Values = dict[str, Value]
_TEXT = "the paper's text"


def _at(source: str, **values: Any) -> _Values:
    """Return values that stand in one place."""
    return {name: Value(value, source) for name, value in values.items()}


def _known_as(value: float | str) -> str:
    """Return what is said of a gap that the authors' code fills."""
    return f"the authors' code has {value}"


# SAM

_SAM = "Foret et al. 2020, https://arxiv.org/abs/2010.01412"
_SAM_CODE = "the authors' code, https://github.com/google-research/sam"
_ACCELERATORS = "implied by the batch size and the number of accelerators, each with a perturbation of its own"
_SAM_NOTES = (
    "The authors' code has Nesterov momentum, clips the averaged final gradient at 5, and has the weight decay inside "
    "both losses, batch norm's weights included.",
)
_SAM_COMMON = (
    _at(_TEXT, batch_size=256, momentum=0.9, seeds=5)
    | _at(_SAM_CODE, schedule="cosine", label_smoothing=0.0)
    | _at(_ACCELERATORS, shard_size=32)
)
_NO_EPOCHS = {"epochs": ""}
# name of the model: {name of the data: (epochs, lr, weight decay, rho)}
_SAM_TABLE_6: dict[str, dict[str, tuple[int | None, float, float, float]]] = {
    "wrn28-10": {"cifar10": (200, 0.1, 5e-4, 0.05), "cifar100": (200, 0.1, 5e-4, 0.1)},
    "wrn28-10/1800": {"cifar10": (1800, 0.05, 1e-3, 0.05), "cifar100": (1800, 0.05, 1e-3, 0.1)},
    "shakeshake-26-2x96d": {"cifar10": (None, 0.02, 1e-3, 0.02), "cifar100": (None, 0.02, 1e-3, 0.05)},
    "pyramidnet": {"cifar10": (None, 0.05, 5e-4, 0.05), "cifar100": (None, 0.05, 5e-4, 0.2)},
    "pyramidnet-shakedrop": {"cifar10": (None, 0.02, 5e-4, 0.05), "cifar100": (None, 0.05, 5e-4, 0.05)},
}
_SAM_TABLE_7: dict[str, dict[str, tuple[int | None, float, float, float]]] = {
    "wrn28-10": {"svhn": (None, 0.01, 5e-4, 0.01), "fashion-mnist": (None, 0.1, 5e-4, 0.05)},
    "shakeshake-26-2x96d": {"svhn": (None, 0.01, 5e-4, 0.01), "fashion-mnist": (None, 0.1, 5e-4, 0.02)},
}
# share of noisy labels in percent: rho
_SAM_NOISE = {20: 0.1, 40: 0.1, 60: 0.1, 80: 0.05}
# name of the data: rho
_SAM_TABLE_8 = {
    "fgvc-aircraft": 0.1, "flowers": 0.2, "oxford-iiit-pets": 0.1, "stanford-cars": 0.2, "cifar10": 0.05,
    "cifar100": 0.02, "birdsnap": 0.05, "food101": 0.02,
}  # fmt: skip
_FINE_TUNED = "It fine-tunes a network trained before, with batch norm's statistics frozen."


def _sam_tables() -> list[Preset]:
    found = []
    for table, rows in (("table 6", _SAM_TABLE_6), ("table 7", _SAM_TABLE_7)):
        for model, sets in rows.items():
            for data, (epochs, lr, decay, rho) in sets.items():
                values = _at(table, data=data, model=model.partition("/")[0], lr=lr, weight_decay=decay, rho=rho)
                values |= _SAM_COMMON | (_at(table, epochs=epochs) if epochs else {})
                gaps = {} if epochs else _NO_EPOCHS
                found.append(Preset(f"sam/{data}/{model}", "sam", "sgd", _SAM, values, gaps, _SAM_NOTES))
    return found


def _sam_imagenet() -> list[Preset]:
    found = []
    for model in ("resnet50", "resnet101", "resnet152"):
        for epochs in (100, 200, 400):
            values = _at(
                _TEXT, data="imagenet", model=model, epochs=epochs, batch_size=4096, lr=1.0, momentum=0.9,
                weight_decay=1e-4, rho=0.05, schedule="cosine", resolution=224,
            ) | _at(_ACCELERATORS, shard_size=128)  # fmt: skip
            more = "" if epochs == 100 else f"/{epochs}"
            found.append(Preset(f"sam/imagenet/{model}{more}", "sam", "sgd", _SAM, values))
    return found


def _sam_label_noise() -> list[Preset]:
    found = []
    for percent, rho in _SAM_NOISE.items():
        values = _at(_TEXT, data="cifar10", model="resnet32", epochs=200, label_noise=percent / 100, rho=rho)
        gaps = {"lr": "", "weight_decay": "", "batch_size": "256 in its other experiments on CIFAR"}
        values |= _at(_TEXT, momentum=0.9) | _at(_SAM_CODE, schedule="cosine")
        notes = ("fastsam draws a noisy label from all classes, the right one included.",)
        found.append(Preset(f"sam/cifar10/resnet32/noise{percent}", "sam", "sgd", _SAM, values, gaps, notes))
    return found


def _sam_fine_tuning() -> list[Preset]:
    common = _at("appendix C.2", momentum=0.9, schedule="cosine", weight_decay=1e-5, freeze_bn=True)
    models: dict[str, _Values] = {
        "efficientnet-b7": _at("appendix C.2", batch_size=1024, lr=0.016, steps=5000)
        | _at(_ACCELERATORS, shard_size=16),
        "efficientnet-l2": _at("appendix C.2", batch_size=512, lr=0.008, resolution=475)
        | _at('inferred from "adjusted accordingly" in appendix C.2', steps=10_000)
        | _at(_ACCELERATORS, shard_size=4),
    }
    found = []
    for model, own in models.items():
        for data, rho in _SAM_TABLE_8.items():
            values = _at("table 8", data=data, model=model, rho=rho) | common | own
            gaps = {"epochs": f"it trains for {own['steps'].value} steps"}
            found.append(Preset(f"sam/{data}/{model}", "sam", "sgd", _SAM, values, gaps, (_FINE_TUNED,)))
        values = _at("appendix C.2", data="imagenet", model=model, epochs=10, lr=0.1, rho=0.05) | common
        notes = (_FINE_TUNED, "The last layer is kept too.")
        found.append(Preset(f"sam/imagenet/{model}", "sam", "sgd", _SAM, values, {"batch_size": ""}, notes))
    return found


# ESAM

_ESAM = "Du et al. 2021, https://arxiv.org/abs/2110.03141"
_ESAM_CODE = "the authors' code, https://github.com/dydjw9/Efficient_SAM"
# name of the model: epochs, batch size, lr, rho, beta, gamma, and the weight decay of each method
_ESAM_TABLE_4: dict[str, tuple[int, int, float, float, float, float, dict[str, float]]] = {
    "resnet18": (200, 128, 0.05, 0.05, 0.6, 0.5, {"sgd": 5e-4, "sam": 1e-3, "esam": 1e-3}),
    "wrn28-10": (200, 256, 0.05, 0.1, 0.5, 0.5, {"sgd": 5e-4, "sam": 1e-3, "esam": 1e-3}),
    "pyramidnet110": (300, 256, 0.1, 0.2, 0.6, 0.5, {"sgd": 5e-4, "sam": 5e-4, "esam": 5e-4}),
}


def _esam_tables() -> list[Preset]:
    found = []
    notes = ("The learning rate falls by epochs there, and the authors' code adds cutout to crops and flips.",)
    for data in ("cifar10", "cifar100"):
        for model, (epochs, batch, lr, rho, beta, gamma, decays) in _ESAM_TABLE_4.items():
            by_code = ("The authors' code has beta 0.5 and a rate of 0.05.",) if model == "pyramidnet110" else ()
            for method in ("esam", "sam", "sgd"):
                values = (
                    _at("table 4", data=data, model=model, epochs=epochs, batch_size=batch, lr=lr)
                    | _at("table 4", weight_decay=decays[method], seeds=3)
                    | _at(_ESAM_CODE, momentum=0.9)
                    | _at(_TEXT, schedule="cosine")
                )
                if method != "sgd":
                    values |= _at("table 4", rho=rho)
                if method == "esam":
                    values |= _at("table 4", beta=beta, gamma=gamma)
                name = f"esam/{data}/{model}" + ("" if method == "esam" else f"/{method}")
                found.append(Preset(name, method, "sgd", _ESAM, values, notes=notes + by_code))
    for model in ("resnet50", "resnet101"):
        values = _at(
            "table 5", data="imagenet", model=model, epochs=90, batch_size=512, lr=0.2, weight_decay=1e-4, rho=0.05,
            beta=0.6, gamma=0.7, schedule="cosine", shard_size=128, resolution=224,
        ) | _at(_ESAM_CODE, momentum=0.9)  # fmt: skip
        notes = ("A perturbation there is that of the 128 samples of a device, not of the batch.",)
        found.append(Preset(f"esam/imagenet/{model}", "esam", "sgd", _ESAM, values, notes=notes))
    return found


# SAF and MESA

_SAF = "Du et al. 2022, https://arxiv.org/abs/2205.14083"
_SAF_CODE = "the authors' code, https://github.com/AngusDujw/SAF"
_CODE_RATE = "with a batch of 1024 and a rate of 0.4"


def _trajectory() -> list[Preset]:
    found = []
    for method, lam in (("saf", 0.3), ("mesa", 0.8)):
        own = _at(_TEXT, lam=lam, tau=5.0, start_epoch=5)
        own |= _at(_TEXT, lag=3) if method == "saf" else {}
        open_: dict[str, str] = {"decay": _known_as(0.9998)} if method == "mesa" else {}
        notes = ("The divergence is multiplied by tau squared, as in the authors' code and not in the paper.",)
        for model in ("resnet50", "resnet101", "resnet152"):
            values = own | _at(_TEXT, data="imagenet", model=model, epochs=90, batch_size=4096, lr=1.4, momentum=0.9)
            values |= _at(_SAF_CODE, label_smoothing=0.1)
            gaps = open_ | {
                "weight_decay": f"{_known_as(0.0001)}, {_CODE_RATE}",
                "schedule": _known_as("cosine"),
            }
            found.append(Preset(f"{method}/imagenet/{model}", method, "sgd", _SAF, values, gaps, notes))
        values = own | _at(_TEXT, data="imagenet", model="vit-s32", epochs=300)
        gaps = open_ | {"lr": "", "weight_decay": "", "batch_size": "", "schedule": ""}
        betas = "AdamW's betas are 0.9 and 0.999, torch's own."
        found.append(Preset(f"{method}/imagenet/vit-s32", method, "adamw", _SAF, values, gaps, (*notes, betas)))
        gaps = open_ | {"epochs": "", "lr": "", "weight_decay": "", "batch_size": "", "schedule": ""}
        for data in ("cifar10", "cifar100"):
            for model in ("resnet18", "resnet101", "wrn28-10", "pyramidnet110"):
                values = own | _at(_TEXT, data=data, model=model, momentum=0.9, seeds=3)
                found.append(Preset(f"{method}/{data}/{model}", method, "sgd", _SAF, values, gaps, notes))
    return found


# mSAM

_MSAM = "Behdin et al. 2022, https://arxiv.org/abs/2212.04343"
_SHARDS = "On several processes num_shards counts those of all together: divide it by the number of processes."
# name of the task: lr, epochs, rho
_MSAM_TABLE_C1 = {
    "cola": (1e-5, 60, 0.01), "mrpc": (1e-5, 60, 0.01), "sst2": (5e-6, 20, 0.05), "qqp": (2e-5, 15, 0.05),
}  # fmt: skip


def _msam_tables() -> list[Preset]:
    found = []
    for data in ("cifar10", "cifar100"):
        for model, lr in (("resnet50", 0.5), ("wrn28-10", 0.75)):
            values = _at(
                "table B.1", data=data, model=model, lr=lr, momentum=0.9, epochs=200, weight_decay=5e-4,
                label_smoothing=0.1, schedule="onecycle", warmup=0.05, rho=0.2, batch_size=512, num_shards=32,
                shard_size=16, seeds=5,
            )  # fmt: skip
            found.append(Preset(f"msam/{data}/{model}", "msam", "sgd", _MSAM, values, notes=(_SHARDS,)))
        values = _at(
            "table B.2", data=data, model="vit-b16", lr=1e-3, epochs=20, weight_decay=0.3, schedule="onecycle",
            warmup=0.05, clip=1.0, rho=0.3, batch_size=512, num_shards=32, pretrained=True,
        )  # fmt: skip
        notes = ("It fine-tunes a network trained before.", _SHARDS)
        found.append(Preset(f"msam/{data}/vit-b16", "msam", "adamw", _MSAM, values, notes=notes))
    for data, (lr, epochs, rho) in _MSAM_TABLE_C1.items():
        values = _at(
            "table C.1", data=data, model="roberta-base", lr=lr, epochs=epochs, weight_decay=0.01,
            schedule="onecycle", warmup=0.06, rho=rho, batch_size=32, num_shards=8, shard_size=4, pretrained=True,
        )  # fmt: skip
        notes = ("It fine-tunes a network trained before.", _SHARDS)
        found.append(Preset(f"msam/{data}/roberta-base", "msam", "adamw", _MSAM, values, notes=notes))
    return found


# methods whose settings stand in their authors' repositories

_GSAM = "Zhuang et al. 2022, https://arxiv.org/abs/2203.08065"
_GSAM_TABLE = "the table of the authors' repository, https://github.com/juntang-zhuang/GSAM"
_ASAM = "Kwon et al. 2021, https://arxiv.org/abs/2102.11600"
_ASAM_CODE = "the authors' example, https://github.com/SamsungLabs/ASAM"
_DAVDA = "the example of https://github.com/davda54/sam"
_LOOKSAM = "Liu et al. 2022, https://arxiv.org/abs/2203.02714"
# name of the model: rho at the highest rate, rho at the lowest, alpha
_GSAM_SGD = {"resnet50": (0.04, 0.02, 0.01), "resnet101": (0.04, 0.02, 0.01), "resnet152": (0.04, 0.02, 0.005)}
_GSAM_ADAMW = {
    "vit-s32": (0.6, 0.0, 0.4), "vit-s16": (0.6, 0.0, 1.0), "vit-b32": (0.6, 0.1, 0.6), "vit-b16": (0.6, 0.2, 0.4),
    "mixer-s32": (0.5, 0.0, 0.2), "mixer-s16": (0.5, 0.0, 0.6), "mixer-s8": (0.5, 0.1, 0.1),
    "mixer-b32": (0.7, 0.2, 0.05), "mixer-b16": (0.5, 0.2, 0.01),
}  # fmt: skip


def _gsam_table() -> list[Preset]:
    found = []
    sgd = _at(_GSAM_TABLE, lr=1.6, lr_max=1.6, lr_min=0.016, momentum=0.9, epochs=90, warmup_steps=5000)
    adamw = _at(_GSAM_TABLE, lr=3e-3, lr_max=3e-3, lr_min=3e-5, epochs=300, warmup_steps=10_000)
    common = _at(_GSAM_TABLE, data="imagenet", weight_decay=0.3, schedule="linear")
    for base, rows, own in (("sgd", _GSAM_SGD, sgd), ("adamw", _GSAM_ADAMW, adamw)):
        for model, (rho, rho_min, alpha) in rows.items():
            values = common | own | _at(_GSAM_TABLE, model=model, rho=rho, rho_min=rho_min, alpha=alpha)
            printed = ('The table prints "ResNet512".',) if model == "resnet152" else ()
            notes = ("Rate and radius fall linearly after a warm-up; the weight decay is that printed.", *printed)
            found.append(Preset(f"gsam/imagenet/{model}", "gsam", base, _GSAM, values, {"batch_size": ""}, notes))
    return found


def _examples() -> list[Preset]:
    found = []
    notes = ("The rate falls by epochs. eta is 0.01 in the class and 0 in the example; this library has none.",)
    for data, rho in (("cifar10", 0.5), ("cifar100", 1.0)):
        values = _at(
            _ASAM_CODE, data=data, rho=rho, adaptive=True, lr=0.1, momentum=0.9, weight_decay=5e-4, batch_size=128,
            epochs=200, label_smoothing=0.1, schedule="cosine",
        )  # fmt: skip
        found.append(Preset(f"asam/{data}", "asam", "sgd", _ASAM, values, {"model": ""}, notes))
    values = _at(
        _DAVDA, data="cifar10", model="wrn16-8", rho=2.0, adaptive=True, lr=0.1, momentum=0.9, weight_decay=5e-4,
        batch_size=128, epochs=200, label_smoothing=0.1, schedule="step",
    )  # fmt: skip
    notes = (
        "The rate is multiplied by 0.2 after 30, 60 and 80 % of the epochs. The smoothing there is s / (K - 1) for "
        "the other classes, not s / K for all.",
    )
    found.append(Preset("asam/cifar10/wrn16-8", "asam", "sgd", _ASAM, values, notes=notes))
    values = _at("a public implementation, https://github.com/kozistr/pytorch_optimizer", k=5, alpha=0.7)
    open_ = ("lr", "weight_decay", "data", "model", "epochs", "batch_size", "schedule")
    gaps = {"rho": "0.1 there"} | dict.fromkeys(open_, "")
    found.append(Preset("looksam", "looksam", "sgd", _LOOKSAM, values, gaps))
    return found


_PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for presets in (
            _sam_tables(),
            _sam_label_noise(),
            _sam_imagenet(),
            _sam_fine_tuning(),
            _esam_tables(),
            _trajectory(),
            _msam_tables(),
            _gsam_table(),
            _examples(),
        )
        for preset in presets
    }
)
