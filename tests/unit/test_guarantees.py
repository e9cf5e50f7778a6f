"""The tables of tests/README.rst name tests that exist, and all of those on real servers."""

import re
from pathlib import Path

from tests.simulation import invariants, stories

TESTS = Path(__file__).resolve().parents[1]
FOLDERS = ("odoo", "postgres")


def rows():
    """Return the cells of all rows: guarantee, unit, simulation, and real where it needs that."""
    found = []
    for table in re.split(r"\n\.\. list-table::", (TESTS / "README.rst").read_text())[1:]:
        for row in re.split(r"\n   \* -", table)[2:]:
            row = re.split(r"\n\S", row)[0]
            found.append([" ".join(cell.split()) for cell in re.split(r"\n     -", row)])
    return found


def real_tests(path):
    return ["%s: %s" % (path, name) for name in re.findall(r"^def (test_\w+)", (TESTS / path).read_text(), re.M)]


def named():
    """Return the real tests that the tables name, those of whole files included."""
    cells = [cells[3] for cells in rows() if len(cells) == 4]
    return [test for cell in cells for test in ([cell] if ": " in cell else real_tests(cell))]


def test_each_real_test_is_named_once_and_exists():
    files = [path.relative_to(TESTS) for folder in FOLDERS for path in (TESTS / folder).glob("test_*.py")]
    assert len(rows()) > 50
    assert sorted(named()) == sorted(test for path in files for test in real_tests(path))


def test_what_else_proves_a_guarantee_exists():
    # Some invariants have a unit.
    simulated = {story.__name__ for story in stories.STORIES} | {name.partition(" (")[0] for name in invariants.ALL}
    for guarantee, unit, simulation, *_real in rows():
        missing = {name for name in _names(unit) if not (TESTS / "unit" / (name + ".py")).exists()}
        assert not missing | _names(simulation) - simulated, guarantee


def _names(cell):
    return set(filter(None, cell.split(", ")))
