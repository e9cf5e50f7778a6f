"""All series: the tests marked with ``matrix`` on Debian's Odoos and, by git, on those of all other series.

    python -m tools.matrix [--trees FOLDER] [ARGUMENT OF PYTEST...]

With a folder of source trees of Odoo it is these that they run on, and Debian's. One pytest runs for each Odoo, on the
servers of this machine. The table at the end is for ``docs/matrix.rst``.
"""

import argparse
import datetime
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from tabulate import tabulate

from stack import postgres
from stack.archive import CACHE
from stack.builds import DEBIAN, PYTHONS, find_build, python_versions
from stack.clones import Unavailable
from stack.commands import run, say
from stack.pgbouncer import PgBouncer

ROOT = Path(__file__).resolve().parents[1]
REPORT = CACHE / "matrix.xml"

# (series, Python), besides the one that suits a series best: 12.0 was made for Python 3.5, and 3.6 is the oldest that
# there still is.
ALSO = [("12.0", "3.6")]


def find_builds(trees):
    """Yield (build, options of pytest) for each Odoo; what they need is installed.

    An Odoo that can't be had is left out, which is told.

    :param trees: folder with source trees, to run these and Debian's; None: all series
    :raise RuntimeError: there is no source tree, or one can not be run
    """
    found = sorted(path.parent for path in Path(trees).glob("*/odoo-bin")) if trees else []
    if trees and not found:
        raise RuntimeError("TREES=%s: no source tree of Odoo in it, that is no %s/*/odoo-bin" % (trees, trees))
    for tree in found:
        yield find_build(tree=tree), ["--odoo=%s" % tree]
    for series, python in [(series, None) for series in (DEBIAN if trees else PYTHONS)] + ([] if trees else ALSO):
        try:
            build = find_build(series, python=python)
        except Unavailable as error:
            say("left out: %s" % error)
        else:
            yield build, ["--odoo=%s" % series, *(["--odoo-python=%s" % python] if python else [])]


def try_build(build, options):
    """Run pytest; return a row of the table, by the names of its columns, and whether all tests passed."""
    python, psycopg2, libpq = python_versions(build)
    print("\n===== Odoo %s (%s), Python %s =====" % (build.series, build.version, python), flush=True)
    REPORT.unlink(missing_ok=True)
    # Real servers may be late once. What failed on one Odoo is not what --last-failed is to know on another.
    own = ["-m", "matrix", "--reruns=1", "-p", "no:cacheprovider", "--junitxml=%s" % REPORT]
    code = subprocess.call([sys.executable, "-m", "pytest", "tests", *own, *options], cwd=ROOT)
    if not REPORT.exists():
        raise RuntimeError("no result of pytest, exit code %s" % code)
    suite = ElementTree.parse(REPORT).find("testsuite")
    return {
        "series": build.series,
        "build": build.version,
        "Python": python,
        "psycopg2 (libpq)": "%s (%d.%d)" % (psycopg2, libpq // 10000, libpq % 10000),
        "PostgreSQL": postgres.full_version().split()[0],
        "PgBouncer": re.search(r"\d+(\.\d+)+", run([PgBouncer.program(), "-V"]))[0],
        **{count: suite.get(count) for count in ("tests", "failures", "errors", "skipped")},
        "seconds": round(float(suite.get("time"))),
    }, code == 0


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", help="folder with source trees of Odoo; default: Debian and git have them")
    options, arguments = parser.parse_known_args()
    try:
        results = [try_build(build, [*odoo, *arguments]) for build, odoo in find_builds(options.trees)]
    except RuntimeError as error:
        print("make matrix: %s" % error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print("\nRun on %s:\n" % datetime.date.today())
    print(tabulate([row for row, _passed in results], headers="keys", tablefmt="rst", disable_numparse=True))
    return 0 if results and all(passed for _row, passed in results) else 1


if __name__ == "__main__":
    sys.exit(main())
