"""Odoo's own tests of its bus, its scheduled actions and its cursors, behind the pooler with the addon.

    python -m tools.odoo_tests [TAGS]

They are run three times: straight to PostgreSQL without the addon, behind PgBouncer with it, and behind PgBouncer
without it. The first two have to come to the same; the exit code is 0 if they do, 1 if not, and 2 if they can not be
run. The third shows what these tests notice.

``TAGS`` are those of Odoo's ``--test-tags``. Which Odoo, 16.0 or newer, the environment says: ``SERIES`` (default 19.0)
or ``ODOO``, a source tree, and ``PYTHON``, the interpreter for it.

Tests that need a browser Odoo skips where there is no Chrome.
"""

import contextlib
import os
import re
import shutil
import sys

from stack.archive import CACHE
from stack.builds import find_build, python_versions
from stack.commands import say
from stack.database import DATABASE, odoo_database
from stack.odoo import Odoo, series_number
from stack.pgbouncer import PgBouncer
from stack.postgres import PostgreSQL
from stack.stack import ADDON, DEFAULT_SERIES

# What the addon patches is the method that hands out cursors.
TAGS = "/bus,/base/tests/test_ir_cron.py,/base/tests/test_db_cursor.py"
#: name of a run -> whether there are PgBouncer, and the addon
RUNS = {
    "PostgreSQL, without the addon": (False, None),
    "PgBouncer, with the addon": (True, ADDON),
    "PgBouncer, without the addon": (True, None),
}
LOGS = CACHE / "odoo-tests"
# Seconds for one of the three runs.
_DEADLINE = 1800

# As Odoo's odoo/tests/result.py writes them, from 16.0 to 19.1.
_NOT_PASSED = re.compile(
    r"^\S+ \S+ \d+ [A-Z]+ \S+ \S+: ((?:FAIL|ERROR): (?:Subtest )?(?:\w+\.\w+|.+)|skipped .+?(?= : ))", re.MULTILINE
)
_SUMMARY = re.compile(r"\d+ failed, \d+ error\(s\) of [1-9]\d* tests")


def outcome(log):
    """Return what Odoo's log tells of the tests: the counts, and what did not pass, as lines.

    :raise RuntimeError: it tells of none
    """
    summary = _SUMMARY.search(log)
    if summary is None:
        raise RuntimeError("Odoo has run no test; the end of its log:\n%s" % "\n".join(log.splitlines()[-30:]))
    return [summary[0], *sorted(set(_NOT_PASSED.findall(log)))]


def run(build, name, tags, pooled, addon):
    """Run Odoo's tests once, and return the :func:`outcome`; the log is kept in ``LOGS``."""
    say("%s ..." % name)
    archives = odoo_database(build)
    with PostgreSQL({"log_statement": "none"}, archive=archives["cluster"]) as server, PgBouncer(server) as pooler:
        through = pooler if pooled else server
        odoo = Odoo(
            build,
            through,
            DATABASE,
            addon=addon,
            environment={"IMDISPATCHER_DB_HOST": server.host, "IMDISPATCHER_DB_PORT": str(server.port)},
            # One of the tests wants a cursor that is read-only, of the database for that; there is since 18.0.
            conf={"db_replica_host": through.host, "db_replica_port": through.port}
            if series_number(build.series) >= 18
            else None,
            filestore=archives["filestore"],
            # Many tests are only run while the module that they are of is installed or updated.
            options=["--update", "base", "--test-tags", tags, "--stop-after-init"],
        )
        with contextlib.closing(odoo):
            # It ends with an error when a test fails, too; the log tells.
            with contextlib.suppress(RuntimeError):
                odoo.run(_DEADLINE)
            LOGS.mkdir(parents=True, exist_ok=True)
            shutil.copy(odoo.log_path, LOGS / ("%s %s.log" % (build.series, name)))
            return outcome(odoo.log())


def main():
    tags = sys.argv[1] if len(sys.argv) > 1 else TAGS
    tree, series, python = (os.environ.get(name, "").strip() or None for name in ("ODOO", "SERIES", "PYTHON"))
    try:
        build = find_build(series or (None if tree else DEFAULT_SERIES), tree, python)
        found = {name: run(build, name, tags, *how) for name, how in RUNS.items()}
    except RuntimeError as error:
        print("make odoo-tests: %s" % error, file=sys.stderr)
        return 2
    print("Odoo %s, Python %s, %s" % (build.version, python_versions(build)[0], tags))
    for name, lines in found.items():
        print("%s:\n  %s" % (name, "\n  ".join(lines)))
    direct, with_addon, _without = found.values()
    if direct != with_addon:
        print("They differ. Some have limits of time that a busy machine does not keep: try these again by ARGS=TAGS.")
    return 0 if direct == with_addon else 1


if __name__ == "__main__":
    sys.exit(main())
