"""README is true: its tables come from the recorded results, its example runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastsam.methods import METHODS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="not a source tree")


def test_tables_are_those_of_the_recorded_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import readme

    assert readme.block() in README.read_text(), "make readme"


def test_the_table_of_methods_names_every_method():
    shown = set(re.findall(r"^\| `(\w+)\(", README.read_text(), re.MULTILINE))
    assert shown == {method.cls.__name__ for method in METHODS.values() if method.kind != "base"}


def test_the_examples_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "example.py").write_text("\n".join(blocks))
    subprocess.run([sys.executable, "example.py"], cwd=tmp_path, check=True)
