import pytest
import torch
from hypothesis import settings
from interpreter import import_kernels
from torch.utils._python_dispatch import _disable_current_modes

import fastsam
from fastsam.kernels import ops
from fastsam.two_pass import stage

torch.set_num_threads(1)
# what `--hypothesis-profile=full` asks for; tests/fuzz alone goes by it
settings.register_profile("full", max_examples=1000, print_blob=True)


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the Triton kernels run: on CPU tensors, in Triton's interpreter, or compiled, on a GPU",
    )
    parser.addoption(
        "--all-cells",
        action="store_true",
        help="meet every law of tests/common in the full product of methods, bases and ways, not in a covering set",
    )


def pytest_generate_tests(metafunc):
    """Hand a law its cells."""
    law = getattr(metafunc.function, "law", None)
    if law is not None:
        metafunc.parametrize("cell", law.cells(metafunc.config.getoption("all_cells")), indirect=True, ids=str)


def pytest_configure(config):
    import_kernels(config.getoption("device"))


@pytest.fixture(autouse=True)
def no_pass_of_an_earlier_test():
    """A pass that a test has left open, in an optimizer that is still to be disposed of, is not the next one's."""
    stage._passes.steps = []


@pytest.fixture
def choose():
    """`set_backend`, undone afterwards."""
    yield fastsam.set_backend
    fastsam.set_backend(None)


@pytest.fixture(params=["torch", "triton"])
def backend(request, choose):
    if request.param == "triton" and ops._triton_backend() is None:
        pytest.skip("triton is not installed")
    choose(request.param)
    return request.param


@pytest.fixture
def cell(request, choose):
    """A cell of a law, on its backend."""
    if request.param.backend == "triton" and ops._triton_backend() is None:
        pytest.skip("triton is not installed")
    choose(request.param.backend)
    return request.param


@pytest.fixture
def launches():
    """Names of the kernels launched so far, in order."""
    from fastsam.kernels import launch, launch_tables

    # A store that the tables of other tests have filled would drop all it holds, at any time.
    launch_tables.forget()
    names = []

    def counted(kernel, n_programs, *args, **constants):
        if n_programs:
            names.append(kernel.__name__)
        with _disable_current_modes():  # what the interpreter does with torch is no operation of ours
            launch.run(kernel, n_programs, *args, **constants)

    with launch.observed_by(counted):
        yield names
