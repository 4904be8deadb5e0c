"""An optimizer around a base optimizer: two names for one optimizer.

`param_groups`, `state` and `defaults` are the base's own. The hyperparameters of the method, called options here, and
its counters lie in the base's param groups, so that every checkpoint format that carries an optimizer carries them too.
"""

import inspect
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

STEP, TAKEN, SEED = "fastsam_step", "fastsam_taken", "fastsam_seed"
"""Keys of the counters in every group: perturbations, which address random draws; steps taken or skipped; the seed."""
_WRAPS = "_fastsam_wraps"
FROM_BASE: Any = object()
"""Stands for `params` where the base optimizer exists already."""


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same without keeping its owner, who is to go when nobody else holds it, and its unfinished step with it."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        bound = reference()
        return None if bound is None else bound(*args)

    return call


class WrappedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` whose groups, state and defaults are those of `base_optimizer`."""

    base_optimizer: Optimizer

    def __init__(
        self,
        params: Iterable,
        base_optimizer: type[Optimizer] | Optimizer | str,
        options: dict[str, Any],
        seed: int,
        base_kwargs: dict[str, Any],
    ) -> None:
        self.check_options(options)
        if params is FROM_BASE:
            base = _accept_instance(base_optimizer, base_kwargs)
        else:
            base = _build_base(params, base_optimizer, base_kwargs, type(self).__name__)
        _refuse_unsupported(base)
        # a name the base already uses (Adadelta's rho, RMSprop's alpha) gives way to sam_<name>
        self._option_keys = {name: f"sam_{name}" if name in base.defaults else name for name in options}
        defaults = {self._option_keys[name]: value for name, value in options.items()} | {STEP: 0, TAKEN: 0, SEED: seed}
        for group in base.param_groups:
            self._check_group({**defaults, **group})
        self.base_optimizer = base
        base.defaults.update(defaults)
        for group in base.param_groups:
            self._fill(group, defaults)
        self._option_defaults = defaults
        self._attach()

    def _attach(self) -> None:
        # This is how torch sets up hooks without new groups.
        Optimizer.__setstate__(self, {})
        setattr(self.base_optimizer, _WRAPS, True)
        self.base_optimizer.register_load_state_dict_pre_hook(_weakly(self._before_load))
        self.base_optimizer.register_load_state_dict_post_hook(_weakly(self._after_load))

    def __getstate__(self) -> dict[str, Any]:
        transient = ("step", "_loading", "grad_scale", "found_inf")
        return {k: v for k, v in self.__dict__.items() if k not in transient and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()

    def __repr__(self) -> str:
        return f"{type(self).__name__} around {self.base_optimizer!r}"

    # the base's own attributes

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups, with the method's options in them."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults, with the method's options in them."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    # options

    def option(self, group: dict[str, Any], name: str) -> Any:
        """Return an option of the method in one group, under whatever key it is kept there."""
        return group[self._option_keys[name]]

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise ValueError or TypeError for a bad option. Methods extend it."""

    def _check_group(self, group: dict[str, Any]) -> None:
        self.check_options({name: group[key] for name, key in self._option_keys.items() if key in group})
        params = group["params"]
        if len({id(p) for p in params}) < len(params):
            raise ValueError(
                "the same parameter appears twice in one group; it would count twice in the norm and be stepped twice. "
                "Pass each parameter once."
            )

    @staticmethod
    def _fill(group: dict[str, Any], options: dict[str, Any]) -> None:
        for key, value in options.items():
            group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, with the options and counters it lacks."""
        params = param_group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
        # The counters are the same in all groups.
        counters = {key: self.param_groups[0][key] for key in (STEP, TAKEN, SEED)}
        group = {**self._option_defaults, **counters, **param_group, "params": params}
        self._check_group({**group, "params": tensors})
        self.base_optimizer.add_param_group(group)

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.base_optimizer.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict into the base optimizer; see `_before_load` for what it may lack or hold."""
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        self.base_optimizer.load_state_dict(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _before_load(self, base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Keep from the base what it would choke on or cast: davda54's weight copies, and the method's own tensors."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        # The base optimizer refuses unequal numbers of groups itself.
        for own, loaded in zip(base.param_groups, groups, strict=False):
            self._fill(loaded, {key: own.get(key, default) for key, default in self._option_defaults.items()})
            self.check_options({name: loaded[key] for name, key in self._option_keys.items() if key in loaded})
        positions = {index: i for i, index in enumerate(index for group in groups for index in group["params"])}
        state, self._loading = {}, {}
        for index, entries in state_dict["state"].items():
            if not isinstance(entries, dict):
                state[index] = entries
                continue
            plain = {k: v for k, v in entries.items() if k != "old_p" and not str(k).startswith("fastsam_")}
            if plain:
                state[index] = plain
            own_entries = {k: v for k, v in entries.items() if str(k).startswith("fastsam_")}
            if own_entries:
                self._loading[positions[index]] = own_entries
        return {**state_dict, "state": state, "param_groups": groups}

    def _after_load(self, base: Optimizer) -> None:
        params = [p for group in base.param_groups for p in group["params"]]
        for position, entries in self.__dict__.pop("_loading", {}).items():
            p = params[position]
            moved = {k: v.to(p.device) if isinstance(v, torch.Tensor) else v for k, v in entries.items()}
            base.state[p].update(moved)


def _accept_instance(base: Any, base_kwargs: dict) -> Optimizer:
    if not isinstance(base, Optimizer):
        raise TypeError(f"wrap() takes an optimizer instance, got {base!r}; for a class use the constructor")
    if base_kwargs:
        raise TypeError(f"wrap() does not know {', '.join(base_kwargs)}; set it on the base optimizer instead")
    if isinstance(base, WrappedOptimizer) or hasattr(base, _WRAPS):
        raise ValueError(f"{type(base).__name__} is part of a fastsam optimizer already; wrap a plain optimizer")
    return base


def _build_base(params: Iterable, base: Any, base_kwargs: dict, method: str) -> Optimizer:
    if isinstance(base, str):
        base = _find_apex(base)
    if isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer is an instance; pass its class, or use {method}.wrap(optimizer)")
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise TypeError(f"base_optimizer must be a torch.optim.Optimizer class such as torch.optim.SGD, got {base!r}")
    known = inspect.signature(base).parameters
    unknown = [name for name in base_kwargs if name not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        choices = ", ".join(name for name in known if name != "params")
        raise TypeError(
            f"neither {method} nor {base.__name__} knows {', '.join(unknown)}; {base.__name__} takes {choices}, and "
            f"help({method}) says what {method} takes"
        )
    return base(params, **base_kwargs)


def _refuse_unsupported(base: Optimizer) -> None:
    name = type(base).__name__
    if isinstance(base, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates its closure many times a step, which SAM cannot follow; use SGD or AdamW")
    if isinstance(base, torch.optim.SparseAdam):
        raise ValueError(f"{name} takes sparse gradients alone, but a perturbation is dense; use SGD or AdamW")
    if base.defaults.get("differentiable") or any(group.get("differentiable") for group in base.param_groups):
        raise ValueError(f"{name}(differentiable=True) cannot be wrapped: weights change in place; drop the option")
    for group in base.param_groups:
        if any(hasattr(p, "_in_backward_optimizers") for p in group["params"]):
            raise ValueError(
                "a parameter is stepped inside backward (apply_optimizer_in_backward); that would step in both passes. "
                "Remove it and let this optimizer step."
            )


def _find_apex(name: str) -> type[Optimizer]:
    """Return NVIDIA apex's optimizer "apex.<name>"; apex is looked for only when asked for."""
    prefix, _, attribute = name.rpartition(".")
    if prefix not in ("apex", "apex.optimizers"):
        raise ValueError(f"base_optimizer {name!r} is unknown; pass a class, or a name such as 'apex.FusedSGD'")
    hint = "install NVIDIA's from https://github.com/NVIDIA/apex, or pass a torch.optim class"
    try:
        import apex
    except ImportError as error:
        raise ImportError(f"{name} was asked for, but apex is not installed; {hint}") from error
    try:
        from apex import optimizers
    except ImportError as error:
        raise ImportError(
            f"{name} was asked for, but the installed apex ({getattr(apex, '__file__', None)}) is PyPI's unrelated "
            f"package, not NVIDIA's; pip uninstall apex, then {hint}"
        ) from error
    found: Callable | None = getattr(optimizers, attribute, None)
    if not isinstance(found, type):
        raise ValueError(f"NVIDIA apex has no optimizer {attribute!r}; try FusedSGD, FusedAdam or FusedLAMB")
    return found
