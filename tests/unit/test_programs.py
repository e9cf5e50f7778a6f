"""The project's own programs can be loaded; what they do is seen where they are used."""

import importlib
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PROGRAMS = [
    path
    for folder in ("demo", "stack", "tests/simulation", "tools")
    for path in sorted((PROJECT / folder).glob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text()
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_a_program_can_be_loaded(path):
    importlib.import_module(".".join(path.relative_to(PROJECT).with_suffix("").parts))
