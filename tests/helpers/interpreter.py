"""Triton's interpreter for the tests: kernels that run on CPU tensors, with casts as a GPU makes them."""

import numpy as np
import pytest
import torch

from fastsam.kernels import ops


def import_kernels(device):
    """Import the kernels: from then on they are interpreted or compiled, for good.

    The variable is put back before anything else runs, so that programs which tests start keep the default.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if device == "cpu" else "0")
        kernels = ops._triton_backend()
        if device == "cuda" and (kernels is None or not torch.cuda.is_available()):
            raise pytest.UsageError("--device cuda needs a GPU that torch finds, and triton")
        if kernels is not None and kernels.INTERPRETED:
            ops.set_backend("triton")
            ops.norm([torch.ones(1)])  # a first launch imports the rest of the interpreter
            ops.set_backend(None)
            _mend_interpreter()


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


def _mend_interpreter():
    from triton.runtime import interpreter

    interpreter._convert_float = _cast
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _patch_once(interpreter._patch_lang, interpreter._LangPatchScope, interpreter.tl)
    np.seterr(all="ignore")  # no GPU warns of an overflow
