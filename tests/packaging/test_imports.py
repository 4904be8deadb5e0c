"""Imports go one way: which room may import which, no circles, and no room that the wheel would leave out."""

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from fastsam.methods import METHODS

ROOT = Path(__file__).parents[2]
BELOW_METHODS = {"two_pass", "distributed", "kernels", "arguments"}
ARROWS = {
    "__main__": {"fastsam", "cli", "installation"},
    "cli": {"fastsam", "methods", "presets", "graph", "two_pass", "sharpness", "schedule"},
    "arguments": set(),
    "fastsam": {
        "an optimizer",
        "a loss",
        "graph",
        "trajectory",
        "two_pass",
        "kernels",
        "norm_layers",
        "presets",
        "installation",
    },
    "methods": {"an optimizer", "a loss"},
    "testing": {"an optimizer", "two_pass", "distributed", "kernels", "schedule"},
    "graph": {"two_pass", "kernels", "arguments"},
    "integrations": {"two_pass"},
    "sharpness": {"two_pass", "distributed", "kernels", "arguments"},
    "an optimizer": {"schedule", *BELOW_METHODS},
    "a loss": {"trajectory", *BELOW_METHODS},
    "trajectory": {"kernels", "arguments"},
    "two_pass": {"distributed", "kernels", "schedule", "arguments"},
    "schedule": {"arguments"},
    "distributed": {"kernels", "arguments"},
    "installation": set(),
    "norm_layers": set(),
    "presets": set(),
    "kernels": set(),
}
"""For each room what it may import beside itself, as docs/architecture.md has it. Rooms are the folders of fastsam/ and
the files beside them; methods of one kind are one room, since ESAM may build on SAM. `fastsam` is its `__init__`."""
ARTICLES = {"optimizer": "an optimizer", "loss": "a loss"}
KINDS = {row.cls.__module__: ARTICLES[row.kind] for row in METHODS.values() if row.kind in ARTICLES}


def modules():
    """Every module of the package by its name, with its file."""
    found = {}
    for folder, package in ((ROOT / "fastsam", ("fastsam",)), (ROOT / "kernels", ("fastsam", "kernels"))):
        for file in folder.rglob("*.py"):
            path = file.relative_to(folder).with_suffix("").parts
            # work trees may have a link to kernels/ here
            if folder.name == "kernels" or path[0] != "kernels":
                found[".".join(part for part in (*package, *path) if part != "__init__")] = file
    return found


def imports_of(source, known):
    """The names of the modules that a source imports, anywhere in it: under TYPE_CHECKING and in functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import, of {node.module}"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if module in known else str(node.module)


def room_of(module):
    first, *rest = module.split(".")[1:] or ["fastsam"]
    name = f"fastsam.{first}"
    return KINDS[name] if not rest and name in KINDS else first


@pytest.fixture(scope="module")
def imports():
    known = modules()
    assert {"fastsam", "fastsam.cli.commands", "fastsam.kernels.ops", "fastsam.sam"} <= set(known)
    return {name: set(imports_of(file.read_text(encoding="utf-8"), known)) for name, file in known.items()}


def within(imported):
    return {module for module in imported if module.split(".")[0] == "fastsam"}


def test_every_import_is_found():
    source = """
import fastsam.one
from fastsam import two, name
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from fastsam.three import name
def function():
    from fastsam.four import name
    import torch
"""
    found = set(imports_of(source, {"fastsam.two"}))
    assert found == {"fastsam.one", "fastsam.two", "fastsam", "typing", "fastsam.three", "fastsam.four", "torch"}
    with pytest.raises(AssertionError, match="a relative import, of sam"):
        list(imports_of("from .sam import SAM", set()))


def test_rooms_import_what_they_may(imports):
    wrong = defaultdict(set)
    for module, imported in imports.items():
        for target in within(imported):
            pair = room_of(module), room_of(target)
            if pair[0] != pair[1] and pair[1] not in ARROWS[pair[0]]:
                wrong[f"{pair[0]} -> {pair[1]}"].add(f"{module} imports {target}")
    assert not wrong


def test_every_room_and_every_arrow_is_there(imports):
    assert {room_of(module) for module in imports} == set(ARROWS)
    drawn = {(room_of(module), room_of(target)) for module, imported in imports.items() for target in within(imported)}
    assert {(room, target) for room, targets in ARROWS.items() for target in targets} <= drawn


def test_no_arrow_points_upwards():
    order = list(TopologicalSorter(ARROWS).static_order())
    assert order.index("kernels") < order.index("two_pass") < order.index("cli") < order.index("__main__")


def test_no_modules_import_each_other_in_a_circle(imports):
    try:
        TopologicalSorter({module: within(imported) for module, imported in imports.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_nobody_imports_the_command_line_but_its_entry_and_the_benchmarks(imports):
    importers = {module for module, imported in imports.items() if any(room_of(m) == "cli" for m in within(imported))}
    assert {module for module in importers if room_of(module) != "cli"} == {"fastsam.__main__"}
    for folder in ("examples", "docs"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not any(m.startswith("fastsam.cli") for m in imports_of(file.read_text(encoding="utf-8"), imports))


def test_nobody_imports_kernels_by_a_name_that_others_have(imports):
    """Hugging Face publishes a package `kernels`; ours is `fastsam.kernels`."""
    assert not [module for module, imported in imports.items() if any(m.split(".")[0] == "kernels" for m in imported)]


def test_the_wheel_has_every_folder():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {".".join(("fastsam", *f.parent.relative_to(ROOT / "fastsam").parts)) for f in files_of_the_package()}
    assert packages == sorted({*folders, "fastsam.kernels"})
    assert not [f for f in (ROOT / "kernels").iterdir() if f.is_dir() and any(f.rglob("*.py"))], "kernels/ stays flat"
    assert all(
        (ROOT / package.replace(".", "/").replace("fastsam/kernels", "kernels") / "__init__.py").exists()
        for package in packages
    )


def files_of_the_package():
    files = (ROOT / "fastsam").rglob("*.py")
    return [file for file in files if file.relative_to(ROOT / "fastsam").parts[0] != "kernels"]
