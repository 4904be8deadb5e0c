import os

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import fastsam
from fastsam.kernels import dispatch

torch.set_num_threads(1)

# kernels are interpreted or compiled for good when they are imported; the variable is gone before anything else runs,
# so that programs which tests start keep the default
_was_set = "TRITON_INTERPRET" in os.environ
os.environ.setdefault("TRITON_INTERPRET", "1")
kernels = dispatch._triton_backend()
if kernels is not None and kernels.INTERPRETED:
    kernels.norm([torch.ones(1)])  # a first launch imports the rest of the interpreter
if not _was_set:
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def choose():
    """`set_backend`, undone afterwards."""
    yield fastsam.set_backend
    fastsam.set_backend(None)


@pytest.fixture(params=["torch", "triton"])
def backend(request, choose):
    if request.param == "triton" and kernels is None:
        pytest.skip("triton is not installed")
    choose(request.param)
    return request.param


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched so far, in order."""
    from fastsam.kernels import norm, perturb, restore_adam_step, restore_step

    names = []

    def counted(kernel, n_programs, *args, launch=norm.launch, **constants):
        if n_programs:
            names.append(kernel.__name__)
        with _disable_current_modes():  # what the interpreter does with torch is no operation of ours
            launch(kernel, n_programs, *args, **constants)

    for module in (norm, perturb, restore_adam_step, restore_step):
        monkeypatch.setattr(module, "launch", counted)
    return names


def _cast(values, from_dtype, to_dtype, rounding_mode):
    """Cast as a GPU does. Triton's interpreter truncates to bfloat16 and mistakes subnormal numbers."""
    by_name = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
    bits = torch.from_numpy(np.array(values).reshape(-1).view(f"int{from_dtype.primitive_bitwidth}"))
    cast = bits.view(by_name[str(from_dtype)]).to(by_name[str(to_dtype)])
    width = to_dtype.primitive_bitwidth
    integers = {16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    return cast.view(integers).numpy().view(f"uint{width}").reshape(np.shape(values))


def _patch_once(patch, scope, language):
    """Let the interpreter put its functions into triton.language once, and leave them there.

    It does so again in every call inside a kernel, and spends two thirds of its time on that.
    """
    done = set()

    def patched(function):
        modules = frozenset(id(m) for m in function.__globals__.values() if m is language or m is language.core)
        if modules not in done:
            done.add(modules)
            patch(function)
        return scope()

    return patched


if kernels is not None and kernels.INTERPRETED:
    from triton.runtime import interpreter

    interpreter._convert_float = _cast
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _patch_once(interpreter._patch_lang, interpreter._LangPatchScope, interpreter.tl)
    np.seterr(all="ignore")  # no GPU warns of an overflow
