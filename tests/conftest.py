import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import fastsam
from fastsam.kernels import dispatch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the Triton kernels run: on CPU tensors, in Triton's interpreter, or compiled, on a GPU",
    )


def pytest_configure(config):
    import_kernels(config.getoption("device"))


def import_kernels(device):
    """Import the kernels: from then on they are interpreted or compiled, for good.

    The variable is put back before anything else runs, so that programs which tests start keep the default.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if device == "cpu" else "0")
        kernels = dispatch._triton_backend()
        if device == "cuda" and (kernels is None or not torch.cuda.is_available()):
            raise pytest.UsageError("--device cuda needs a GPU that torch finds, and triton")
        if kernels is not None and kernels.INTERPRETED:
            kernels.norm([torch.ones(1)])  # a first launch imports the rest of the interpreter
            _mend_interpreter()


@pytest.fixture
def choose():
    """`set_backend`, undone afterwards."""
    yield fastsam.set_backend
    fastsam.set_backend(None)


@pytest.fixture(params=["torch", "triton"])
def backend(request, choose):
    if request.param == "triton" and dispatch._triton_backend() is None:
        pytest.skip("triton is not installed")
    choose(request.param)
    return request.param


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched so far, in order."""
    from fastsam.kernels import ema, norm, perturb, restore_adam_step, restore_step, select, trajectory_loss

    names = []

    def counted(kernel, n_programs, *args, launch=norm.launch, **constants):
        if n_programs:
            names.append(kernel.__name__)
        with _disable_current_modes():  # what the interpreter does with torch is no operation of ours
            launch(kernel, n_programs, *args, **constants)

    for module in (ema, norm, perturb, restore_adam_step, restore_step, select, trajectory_loss):
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


def _mend_interpreter():
    from triton.runtime import interpreter

    interpreter._convert_float = _cast
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _patch_once(interpreter._patch_lang, interpreter._LangPatchScope, interpreter.tl)
    np.seterr(all="ignore")  # no GPU warns of an overflow
