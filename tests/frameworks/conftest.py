"""Frameworks are installed for these tests alone (`make test-frameworks`); where one is not, its tests are left out."""

import os
import sys

import foreign_torchvision  # noqa: F401
import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# what frameworks warn of by themselves; fastsam's own warnings stay errors
IGNORED = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning")


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/frameworks" in item.path.as_posix():
            for pattern in IGNORED:
                item.add_marker(pytest.mark.filterwarnings(pattern))


@pytest.fixture(autouse=True)
def no_state_of_accelerate():
    """Let no test find the precision and accumulation of an earlier one, which accelerate keeps for the process."""
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
