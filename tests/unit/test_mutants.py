"""The faults that ``make mutants`` plants can still be planted."""

from tests import mutants


def test_each_planted_fault_is_one_change_of_code_that_is_there():
    faults = mutants.listed()
    for fault in faults:
        path, text = mutants.planted(fault, mutants.ROOT)
        compile(text, str(path), "exec")
        assert bool(fault.notice) != bool(fault.harmless), fault.name
    modules = {path.stem for path in (mutants.ROOT / mutants.ADDON).glob("[a-z]*.py")}
    assert {fault.module for fault in faults} == modules
