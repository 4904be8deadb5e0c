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
    modules_seen, done = set(), set()

    def patched(function):
        if function.__module__ not in modules_seen:
            modules_seen.add(function.__module__)
            modules = frozenset(id(m) for m in function.__globals__.values() if m is language or m is language.core)
            if modules not in done:
                done.add(modules)
                patch(function)
        return scope()

    return patched


def _built_once(build, key_of, own=()):
    """`__init__` of a class whose attributes, but for its `own`, are the same wherever `key_of(*arguments)` is.

    The interpreter makes an object for every operand of every operation, and spends half of its time on that.
    """
    built = {}

    def init(self, *arguments):
        key = key_of(*arguments)
        if key in built:
            vars(self).update(built[key], **dict(zip(own, arguments, strict=False)))
        else:
            build(self, *arguments)
            built[key] = {name: value for name, value in vars(self).items() if name not in own}

    return init


def _remembered(function):
    """`function` of a Triton type, which cannot be hashed but by its name."""
    results = {}

    def remembered(dtype):
        if dtype.name not in results:
            results[dtype.name] = function(dtype)
        return results[dtype.name]

    return remembered


def _unwrap_quickly(unwrap, language):
    """Unwrap constants, and leave what is none, without a look at each kind of sequence."""

    def quickly(value):
        kind = type(value)
        if kind is language.constexpr:
            return value.value
        return value if kind in (int, language.dtype, language.tensor) else unwrap(value)

    return quickly


def _mend_interpreter():
    from triton.runtime import interpreter

    interpreter._convert_float = _cast
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _patch_once(interpreter._patch_lang, interpreter._LangPatchScope, interpreter.tl)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    core = interpreter.tl.core
    core.tensor.__init__ = _built_once(core.tensor.__init__, lambda handle, dtype: dtype.name, own=("handle",))
    core.block_type.__init__ = _built_once(core.block_type.__init__, lambda dtype, shape: (dtype.name, *shape))
    core._unwrap_if_constexpr = _unwrap_quickly(core._unwrap_if_constexpr, core)
    np.seterr(all="ignore")  # no GPU warns of an overflow
