"""Tests on ranks that fail, hang or die say so under their own names, and the next test has ranks again."""

import fcntl
import multiprocessing
import time
from pathlib import Path

import planted_faults
import pytest
from ranks import Ranks

pytestmark = pytest.mark.xdist_group("ranks")


class Reports(dict):
    """A plugin of pytest that keeps for each test "passed" or what its failure says."""

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self[report.nodeid.split("::")[1]] = report.longreprtext if report.failed else report.outcome


@pytest.fixture(scope="module")
def reports():
    reports = Reports()
    folder = Path(__file__).parent
    options = ["-p", "no:cacheprovider", f"--confcutdir={folder}"]
    pytest.main([str(folder / "planted_faults.py"), *options], plugins=[reports])
    return reports


def test_the_others_pass(reports):
    failed = {name for name, text in reports.items() if text != "passed"}
    assert failed == {f"test_{fault}[2ranks]" for fault in ("fails", "hangs", "dies", "cannot_be_sent")}
    assert len(reports) == 10


def test_a_failure_shows_its_line_and_its_rank(reports):
    text = reports["test_fails[2ranks]"]
    assert text.startswith("rank 1 of 2: Traceback")
    assert "in test_fails" in text
    assert "AssertionError: rank 1's own mistake" in text
    assert "rank 0 of 2: " in text


def test_a_hang_shows_where_the_rank_stands(reports):
    text = reports["test_hangs[2ranks]"]
    assert text.startswith("rank 1 of 2: The process ended with exit code 1.\nTimeout (0:00:20)!")
    assert "in hang\n" in text
    assert "in test_hangs\n" in text
    assert "rank 0 of 2: passed" in text


def test_a_death_shows_how_it_ended(reports):
    assert "rank 1 of 2: The process ended with exit code -9." in reports["test_dies[2ranks]"]


def test_what_cannot_be_sent_is_told(reports):
    assert "pickle" in reports["test_cannot_be_sent[2ranks]"]


def start_ranks_that_hang(folder):
    Ranks(2).call(planted_faults.lock_and_hang, folder=folder)


def test_ranks_end_with_the_process_that_started_them(tmp_path):
    parent = multiprocessing.get_context("forkserver").Process(target=start_ranks_that_hang, args=(tmp_path,))
    parent.start()
    wait_until(lambda: all((tmp_path / f"locked {rank}").exists() for rank in range(2)))
    parent.kill()
    parent.join()
    for rank in range(2):
        wait_until(lambda rank=rank: is_unlocked(tmp_path / f"rank {rank}"))


def is_unlocked(path):
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def wait_until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
