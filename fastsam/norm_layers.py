"""SAM on normalization layers alone: SAM-ON (Müller et al. 2023, https://arxiv.org/abs/2306.04226).

The perturbation is that of SAM, with every tensor left out that is no parameter of a normalization layer. The ascent
gradients of the others are not computed where that changes nothing, and nothing of them is saved.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_OF_TORCH = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def is_norm_layer(module: nn.Module) -> bool:
    """Return whether a module is a normalization layer: torch's, or of a class whose name says so.

    Classes of other libraries (timm's, transformers') have "norm" in their names, and parameters of their own of one
    dimension at most, which tells them from layers with normalized weights.
    """
    own = list(module.parameters(recurse=False))
    # lazy layers, which are torch's, have no dimensions yet
    is_one = isinstance(module, _OF_TORCH) or (
        "norm" in type(module).__name__.lower() and all(p.dim() <= 1 for p in own)
    )
    return bool(own) and is_one


def norm_layer_groups(model: nn.Module, is_norm: Callable[[nn.Module], bool] = is_norm_layer) -> list[dict[str, Any]]:
    """Return parameter groups that perturb a model's normalization layers alone, as SAM-ON does.

    `SAM(fastsam.norm_layer_groups(model), torch.optim.SGD, rho=0.5, model=model, lr=0.1)`. A step's first backward then
    computes no gradients of other weights, about 1.67 gradients a step in place of 2, and the optimizer saves no copies
    of them. Radii are larger than SAM's, for the perturbed weights are few; both groups may be given other options
    (`weight_decay`, ...) before they are used.

    Args:
        model: whose parameters they are, each once.
        is_norm: which modules are normalization layers; their own parameters are perturbed, not those of modules in
            them. Default: torch's, and those of other libraries by their names.

    Returns:
        Two groups, the first with the normalization layers' parameters, the second with `perturb=False` and all others,
        each in the order of `model.parameters()`; only the first where there are no others.

    Raises:
        ValueError: the model has no such parameters.
    """
    wanted = {id(p) for m in model.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    groups: list[dict[str, Any]] = [{"params": [], "perturb": True}, {"params": [], "perturb": False}]
    for p in model.parameters():
        groups[id(p) not in wanted]["params"].append(p)
    if not groups[0]["params"]:
        raise ValueError(
            f"{type(model).__name__} has no normalization layer with parameters; pass is_norm=, a function that knows "
            "this model's, or perturb all weights"
        )
    return [group for group in groups if group["params"]]
