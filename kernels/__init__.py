"""The fused work of sharpness-aware steps over lists of tensors.

The way of the data: gradients -> `norm` -> `perturb_` -> second gradient -> `restore_*_step_`.
Every stage has a reference implementation in plain torch; `ops` is the one place that picks an implementation.
Nothing here knows about optimizers.
"""
