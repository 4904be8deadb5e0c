"""Triton's interpreter for the tests: kernels that run on CPU tensors, with casts as a GPU makes them."""

import importlib.util
import sys
from pathlib import Path

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
    # In Triton 3.4 a length may be a constexpr, which cannot be hashed.
    core.block_type.__init__ = _built_once(core.block_type.__init__, lambda kind, shape: (kind.name, *map(int, shape)))
    core._unwrap_if_constexpr = _unwrap_quickly(core._unwrap_if_constexpr, core)
    np.seterr(all="ignore")  # no GPU warns of an overflow


_FAST = {"create_exp": np.exp, "create_exp2": np.exp2, "create_log": np.log, "create_fdiv": np.divide}
"""Operations for which a GPU has fast instructions that are not correctly rounded."""


def plant_errors(patch, direction):
    """Let exp, exp2, log and division in the interpreter err by up to 2 units in the last place, as a GPU's may.

    Args:
        patch: a MonkeyPatch, which undoes it.
        direction: "either" for errors that are random and uniform, "up" or "down" for the largest, always to one side.
    """
    from triton.runtime import interpreter

    generator = np.random.default_rng(0)

    def erring(operation):
        def computed(*operands):
            exact = operation(*(np.asarray(x).astype(np.float64) for x in operands))
            rounded = exact.astype(np.result_type(*operands))
            # with half a unit that rounding adds, 2
            units = {"either": generator.uniform(-1.5, 1.5, np.shape(exact)), "up": 1.5, "down": -1.5}[direction]
            wrong = (exact + units * np.spacing(np.abs(rounded))).astype(rounded.dtype)
            # a GPU's exp of 0 is exactly 1, and that of -inf exactly 0
            return np.where(np.isfinite(rounded) & (rounded != 1) & (rounded != 0), wrong, rounded)

        return computed

    for name, operation in _FAST.items():
        wrong = erring(operation)
        run = "binary_op" if name == "create_fdiv" else "unary_op"
        patch.setattr(
            interpreter.InterpreterBuilder, name, lambda self, *x, run=run, wrong=wrong: getattr(self, run)(*x, wrong)
        )


def plant_fault(patch, folder, module, old, new):
    """Replace a piece of a kernel module's text, wherever the package uses what the text defines.

    Args:
        patch: a MonkeyPatch, which undoes it.
        folder: where to write the changed text, an empty directory.
        module: a module of fastsam.kernels.
        old: a text that occurs in it exactly once.
        new: the text in its place.
    """
    text = Path(module.__file__).read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {module.__name__}"
    path = folder / f"faulty_{Path(module.__file__).name}"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    faulty = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as interpreting:
        interpreting.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(faulty)
    users = [m for name, m in sys.modules.items() if name.startswith("fastsam.kernels.")]
    for name, original in vars(module).items():
        function = getattr(original, "fn", original)  # of a kernel
        if not isinstance(original, type) and getattr(function, "__module__", None) == module.__name__:
            for user in users:
                if vars(user).get(name) is original:
                    patch.setattr(user, name, getattr(faulty, name))
