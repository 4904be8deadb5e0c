"""`@pytest.mark.ranks(2, 4)` runs a test on 2 processes together, and again on 4.

Each is a test of its own, which pytest selects by its name or with `-k "2ranks and msam"`. Parameters and values of
fixtures are sent to the ranks, so they must be picklable.
"""

import contextlib
import functools
import inspect

import pytest
from ranks import Ranks


def pytest_configure(config):
    config.addinivalue_line("markers", "ranks(*worlds): run the test on so many processes together")


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("ranks")
    if marker is not None:
        # one worker of pytest-xdist runs them all, or each would start processes of its own
        options = {"marks": pytest.mark.xdist_group("ranks")}
        worlds = [pytest.param(world, id=f"{world}ranks", **options) for world in marker.args]
        metafunc.parametrize("ranks", worlds, indirect=True)


@pytest.fixture(scope="session")
def ranks_of():
    """`ranks_of(world)`: the processes that serve all tests of this session, started when first used."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda world: stack.enter_context(Ranks(world)))


@pytest.fixture(autouse=True)
def ranks(request, ranks_of):
    """The processes that run this test; None if it runs here."""
    return ranks_of(request.param) if hasattr(request, "param") else None


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    ranks = pyfuncitem.funcargs["ranks"]
    if ranks is None:
        return None
    names = inspect.signature(pyfuncitem.function).parameters
    errors = ranks.call(pyfuncitem.function, **{name: pyfuncitem.funcargs[name] for name in names})
    if any(errors.values()):
        told = [f"rank {rank} of {ranks.world}: {error or 'passed'}" for rank, error in errors.items()]
        pytest.fail("\n".join(told), pytrace=False)
    return True
