"""All series: the tests marked with ``matrix`` on Debian's Odoos and, by git, on those of all other series.

    python -m tools.matrix [--trees FOLDER] [ARGUMENT OF PYTEST...]

With a folder of source trees of Odoo it is these that they run on, and Debian's. One pytest runs for each Odoo, on the
servers of this machine. A run of all series in which nothing failed is written to ``docs/matrix.rst``.
"""

import argparse
import datetime
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

from tabulate import tabulate

from stack import postgres
from stack.archive import CACHE
from stack.builds import DEBIAN, PYTHONS, find_build, run_python
from stack.clones import Unavailable
from stack.commands import run, say
from stack.odoo import series_number
from stack.servers import pgbouncer_program
from tests.support.variants import MODES

ROOT = Path(__file__).resolve().parents[1]
REPORT = CACHE / "matrix.xml"
DOCUMENT = ROOT / "docs" / "matrix.rst"

# Besides the one that suits a series best: 12.0 was made for Python 3.5, and 3.6 is the oldest that there still is.
ALSO_ON = {"12.0": "3.6"}


def find_builds(trees):
    """Return (build, options of pytest) for each Odoo, the oldest first; what they need is installed.

    A series that can be had neither from Debian nor by git is left out, which is told.

    :param trees: folder with source trees, to run these and Debian's; None: all series
    :raise RuntimeError: one of them can not be run, or there is none
    """
    places = [{"tree": path.parent} for path in Path(trees).glob("*/odoo-bin")] if trees else []
    if trees and not places:
        raise RuntimeError("TREES=%s: no source tree of Odoo in it, that is no %s/*/odoo-bin" % (trees, trees))
    places += [{"series": series} for series in (DEBIAN if trees else PYTHONS)]
    builds = []
    for place in places:
        try:
            build = find_build(**place)
        except Unavailable as error:
            say("left out: %s" % error)
            continue
        odoo = "--odoo=%s" % place.get("tree", build.series)
        builds.append((build, [odoo]))
        python = ALSO_ON.get(build.series)
        if python:
            try:
                builds.append((find_build(**place, python=python), [odoo, "--odoo-python=" + python]))
            except RuntimeError as error:
                say("left out: Odoo %s on Python %s: %s" % (build.series, python, error))
    return sorted(builds, key=lambda pair: (series_number(pair[0].series), pair[0].version))


def try_build(build, options):
    """Run pytest; return a row of the table, by the names of its columns."""
    began = time.monotonic()
    print("\n===== Odoo %s (%s), Python %s =====" % (build.series, build.description, build.python), flush=True)
    REPORT.unlink(missing_ok=True)
    # Real servers may be late once. What failed on one Odoo is not what --last-failed is to know on another.
    own = ["-m", "matrix", "--reruns=1", "-p", "no:cacheprovider", "--junitxml=%s" % REPORT]
    code = subprocess.call([sys.executable, "-m", "pytest", "tests", *own, *options], cwd=ROOT)
    if not REPORT.exists():
        raise RuntimeError("no result of pytest, exit code %s" % code)
    libpq = run_python(build, "from psycopg2 import extensions; print(extensions.libpq_version())")
    return {
        "series": build.series,
        "build": build.version,
        "Python": build.python,
        "psycopg2 (libpq)": "%s (%d.%d)" % (build.psycopg2, libpq // 10000, libpq % 10000),
        "PostgreSQL": postgres.full_version().split()[0],
        "PgBouncer": re.search(r"\d+(\.\d+)+", run([pgbouncer_program(), "-V"]))[0],
        **{mode: outcome(ElementTree.parse(REPORT), mode) for mode in MODES},
        "seconds": round(time.monotonic() - began),
    }


def outcome(report, mode):
    """Return what became of the tests in a mode, such as "1 failed, 36 passed".

    :param report: an :class:`~xml.etree.ElementTree.ElementTree`, as pytest writes it for JUnit
    """
    cases = [case for case in report.iter("testcase") if "-%s" % mode in case.get("name")]
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    return "%s%d passed" % ("%d failed, " % failed if failed else "", len(cases) - failed - skipped)


def main():
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", help="folder with source trees of Odoo; default: Debian and git have them")
    options, arguments = parser.parse_known_args()
    try:
        rows = [try_build(build, [*odoo, *arguments]) for build, odoo in find_builds(options.trees)]
    except RuntimeError as error:
        print("make matrix: %s" % error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    text = "Run on %s:\n\n%s\n" % (
        datetime.date.today(),
        tabulate(rows, headers="keys", tablefmt="rst", disable_numparse=True),
    )
    print("\n" + text)
    well = all(re.fullmatch(r"[1-9]\d* passed", row[mode]) for row in rows for mode in MODES)
    if well and {row["series"] for row in rows} == set(PYTHONS):
        DOCUMENT.write_text(text)
        print("Written to docs/%s." % DOCUMENT.name)
    else:
        print("docs/%s is left as it was: failures, or not all series." % DOCUMENT.name)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
