"""Odoo's own tests of its bus, its scheduled actions and its cursors, behind the pooler with the addon.

    python -m tools.odoo_tests [TAGS]

They are run three times: straight to PostgreSQL without the addon, behind PgBouncer with it, and behind PgBouncer
without it. The first two have to come to the same for each test; the exit code is 0 if they do, 1 if not, and 2 if they
can not be run. The third shows what these tests notice.

``TAGS`` are those of Odoo's ``--test-tags``. Which Odoo, 16.0 or newer, the environment says: ``SERIES`` (default 19.0)
or ``ODOO``, a source tree, and ``PYTHON``, the interpreter for it.

Tests that need a browser Odoo skips where there is no Chrome.
"""

import collections
import os
import re
import shutil
import sys
import time
from typing import NamedTuple

from tabulate import tabulate

from stack.archive import CACHE
from stack.builds import find_build
from stack.commands import say
from stack.database import DATABASE, odoo_database
from stack.odoo import Odoo, series_number
from stack.pgbouncer import PgBouncer
from stack.postgres import PostgreSQL
from stack.stack import ADDON, DEFAULT_SERIES

# What the addon patches is the method that hands out cursors.
TAGS = "/bus,/base/tests/test_ir_cron.py,/base/tests/test_db_cursor.py"
#: Before, there were no websockets to be tested; the log is read as it is from here on.
OLDEST = 16
LOGS = CACHE / "odoo-tests"
# Seconds for one of the three runs.
_DEADLINE = 1800

# As Odoo's odoo/tests/result.py writes them, from 16.0 to 19.1.
_RECORD = r"^\S+ \S+ \d+ [A-Z]+ \S+ (\S+): "
_STARTED = re.compile(_RECORD + r"Starting (\w+\.test\w+) \.\.\.", re.MULTILINE)
_SKIPPED = re.compile(_RECORD + r"skipped (.+?) : ", re.MULTILINE)
_FAILED = re.compile(_RECORD + r"(FAIL|ERROR): (?:Subtest )?(\w+\.\w+|.+)", re.MULTILINE)
_SUMMARY = re.compile(r"\d+ failed, \d+ error\(s\) of (\d+) tests")
_OUTCOMES = ("passed", "failed", "error", "skipped")


class SetUp(NamedTuple):
    name: str
    pooler: bool
    addon: bool


DIRECT = SetUp("PostgreSQL, without the addon", pooler=False, addon=False)
WITH_ADDON = SetUp("PgBouncer, with the addon", pooler=True, addon=True)
WITHOUT_ADDON = SetUp("PgBouncer, without the addon", pooler=True, addon=False)


class Run(NamedTuple):
    #: name of each test, as ``--test-tags`` takes it -> one of passed, failed, error and skipped
    outcomes: dict
    seconds: float


def run(build, setup, tags):
    """Run Odoo's tests once, return a :class:`Run`; the log is kept in ``LOGS``.

    :raise RuntimeError: Odoo did not come to the end of them, or there are none
    """
    say("%s ..." % setup.name)
    archives = odoo_database(build)
    with PostgreSQL({"log_statement": "none"}, archive=archives["cluster"]) as server, PgBouncer(server) as pooler:
        through = pooler if setup.pooler else server
        odoo = Odoo(
            build,
            through,
            DATABASE,
            addon=ADDON if setup.addon else None,
            environment={"IMDISPATCHER_DB_HOST": server.host, "IMDISPATCHER_DB_PORT": str(server.port)},
            # One of the tests wants a cursor that is read-only, of the database for that; there is since 18.0.
            conf={"db_replica_host": through.host, "db_replica_port": through.port}
            if series_number(build.series) >= 18
            else None,
            filestore=archives["filestore"],
            # Many tests are only run while the module that they are of is installed or updated.
            options=["--update", "base", "--test-tags", tags, "--stop-after-init"],
        )
        began = time.monotonic()
        failure = None
        try:
            odoo.run(_DEADLINE)
        except RuntimeError as error:  # as it ends when a test fails, too
            failure = error
        finally:
            seconds = time.monotonic() - began
            log = odoo.log()
            LOGS.mkdir(parents=True, exist_ok=True)
            path = LOGS / ("%s %s.log" % (build.series, setup.name))
            shutil.copy(odoo.log_path, path)
            odoo.close()
    summary = _SUMMARY.search(log)
    if summary is None:
        raise failure or RuntimeError("Odoo has not said how its tests ended, see %s" % path)
    if summary[1] == "0":
        raise RuntimeError("Odoo has no tests %s" % tags)
    return Run(outcomes(log), seconds)


def outcomes(log):
    """Return what became of each test that Odoo's log tells of, by its name."""
    found = {_name(*test): "passed" for test in _STARTED.findall(log)}
    found.update({_name(*test): "skipped" for test in _SKIPPED.findall(log)})
    for logger, outcome, test in _FAILED.findall(log):
        found[_name(logger, test)] = "error" if outcome == "ERROR" else "failed"
    return found


def _name(logger, test):
    module = re.match(r"odoo\.addons\.(\w+)\.", logger)
    # What fails or is skipped for a whole class has no such logger, but its full name.
    return "/%s:%s" % (module[1], test) if module else test


def differences(one, other):
    """Return the names of the tests that two runs do not agree on."""
    return sorted(name for name in {**one, **other} if one.get(name) != other.get(name))


def report(runs):
    """Return lines for people: a table, what differs, and what fails or is skipped wherever it runs.

    :param runs: :class:`SetUp` -> :class:`Run`; the first one is what the others are compared with
    """
    reference = next(iter(runs.values())).outcomes
    rows = []
    for setup, one in runs.items():
        counts = collections.Counter(one.outcomes.values())
        differ = "" if one.outcomes is reference else len(differences(reference, one.outcomes))
        rows.append((setup.name, *(counts[outcome] for outcome in _OUTCOMES), differ, "%.0f" % one.seconds))
    head = ("Odoo's tests on", *_OUTCOMES, "differ", "seconds")
    lines = tabulate(rows, headers=head, tablefmt="rst").splitlines()
    for setup, one in runs.items():
        names = differences(reference, one.outcomes)
        if names:
            lines += ["", "%s:" % setup.name]
            lines += ["  %s: %s, not %s" % (name, one.outcomes.get(name), reference.get(name)) for name in names]
    everywhere = {name for name in reference if all(reference[name] == one.outcomes.get(name) for one in runs.values())}
    for outcome in _OUTCOMES[1:]:
        names = sorted(name for name in everywhere if reference[name] == outcome)
        if names:
            lines += ["", "%s in each of them:" % outcome, *("  " + name for name in names)]
    return lines


def _find_build(environ):
    tree = environ.get("ODOO", "").strip() or None
    series = environ.get("SERIES", "").strip() or (None if tree else DEFAULT_SERIES)
    build = find_build(series, tree, environ.get("PYTHON", "").strip() or None)
    if series_number(build.series) < OLDEST:
        raise RuntimeError("Odoo %s is too old, name one of %d.0 or newer" % (build.series, OLDEST))
    return build


def main():
    tags = sys.argv[1] if len(sys.argv) > 1 else TAGS
    try:
        build = _find_build(os.environ)
        runs = {setup: run(build, setup, tags) for setup in (DIRECT, WITH_ADDON, WITHOUT_ADDON)}
    except RuntimeError as error:
        print("make odoo-tests: %s" % error, file=sys.stderr)
        return 2
    print("\n".join(["%s, Python %s, %s" % (build.description, build.python, tags), "", *report(runs)]))
    print("\nlogs: %s" % LOGS)
    direct, with_addon, without_addon = (one.outcomes for one in runs.values())
    if direct == without_addon:
        print("\nNothing differs without the addon either: these tests do not need it.")
    differing = differences(direct, with_addon)
    if differing:
        again = ",".join(name for name in differing if name.startswith("/"))
        print("\nSome have limits of time that a busy machine does not keep. Once more: ARGS=%s" % again)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
