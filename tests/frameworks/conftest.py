"""Frameworks are installed for these tests alone (`make test-frameworks`); where one is not, its tests are left out."""

import os

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
