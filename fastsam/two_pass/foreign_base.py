"""Base optimizers that are not built as torch's own: without its constructor, or around other optimizers."""

from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

_SECOND_ORDER = ("adahessian", "sophiah", "shampoohessian")


def refuse_base(base: Optimizer) -> None:
    """Raise ValueError where no base step could follow a perturbation, with the reason."""
    name = type(base).__name__
    if isinstance(base, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates its closure many times a step, which SAM cannot follow; use SGD or AdamW")
    if isinstance(base, torch.optim.SparseAdam):
        raise ValueError(f"{name} takes sparse gradients alone, but a perturbation is dense; use SGD or AdamW")
    if name.lower() in _SECOND_ORDER or getattr(base, "is_second_order", False):
        raise ValueError(
            f"{name} differentiates the gradient once more in its step, which needs backward(create_graph=True) at the "
            "weights that it steps from; these gradients are from perturbed weights. Use a first-order optimizer"
        )
    if getattr(base, "_overlap_with_ddp", False):
        raise ValueError(
            f"{name}(overlap_with_ddp=True) steps inside backward, that is in both passes; use overlap_with_ddp=False"
        )
    if getattr(base, "defaults", {}).get("differentiable") or any(g.get("differentiable") for g in base.param_groups):
        raise ValueError(f"{name}(differentiable=True) cannot be wrapped: weights change in place; drop the option")
    for group in base.param_groups:
        if any(hasattr(p, "_in_backward_optimizers") for p in group["params"]):
            raise ValueError(
                "a parameter is stepped inside backward (apply_optimizer_in_backward); that would step in both passes. "
                "Remove it and let this optimizer step."
            )


def complete(base: Optimizer) -> None:
    """Set up what torch's constructor sets up, where the base has not called it: defaults, state and hooks."""
    if not hasattr(base, "defaults"):
        base.defaults = {}
    if not hasattr(base, "state"):
        base.state = defaultdict(dict)
    # Nothing is done to the class, whose other instances may lack hooks as well.
    for event in ("step", "state_dict", "load_state_dict"):
        for name in (f"_optimizer_{event}_pre_hooks", f"_optimizer_{event}_post_hooks"):
            hooks = vars(base).get(name)
            # a plain dict takes no hooks, since a handle refers to it weakly
            vars(base)[name] = hooks if isinstance(hooks, OrderedDict) else OrderedDict(hooks or {})


def inner_optimizers(base: Optimizer) -> list[Optimizer]:
    """Return the optimizers that a base keeps as attributes, or in lists, tuples or dicts that are attributes."""
    found: list[Optimizer] = []
    for value in vars(base).values():
        values = value.values() if type(value) is dict else value if isinstance(value, (list, tuple)) else (value,)
        found += [inner for inner in values if isinstance(inner, Optimizer)]
    return found


def settings_of(base: Optimizer) -> set[str]:
    """Return the names of the settings that the base, or an optimizer inside it, keeps in param groups."""
    return {*base.defaults}.union(*(getattr(inner, "defaults", ()) for inner in inner_optimizers(base)))


def follow_inner(base: Optimizer) -> None:
    """Let the base's groups be those of the optimizers inside it, after these have got others from a state dict."""
    inner = inner_optimizers(base)
    current = {_tensors(group): group for optimizer in inner for group in optimizer.param_groups}
    groups = [current.get(_tensors(group), group) for group in base.param_groups]
    if all(new is old for new, old in zip(groups, base.param_groups, strict=True)):
        return
    lists = (optimizer.param_groups for optimizer in inner)
    base.param_groups = next((of_one for of_one in lists if list(map(id, of_one)) == list(map(id, groups))), groups)


def _tensors(group: dict[str, Any]) -> tuple[int, ...]:
    return tuple(map(id, group["params"]))


class Parts(NamedTuple):
    """A base around other optimizers as it is copied and pickled: torch's own way would leave these out."""

    cls: type[Optimizer]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, base: Optimizer) -> "Optimizer | Parts":
        """Return the parts of such a base, any other as it is."""
        if not inner_optimizers(base):
            return base
        kept = {k: v for k, v in vars(base).items() if k != "step" and not k.startswith("_optimizer_")}
        return cls(type(base), kept)

    def build(self) -> Optimizer:
        """Put the parts together."""
        base = self.cls.__new__(self.cls)
        vars(base).update(self.attributes)
        complete(base)
        return base


# the method's own tensors in state dicts

Entries = dict[int, dict[str, Any]]
"""Tensors of the method, named "fastsam_<name>", by the position of their parameter in group order."""
OWN, _FOREIGN_COPIES = "fastsam", ("old_p", "e_w")


def is_own(name: Any) -> bool:
    """Whether an entry of a parameter's state is the method's."""
    return str(name).startswith(f"{OWN}_")


def add_entries(base: Optimizer, state_dict: dict[str, Any], entries: Entries) -> dict[str, Any]:
    """Return a base's own state dict with the method's tensors in it, which a base may have left out.

    They stand with their parameter's state where that has torch's format, else under a key of their own.
    """
    missing = entries if type(base).state_dict is not Optimizer.state_dict else {}
    if not missing or not {"state", "param_groups"} <= state_dict.keys():
        return {**state_dict, OWN: missing} if missing else state_dict
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    state = dict(state_dict["state"])
    for position, own in missing.items():
        state[indices[position]] = {**state.get(indices[position], {}), **own}
    return {**state_dict, "state": state}


def take_entries(state_dict: dict[str, Any]) -> tuple[dict[str, Any], Entries]:
    """Return a state dict without what its base would cast or choke on, and the method's tensors that were in it.

    What goes are these tensors, and davda54/sam's copies of weights.
    """
    state_dict, found = dict(state_dict), dict(state_dict.get(OWN, {}))
    state_dict.pop(OWN, None)
    if not {"state", "param_groups"} <= state_dict.keys():
        return state_dict, found
    indices = (index for group in state_dict["param_groups"] for index in group["params"])
    positions, state = {index: i for i, index in enumerate(indices)}, {}
    for index, entries in state_dict["state"].items():
        if not isinstance(entries, dict) or index not in positions:
            state[index] = entries
            continue
        own = {name: value for name, value in entries.items() if is_own(name)}
        others = {name: value for name, value in entries.items() if name not in own and name not in _FOREIGN_COPIES}
        if others:
            state[index] = others
        if own:
            found[positions[index]] = own
    return {**state_dict, "state": state}, found
