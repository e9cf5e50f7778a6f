"""Options of all tests, the variants of Odoo that they lead to, and which tests run side by side."""

import math
import re
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from stack import servers
from stack.builds import find_build, use
from stack.commands import reason
from stack.odoo import series_number
from stack.stack import ADDON, DEFAULT_SERIES
from tests.support.variants import MODES, VARIANTS

# Where no test needs Odoo.
_WITHOUT_ODOO = {ADDON / "tests" / name for name in ("unit", "postgres")}
# Series that can't be had, and why, in one line.
_LEFT_OUT = pytest.StashKey[dict]()


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
    group.addoption(
        "--all-series", action="store_true", help="fail if a series can't be had, in place of leaving its tests out"
    )


def pytest_configure(config):
    try:
        servers.check()
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from None
    odoo = config.getoption("--odoo")
    if odoo:
        _use_only(odoo, config)
    config.stash[_LEFT_OUT] = _look_for_builds(config)
    for name in [name for name, (series, _workers) in VARIANTS.items() if series in config.stash[_LEFT_OUT]]:
        del VARIANTS[name]


def _use_only(odoo, config):
    try:
        # Had before the tests begin: progress is seen, and what is wrong is said once.
        series = use(odoo, config.getoption("--odoo-python"))
    except RuntimeError as error:
        raise pytest.UsageError("--odoo: %s" % error) from None
    mode = config.getoption("--odoo-mode")
    VARIANTS.clear()
    VARIANTS.update(("%s-%s" % (series, one), (series, MODES[one])) for one in ([mode] if mode else MODES))


def _look_for_builds(config):
    """Have all that is needed of Odoo downloaded and installed; return the series that can't be had, and why.

    Once, and before anything is collected: each test would try again.
    """
    if hasattr(config, "workerinput"):
        return config.workerinput["left_out"]
    paths = [Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args]
    is_without_odoo = all(_WITHOUT_ODOO & {path, *path.parents} for path in paths)
    # That of --odoo has been had.
    if config.getoption("--odoo") or config.option.collectonly or is_without_odoo:
        return {}
    left_out = {}
    for series in dict.fromkeys(series for series, _workers in VARIANTS.values()):
        try:
            find_build(series)
        except RuntimeError as error:
            if config.getoption("--all-series") or series == DEFAULT_SERIES:
                raise pytest.UsageError("no Odoo %s: %s" % (series, error)) from None
            left_out[series] = reason(error)
    return left_out


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["left_out"] = node.config.stash[_LEFT_OUT]


def pytest_report_header(config):
    return _left_out_lines(config)


def pytest_terminal_summary(terminalreporter, config):
    for line in _left_out_lines(config):
        terminalreporter.write_line(line, yellow=True)


def _left_out_lines(config):
    return ["left out: all tests of Odoo %s: %s" % item for item in config.stash[_LEFT_OUT].items()]


def pytest_collection_modifyitems(config, items):
    def is_wanted(item):
        return bool(item.get_closest_marker("matrix") or not config.getoption("--odoo")) and not _is_left_out(item)

    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = [item for item in items if is_wanted(item)]


def _is_left_out(item):
    # Some name a series or a variant themselves.
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    left_out = item.config.stash[_LEFT_OUT]
    return any(isinstance(one, str) and one.partition("-")[0] in left_out for one in parameters)


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
