"""The suites of pytest-benchmark: each function takes turns with a reference, and their ratio is held to a record.

    make bench                  red where a function takes more of its reference's time than the record allows
    make bench ARGS=--renew     write the ratios of this run into the record

Ratios of two works in one run say little about how fast the machine is. On the CPU a time is the CPU time of one
thread, so that other programs matter only through the memory they share, and each side counts with its fastest round:
noise only adds. What is red is measured again for that reason. On a GPU the suites show times and hold nothing to the
record; `make bench-gpu` does that.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.environment import RECORDED, environment
from benchmarks.harness import write_record

RECORD = RECORDED / "suites_cpu.json"
MARGIN = 1.5
"""How much more than recorded is accepted, which holds on machines with other caches and vector units too. What takes
twice as long is red; the CPU gate holds SAM's step and optimizer side more tightly."""
ROUNDS, ATTEMPTS = 7, 4
ON_GPU = torch.cuda.is_available()
clock = time.perf_counter if ON_GPU else time.thread_time

torch.set_num_threads(1)  # threads of a busy machine wait for one another, and that would be timed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew", action="store_true", help="write the suites' ratios into the record")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture(scope="session")
def ratios(pytestconfig: pytest.Config) -> Iterator[dict[str, float]]:
    """The ratios of this run, by the names of the tests; the record is made of them where that is asked for."""
    found: dict[str, float] = {}
    yield found
    if pytestconfig.getoption("--renew") and found and not ON_GPU:
        about = environment("cpu", "make bench ARGS=--renew")
        write_record(RECORD, {"environment": about, "ratios": recorded() | found})


def recorded() -> dict[str, float]:
    """Return the recorded ratios by the names of the tests."""
    return json.loads(RECORD.read_text())["ratios"] if RECORD.exists() else {}


def seconds(run: Callable[[], Any]) -> float:
    """Run something and return its time by the suites' clock."""
    start = clock()
    run()
    return clock() - start


def too_slow(name: str, ratio: float, known: dict[str, float], margin: float = MARGIN) -> str | None:
    """Return what is wrong with a ratio beside the record, in words; None if nothing is."""
    if name not in known:
        return f"{name} is not in the record: make bench ARGS=--renew"
    if ratio <= margin * known[name]:
        return None
    return (
        f"{name} takes {ratio:.2f} times its reference's time, recorded {known[name]:.2f}, accepted {margin} times that"
    )


@pytest.fixture
def beside(benchmark: Any, request: pytest.FixtureRequest, ratios: dict[str, float]) -> Callable[..., None]:
    """A function that times one work beside another and holds their ratio to the record.

    Args:
        run: what is timed.
        reference: what takes turns with it.
        repeats: calls of each in a round.
        margin: how much more than recorded is accepted.
    """

    def beside(run: Callable[[], Any], reference: Callable[[], Any], repeats: int = 1, margin: float = MARGIN) -> None:
        def ours() -> None:
            for _ in range(repeats):
                run()

        def theirs() -> None:
            for _ in range(repeats):
                reference()

        taken: list[float] = []
        theirs(), ours()  # they make their state and scratch
        benchmark.pedantic(ours, setup=lambda: taken.append(seconds(theirs)), rounds=ROUNDS)
        if benchmark.disabled:
            return
        name, known = request.node.name.removeprefix("test_"), recorded()
        fastest, least = benchmark.stats.stats.min, min(taken)
        renews = request.config.getoption("--renew")
        for _ in range(ATTEMPTS * ROUNDS):
            if renews or ON_GPU or too_slow(name, fastest / least, known, margin) is None:
                break
            least, fastest = min(least, seconds(theirs)), min(fastest, seconds(ours))
        ratios[name] = benchmark.extra_info["over its reference"] = round(fastest / least, 3)
        if not (renews or ON_GPU) and (wrong := too_slow(name, fastest / least, known, margin)):
            pytest.fail(wrong, pytrace=False)

    return beside
