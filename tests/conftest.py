"""Options of all tests, the variants of Odoo that they lead to, and which tests run side by side."""

import math
import re
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from stack.builds import find_build, use
from stack.database import odoo_database
from stack.odoo import series_number
from stack.stack import ADDON, DEFAULT_SERIES
from tests.support.variants import MODES, VARIANTS

# Where no test needs Odoo.
_WITHOUT_ODOO = {ADDON / "tests" / name for name in ("unit", "postgres", "simulation")}
_HAS_FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser):
    group = parser.getgroup("odoo")
    group.addoption(
        "--odoo",
        metavar="ODOO",
        help="run the tests that are marked with 'matrix' on this Odoo: a series, which comes from Debian or by git, or"
        " the path of a source tree",
    )
    group.addoption("--odoo-python", metavar="PYTHON", help="the interpreter for it")
    group.addoption("--odoo-mode", choices=list(MODES), help="run it in this mode only")
    group.addoption("--all-series", action="store_true", help="fail if a series can't be had; default: skip its tests")


def pytest_configure(config):
    try:
        if config.getoption("--odoo"):
            _use_only(config.getoption("--odoo"), config)
        elif not hasattr(config, "workerinput"):
            _prepare(config)
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from None


def _use_only(odoo, config):
    series = use(odoo, config.getoption("--odoo-python"))
    mode = config.getoption("--odoo-mode")
    VARIANTS.clear()
    VARIANTS.update(("%s-%s" % (series, one), (series, MODES[one])) for one in ([mode] if mode else MODES))
    config.option.markexpr = config.option.markexpr or "matrix"


def _prepare(config):
    """Have Odoo downloaded and installed before the tests begin, so that progress is seen."""
    paths = [Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args]
    if config.option.collectonly or all(_WITHOUT_ODOO & {path, *path.parents} for path in paths):
        return
    odoo_database(find_build(DEFAULT_SERIES))
    if config.option.markexpr == "not rest" or config.option.keyword:
        return
    for series in {series for series, _workers in VARIANTS.values()}:
        try:
            odoo_database(find_build(series))
        except RuntimeError:
            if config.getoption("--all-series"):
                raise


# Here, since in a folder's own conftest.py its turn, and so the names of tests, depend on what pytest was asked for.
def pytest_generate_tests(metafunc):
    """Run what uses ``variant`` on all of them: those that a test does not want are left out later.

    So all tests of a module have the same parameters in the same order, and those of one variant share its stack.
    """
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", VARIANTS, indirect=True, scope="module")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    items[:] = [item for item in items if _wants_its_variant(item, config)]
    for item in items:
        if not config.getoption("--odoo") and DEFAULT_SERIES not in _variant_of(item, DEFAULT_SERIES):
            item.add_marker(pytest.mark.rest)


def _variant_of(item, default=None):
    return item.callspec.params.get("variant", default) if hasattr(item, "callspec") else default


def _wants_its_variant(item, config):
    """Return whether the marker ``variants`` of a test, if it has one, names its variant; with ``--odoo`` all do."""
    variant, mark = _variant_of(item), item.get_closest_marker("variants")
    if variant is None or mark is None:
        return True
    series = series_number(VARIANTS[variant][0])
    is_named = not mark.args or variant in mark.args or config.getoption("--odoo")
    return is_named and mark.kwargs.get("since", 0) <= series < mark.kwargs.get("before", math.inf)


def _stack_of(nodeid):
    """Return what tests that share a stack have in common: module and variant."""
    return nodeid.partition("::")[0], *re.findall(r"\d+\.\d+-(?:threaded|prefork)", nodeid)[:1]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    # A test that is run once more begins with its setup.
    had_failed = call.when != "setup" and item.stash[_HAS_FAILED]
    item.stash[_HAS_FAILED] = report.failed or had_failed
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item):
    """End all servers after a failure: who comes next, be it the same test once more, gets new ones."""
    if item.stash[_HAS_FAILED]:
        item.session._setupstate.teardown_exact(None)


class _ByStack(LoadScopeScheduling):
    """Tests that share a stack run in one process."""

    def _split_scope(self, nodeid):
        return _stack_of(nodeid)


def pytest_xdist_make_scheduler(config, log):
    return _ByStack(config, log)
