"""What surrounds a step: torch's default dtype, and base optimizers that do not look like torch's own."""

import torch
from laws import law
from problems import mlp
from training import Training

BOTH = ("torch", "triton")
DEFAULTS = ((torch.float64, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float64))
"""A default dtype, and a dtype of weights."""


def trained(cell, default, dtype):
    """What three steps leave, and a fourth whose gradient is not finite."""
    model = mlp(dtype, batchnorm=True)
    torch.set_default_dtype(default)
    try:
        training = Training(cell, dtype=dtype, model=model)
        returned = [training.step() for _ in range(3)]
        training.step(lambda *batch: training.losses(*batch) * float("nan"))
    finally:
        torch.set_default_dtype(torch.float32)
    state = training.state()
    entries = [entry for of_param in state["opt"]["state"].values() for entry in of_param.values()]
    records = training.loss.state_dict() if training.loss else {}
    tensors = [*returned, *state["model"].values(), *entries, records.pop("_extra_state", {}).get("history")]
    return [*tensors, *records.values(), getattr(training.opt, "skipped_steps", None)]


@law(skips={"strict=True raises where no row's loss rises": lambda cell: cell.options.get("strict")}, backends=BOTH)
def test_torchs_default_dtype_changes_no_number(cell):
    """Weights, moments, records and losses, bit for bit."""
    for default, dtype in DEFAULTS[1:2] if cell.backend == "triton" else DEFAULTS:
        found, expected = trained(cell, default, dtype), trained(cell, torch.float32, dtype)
        # torch's own bases keep their counters in the default dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, check_dtype=False)
