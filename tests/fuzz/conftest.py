import json
from pathlib import Path

import pytest
from surroundings import FIGURES, is_full

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def figures():
    """Write what the tests of this folder have counted, when all examples were taken, to build/fuzz.json."""
    yield
    if is_full():
        (ROOT / "build").mkdir(exist_ok=True)
        counts = {test: dict(sorted(of_test.items())) for test, of_test in sorted(FIGURES.items())}
        (ROOT / "build" / "fuzz.json").write_text(json.dumps(counts, indent=2) + "\n")
