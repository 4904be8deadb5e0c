"""Training frameworks that own the backward or the step: what their loops need beside `opt.backward`.

Nothing here is imported by `import fastsam`, and each module needs the framework that it is named after.
"""

from typing import Any

from fastsam.two_pass.optimizer import TwoPassOptimizer

INSTALL = "pip install 'fastsam-torch[frameworks]' installs it"


def unwrapped(optimizer: Any, where: str) -> TwoPassOptimizer:
    """Return the fastsam optimizer inside a framework's wrapper.

    Args:
        optimizer: what the framework holds: the optimizer, or a wrapper with it as `optimizer`.
        where: how it is handed to the framework, for the error.

    Raises:
        TypeError: there is none.
    """
    found = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(found, TwoPassOptimizer):
        raise TypeError(f"this needs an optimizer of fastsam, handed over as {where}, got {type(found).__name__}")
    return found
