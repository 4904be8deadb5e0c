"""The laws leave nothing out without a reason, and the set of cells that CI takes meets all that they hold for."""

import importlib
from pathlib import Path

import pytest
from laws import LAWS, all_cells, covering, subjects
from methods import ALL_BASES, BASES, OPTIONS, ORACLES, WAYS

import fastsam.methods
from fastsam.methods import METHODS

for file in sorted(Path(__file__).parent.glob("test_*.py")):
    importlib.import_module(file.stem)


def test_every_row_has_an_oracle_and_every_base_and_way_of_the_table_is_tried():
    assert set(ORACLES) == set(METHODS)
    assert set(OPTIONS) == {name for name, row in METHODS.items() if row.kind != "base"}
    assert tuple(WAYS) == fastsam.methods.WAYS
    assert {row.cls for row in METHODS.values() if row.kind == "base"} <= {cls for cls, _ in BASES.values()}
    assert {(s.row, s.variant) for s in subjects()} == {
        (name, variant) for name, row in METHODS.items() if row.kind != "base" for variant in row.variants
    }
    assert set(BASES) <= set(ALL_BASES)


def test_the_laws_are_found():
    assert len(LAWS) >= 8, LAWS


@pytest.mark.parametrize("name", LAWS)
def test_a_law_meets_every_pair_of_row_base_and_way_or_says_why_not(name):
    law = LAWS[name]
    met = set().union(*(cell.met for cell in law.cells(every=False)))
    for cell in all_cells():
        for pair in cell.met - met:
            without = [other for other in all_cells() if pair in other.met]
            assert all(law.reasons(other) for other in without), f"{pair} is left out without a reason"
    assert all(
        len(reason.split()) >= 4 and any(map(leaves_out, all_cells())) for reason, leaves_out in law.skips.items()
    )


@pytest.mark.parametrize("name", LAWS)
def test_the_full_product_leaves_out_what_the_law_says_alone(name):
    first = LAWS[name].backends[0]
    taken = [cell for cell in LAWS[name].cells(every=True) if cell.backend == first]
    assert taken == [cell._replace(backend=first) for cell in all_cells() if not LAWS[name].reasons(cell)]


def test_a_covering_set_is_small_and_whole():
    cells = all_cells()
    chosen = covering(cells)
    assert set().union(*(cell.met for cell in chosen)) == set().union(*(cell.met for cell in cells))
    assert len(chosen) < len(cells) / 4
    assert chosen == covering(cells)
