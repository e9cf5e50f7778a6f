"""Options of all tests, the variants of Odoo that they lead to, and which tests run side by side."""

import math
import re

import pytest
from xdist.scheduler import LoadScopeScheduling

from stack import servers
from stack.builds import use
from stack.odoo import series_number
from tests.support.variants import MODES, VARIANTS


def pytest_addoption(parser):
    group = parser.getgroup("odoo")
    group.addoption(
        "--odoo",
        metavar="ODOO",
        help="run the tests that are marked with 'matrix', and no others, on this Odoo: a series, which comes from"
        " Debian or by git, or the path of a source tree",
    )
    group.addoption("--odoo-python", metavar="PYTHON", help="the interpreter for it")
    group.addoption("--odoo-mode", choices=list(MODES), help="run it in this mode only")


def pytest_configure(config):
    try:
        servers.check()
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from None
    odoo = config.getoption("--odoo")
    if not odoo:
        return
    try:
        # Had before the tests begin: progress is seen, and what is wrong is said once.
        series = use(odoo, config.getoption("--odoo-python"))
    except RuntimeError as error:
        raise pytest.UsageError("--odoo: %s" % error) from None
    mode = config.getoption("--odoo-mode")
    VARIANTS.clear()
    VARIANTS.update(("%s-%s" % (series, one), (series, MODES[one])) for one in ([mode] if mode else MODES))


def pytest_collection_modifyitems(config, items):
    if config.getoption("--odoo"):
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("matrix")])
        items[:] = [item for item in items if item.get_closest_marker("matrix")]


# Here, since in a folder's own conftest.py its turn, and so the names of tests, depend on what pytest was asked for.
def pytest_generate_tests(metafunc):
    """Run what uses ``variant`` on all variants, or on those that its marker ``variants`` names."""
    if "variant" not in metafunc.fixturenames:
        return
    # Some name theirs themselves, along with something else.
    if any("variant" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")):
        return
    mark = metafunc.definition.get_closest_marker("variants")
    options = mark.kwargs if mark else {}
    names = mark.args if mark and mark.args else VARIANTS
    since, before = options.get("since", 0), options.get("before", math.inf)
    chosen = [name for name in names if name in VARIANTS and since <= series_number(VARIANTS[name][0]) < before]
    # What adds little takes no time of "make test".
    if not metafunc.config.getoption("--odoo"):
        chosen = [name for name in chosen if name not in options.get("spare", ())]
    metafunc.parametrize("variant", chosen, indirect=True, scope="module")


class _ByStack(LoadScopeScheduling):
    """Tests of one module and variant share a stack, so they run in one process."""

    def _split_scope(self, nodeid):
        module = nodeid.partition("::")[0]
        return module, *re.findall(r"\d+\.\d+-(?:threaded|prefork)", nodeid)[:1]


def pytest_xdist_make_scheduler(config, log):
    return _ByStack(config, log)
