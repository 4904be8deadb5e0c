"""What a GradScaler steps within `step(loss_fn, ..., scaler=)`."""

import weakref
from typing import Any


class ScalerTarget:
    """What a GradScaler steps within `step(loss_fn, ..., scaler=)`: the groups, and an update in place of a step."""

    _step_supports_amp_scaling = True

    def __init__(self, optimizer: Any) -> None:
        # The optimizer holds this object, which must not keep it alive.
        self._reference = weakref.ref(optimizer)

    @property
    def _optimizer(self) -> Any:
        return self._reference()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, for the scaler to unscale."""
        return self._optimizer.param_groups

    def forget(self) -> None:
        """Drop what a scaler has set."""
        self.__dict__.pop("grad_scale", None)
        self.__dict__.pop("found_inf", None)

    def step(self) -> None:
        """Called by the scaler, with its scale and its finding set as attributes."""
        refuse_no_gradient(self.__dict__.get("found_inf"))
        self._optimizer._update(self.__dict__.get("grad_scale"), self.__dict__.get("found_inf"))


def refuse_no_gradient(found_inf: Any) -> None:
    """Raise AssertionError as torch's GradScaler does where no parameter has a gradient.

    Args:
        found_inf: what the scaler has set, a sum over devices: of no tensor it is the number 0.
    """
    if isinstance(found_inf, int):
        raise AssertionError(
            "No inf checks were recorded for this optimizer: no parameter has a gradient; run backward() first"
        )
