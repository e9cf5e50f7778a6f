"""What the tests do about a series of Odoo that can't be had."""

import types

import pytest

from stack.stack import ADDON
from tests import conftest
from tests.support.variants import VARIANTS


@pytest.fixture
def asked(monkeypatch):
    """The series whose builds were asked for; that of 14.0 can't be had."""
    asked = []

    def find_build(series):
        asked.append(series)
        if series == "14.0":
            raise RuntimeError("Python 3.9 is needed\nand many lines on why")

    monkeypatch.setattr(conftest, "find_build", find_build)
    monkeypatch.setattr(conftest, "VARIANTS", dict(VARIANTS))
    return asked


def configured(*paths, **options):
    config = types.SimpleNamespace(
        stash=pytest.Stash(),
        args=list(paths) or ["tests"],
        invocation_params=types.SimpleNamespace(dir=ADDON),
        option=types.SimpleNamespace(collectonly=False),
        getoption=lambda name: options.get(name.strip("-").replace("-", "_")),
    )
    conftest.pytest_configure(config)
    return config


def test_a_series_that_can_not_be_had_is_left_out_and_told_in_one_line(asked):
    config = configured()
    assert asked == ["14.0", "19.0"]
    assert list(conftest.VARIANTS) == ["19.0-threaded", "19.0-prefork"]
    assert conftest.pytest_report_header(config) == ["left out: all tests of Odoo 14.0: Python 3.9 is needed"]


@pytest.mark.parametrize("parameters, is_left_out", [(["14.0"], True), ([2, "14.0-prefork"], True), (["19.0"], False)])
def test_tests_that_name_the_series_themselves_are_left_out(asked, parameters, is_left_out):
    item = types.SimpleNamespace(
        config=configured(), callspec=types.SimpleNamespace(params=dict(enumerate(parameters)))
    )
    assert conftest._is_left_out(item) is is_left_out


def test_who_wants_all_series_gets_an_error(asked):
    with pytest.raises(pytest.UsageError, match="Python 3.9 is needed"):
        configured(all_series=True)


def test_no_odoo_is_asked_for_where_no_test_needs_one(asked):
    configured("tests/unit", "tests/postgres/test_check.py::test_x")
    assert asked == []
