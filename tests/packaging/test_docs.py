"""The documentation is true: its examples run, what it names is there, and so is what the code cites of it."""

import re
import runpy
from pathlib import Path

import pytest

import fastsam
from fastsam import sharpness, testing

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="not a source tree")
PAGES = sorted(DOCS.rglob("*.md"))
RUNNABLE = re.compile(r"<!-- runnable -->\n```python\n(.*?)```", re.DOTALL)
PLACES = "fastsam|kernels|benchmarks|tests|docs|examples"
OUTSIDE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]  # of the site, whose own links its build checks


def test_there_are_examples_to_run():
    assert any(RUNNABLE.search(page.read_text()) for page in PAGES)


@pytest.mark.parametrize("page", [p for p in PAGES if RUNNABLE.search(p.read_text())], ids=lambda page: page.stem)
def test_the_examples_run(page, tmp_path):
    """The runnable blocks of a page, one after the other, as one program."""
    example = tmp_path / "example.py"
    example.write_text("\n".join(RUNNABLE.findall(page.read_text())))
    runpy.run_path(str(example))


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=lambda page: page.stem)
def test_files_named_in_backticks_are_there(page):
    named = re.findall(rf"`((?:{PLACES}|\.ci|\.github)/[\w./-]*)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=lambda page: page.stem)
def test_functions_named_with_their_file_are_there(page):
    """Written as `name` in `file`, or in neighbouring cells of a table."""
    for name, file in re.findall(r"`([\w.]+)`(?: in | \| )`([\w./]+\.py)`", page.read_text()):
        for part in name.split("."):
            definition = rf"^\s*(?:def|class) {part}\b|^\s*{part}\b.* = "
            assert re.search(definition, (ROOT / file).read_text(), re.MULTILINE), f"no {name} in {file}"


@pytest.mark.parametrize("page", OUTSIDE, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(((?!https?:)[^)#]+)", page.read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_public_name_has_its_place_in_the_api_pages():
    pages = "\n".join(p.read_text() for p in PAGES)
    documented = re.findall(r"^\.\. auto\w+:: (\w+)$", pages, re.MULTILINE)
    assert sorted(documented) == sorted(fastsam.__all__)
    measures = re.findall(r"^\.\. auto\w+:: fastsam\.sharpness\.(\w+)$", pages, re.MULTILINE)
    assert sorted(measures) == sorted(sharpness.__all__)
    assert all(f":: fastsam.testing.{name}" in pages for name in testing.__all__)


def anchors_of(page):
    """Anchors of headings, as GitHub and the site name them, and those that the page sets itself."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([\w-]+)"></a>', text))


def test_what_the_code_cites_of_the_documentation_is_there():
    sources = [p for place in ("fastsam", "kernels", "benchmarks", "tests") for p in (ROOT / place).rglob("*.py")]
    cited = {c for p in sources for c in re.findall(r"\bdocs/([\w/]+\.md)(?:#([\w-]+))?", p.read_text())}
    assert cited, "nothing is cited"
    missing = [c for c in sorted(cited) if not (DOCS / c[0]).exists() or (c[1] and c[1] not in anchors_of(DOCS / c[0]))]
    assert missing == []
