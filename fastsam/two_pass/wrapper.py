"""An optimizer around a base optimizer: two names for one optimizer.

`param_groups`, `state` and `defaults` are the base's own. The hyperparameters of the method, called options here, and
its counters lie in the base's param groups, so that every checkpoint format that carries an optimizer carries them too.
"""

import gc
import inspect
import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from fastsam.arguments import LARGEST_INTEGER, check_integer, check_seed
from fastsam.two_pass.foreign_base import (
    Entries,
    Parts,
    add_entries,
    complete,
    follow_inner,
    is_own,
    refuse_base,
    settings_of,
    take_entries,
)

STEP, TAKEN, ACTIVE, SEED = "fastsam_step", "fastsam_taken", "fastsam_active", "fastsam_seed"
"""Keys of the counters in every group: perturbations, which address random draws; steps taken or skipped; those of
them in which `when=` and rho were not 0; the seed."""
COUNTERS = (STEP, TAKEN, ACTIVE)
FROM_BASE: Any = object()
"""Stands for `params` where the base optimizer exists already."""
_OF_BASE = ("param_groups", "state", "defaults")


class _Wrapping(NamedTuple):
    """Who wraps a base, and the keys that it added to each group."""

    wrapper: weakref.ref
    added: list[set[str]]


_wrapped: "weakref.WeakKeyDictionary[Optimizer, _Wrapping]" = weakref.WeakKeyDictionary()


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same without keeping its owner, who is to go when nobody else holds it, and its unfinished step with it."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        bound = reference()
        return None if bound is None else bound(*args)

    return call


class WrappedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` whose groups, state and defaults are those of `base_optimizer`."""

    base_optimizer: Optimizer
    _loading: tuple[Entries, list[dict[str, Any]]] | None = None
    """The method's tensors and the groups' options, while the base loads a state dict."""
    _checked: Sequence[Any] = ()
    """The groups' options that `check_groups` has found good, in order."""

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
            base = _accept_instance(base_optimizer, base_kwargs, type(self))
        else:
            base = _build_base(params, base_optimizer, base_kwargs, type(self))
        refuse_base(base)
        complete(base)
        # a name the base already uses (Adadelta's rho, RMSprop's alpha) gives way to sam_<name>
        taken = settings_of(base)
        self._option_keys = {name: f"sam_{name}" if name in taken else name for name in options}
        defaults = {self._option_keys[name]: value for name, value in options.items()}
        defaults |= {**dict.fromkeys(COUNTERS, 0), SEED: seed}
        for group in base.param_groups:
            self._check_group({**defaults, **group})
        self.base_optimizer = base
        base.defaults.update(defaults)
        _wrapped[base] = _Wrapping(weakref.ref(self), [defaults.keys() - group.keys() for group in base.param_groups])
        for group in base.param_groups:
            self._fill(group, defaults)
        self._option_defaults = defaults
        self._attach()

    def _attach(self) -> None:
        # This is how torch sets up hooks without new groups.
        Optimizer.__setstate__(self, {})
        self.base_optimizer.register_load_state_dict_pre_hook(weakly(self._before_load))
        self.base_optimizer.register_load_state_dict_post_hook(weakly(self._after_load))

    def __getstate__(self) -> dict[str, Any]:
        transient = ("step", "_loading", "grad_scale", "found_inf")
        kept = {k: v for k, v in self.__dict__.items() if k not in transient and not k.startswith("_optimizer_")}
        return {**kept, "base_optimizer": Parts.of(self.base_optimizer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: value for name, value in state.items() if name not in _OF_BASE})
        if isinstance(base := state.get("base_optimizer"), Parts):
            self.base_optimizer = base.build()
        # torch's own load_state_dict hands these alone
        for name in (name for name in _OF_BASE if name in state):
            setattr(self, name, state[name])
        if "base_optimizer" in state:
            base, keys = self.base_optimizer, self._option_defaults.keys()
            _wrapped[base] = _Wrapping(weakref.ref(self), [set(keys) for _ in base.param_groups])
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

    def check_groups(self) -> None:
        """Raise TypeError or ValueError for a bad option that somebody has set in a group since the last look."""
        now = [group.get(key) for group in self.param_groups for key in self._option_keys.values()]
        if len(now) == len(self._checked) and all(map(operator.is_, now, self._checked)):
            return
        for group in self.param_groups:
            self.check_options({name: group.get(key) for name, key in self._option_keys.items()})
        self._checked = now

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
        counters = {key: self.param_groups[0][key] for key in (*COUNTERS, SEED)}
        group = {**self._option_defaults, **counters, **param_group, "params": params}
        self._check_group({**group, "params": tensors})
        self.base_optimizer.add_param_group(group)

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        base = self.base_optimizer
        state_dict = add_entries(base, base.state_dict(), self._own_entries())
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def _own_entries(self) -> Entries:
        params = [p for group in self.param_groups for p in group["params"]]
        own = {i: {k: v for k, v in self.state.get(p, {}).items() if is_own(k)} for i, p in enumerate(params)}
        return {i: entries for i, entries in own.items() if entries}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict into the base optimizer; see `_before_load` for what it may lack or hold."""
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        base = self.base_optimizer
        try:
            # not every base runs the hooks that do the same where somebody loads into the base itself
            base.load_state_dict(self._before_load(base, state_dict))
            self._after_load(base)
        finally:
            self._loading = None
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _before_load(self, base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Keep from the base what it would choke on or cast, and give the groups the options that they lack."""
        if self._loading is not None:
            return state_dict
        options = [{key: group.get(key, v) for key, v in self._option_defaults.items()} for group in base.param_groups]
        if "param_groups" in state_dict:
            groups = [dict(group) for group in state_dict["param_groups"]]
            # The base optimizer refuses unequal numbers of groups itself.
            for own, loaded in zip(options, groups, strict=False):
                if TAKEN in loaded:
                    # a checkpoint from before there were schedules, when all steps perturbed
                    loaded.setdefault(ACTIVE, loaded[TAKEN])
                self._fill(loaded, own)
                self.check_options({name: loaded[key] for name, key in self._option_keys.items() if key in loaded})
                for key in COUNTERS:
                    check_integer(key, loaded[key], 0, LARGEST_INTEGER)
                check_seed(SEED, loaded[SEED])
            state_dict = {**state_dict, "param_groups": groups}
        state_dict, entries = take_entries(state_dict)
        self._loading = entries, options
        return state_dict

    def _after_load(self, base: Optimizer) -> None:
        if self._loading is None:
            return
        (found, options), self._loading = self._loading, None
        follow_inner(base)
        for own, group in zip(options, base.param_groups, strict=False):
            self._fill(group, own)
        params = [p for group in base.param_groups for p in group["params"]]
        for position, entries in found.items():
            p = params[position]
            moved = {k: v.to(p.device) if isinstance(v, torch.Tensor) else v for k, v in entries.items()}
            base.state[p].update(moved)


def _accept_instance(base: Any, base_kwargs: dict, method: type) -> Optimizer:
    if not isinstance(base, Optimizer):
        raise TypeError(f"wrap() takes an optimizer instance, got {base!r}; for a class use the constructor")
    if base_kwargs:
        name = method.__name__
        raise TypeError(
            f"{name}.wrap() does not know {', '.join(base_kwargs)}; set it on the base optimizer instead if it is the "
            f"base's own. {name} knows {own_keywords(method)}"
        )
    if isinstance(base, WrappedOptimizer) or _is_in_use(base):
        raise ValueError(
            f"{type(base).__name__} is part of a fastsam optimizer already; wrap a plain optimizer, or `del` the one "
            "that wraps it, and schedulers of it, first"
        )
    _forget_wrapper(base)
    return base


def _is_in_use(base: Optimizer) -> bool:
    """Whether a wrapper of this base is still there, be it unreferenced in a cycle that nobody has collected yet."""
    if base not in _wrapped or _wrapped[base].wrapper() is None:
        return False
    gc.collect()
    return _wrapped[base].wrapper() is not None


def _forget_wrapper(base: Optimizer) -> None:
    """Take out of the base what a wrapper that is gone has added, so that the next one's options count."""
    if (wrapping := _wrapped.pop(base, None)) is None:
        return
    every = set().union(*wrapping.added)
    added = [*wrapping.added, *(every for _ in base.param_groups[len(wrapping.added) :])]
    for holder, keys in zip((base.defaults, *base.param_groups), (every, *added), strict=True):
        for key in keys:
            holder.pop(key, None)
    for entries in base.state.values():
        for name in list(filter(is_own, entries if isinstance(entries, dict) else ())):
            del entries[name]


def own_keywords(method: type) -> str:
    """Return the keywords that a method's constructor spells out, for messages."""
    parameters = list(inspect.signature(method).parameters.values())[2:]
    return ", ".join(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)


def _build_base(params: Iterable, base: Any, base_kwargs: dict, method: type) -> Optimizer:
    if isinstance(base, str):
        base = _find_apex(base)
    if isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer is an instance; pass its class, or use {method.__name__}.wrap(optimizer)")
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise TypeError(f"base_optimizer must be a torch.optim.Optimizer class such as torch.optim.SGD, got {base!r}")
    known = inspect.signature(base).parameters
    unknown = [name for name in base_kwargs if name not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        choices = ", ".join(name for name in known if name != "params")
        raise TypeError(
            f"{method.__name__} knows no {', '.join(unknown)}; it knows {own_keywords(method)}, and "
            f"{base.__name__}'s own keywords are {choices}"
        )
    if isinstance(params, (str, torch.nn.Module)) or not isinstance(params, Iterable):
        raise TypeError(
            f"params must be tensors or groups of them, got {type(params).__name__}; pass model.parameters()"
        )
    return base(params, **base_kwargs)


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
