"""All series: the tests marked with ``matrix`` on Debian's Odoos and, by git, on those of all other series.

    python -m tools.matrix [--trees FOLDER] [--jobs N] [ARGUMENT OF PYTEST...]

With a folder of source trees of Odoo it is these that they run on, and Debian's.

Each Odoo is run threaded and prefork, some of these side by side, on the servers of this machine; some once more, on
the newest PostgreSQL and PgBouncer that Debian has. What pytest prints is kept in ``.stack/matrix/``.
A run of all series in which nothing failed is written to ``docs/matrix.rst``.
"""

import argparse
import contextlib
import datetime
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from tabulate import tabulate

from stack import guard, servers
from stack.archive import CACHE
from stack.builds import DEBIAN, PYTHONS, Build, find_build, run_python, tree_release
from stack.clones import Unavailable
from stack.commands import CommandError, run, say
from stack.odoo import series_number
from tests.support.variants import MODES

ROOT = Path(__file__).resolve().parents[1]
FOLDER = CACHE / "matrix"
DOCUMENT = ROOT / "docs" / "matrix.rst"

# Besides the one that suits a series best: 12.0 was made for Python 3.5, and 3.6 is the oldest that there still is.
ALSO_ON = {"12.0": "3.6"}
# On the newest servers as well: those that Odoo's users run most, and the newest.
ON_NEWEST = ("14.0", "19.0", "19.1")
# Seconds for one Odoo in one mode, the database that is made for it included.
DEADLINE = 3600


class Refused(Exception):
    """What was asked for is no good; the message is one line."""


class Row(NamedTuple):
    """One Odoo."""

    name: str  # for files and people
    build: Build
    version: str
    options: list  # of pytest, to run on this one
    servers: dict = {}  # environment variables that choose them, see stack.servers


class Result(NamedTuple):
    """What came of one Odoo in one mode."""

    passed: int
    failed: list  # names of tests, or why there is no result
    seconds: float = 0
    second_try: int = 0  # how many of those that passed had failed before

    def __str__(self):
        failed = "%d failed, " % len(self.failed) if self.failed else ""
        return "%s%d passed%s" % (
            failed,
            self.passed,
            ", %d on retry" % self.second_try if self.second_try else "",
        )


def find_rows(trees):
    """Return a :class:`Row` for each Odoo, the oldest first; what it needs in order to be run is installed.

    A series that can be had neither from Debian nor by git is left out, and one line tells which and why.

    :param trees: folder with source trees, to run these and Debian's; None: all series
    :raise Refused: one of them can not be run, or there is none
    """
    # All trees are looked at before anything is installed.
    places = [{"tree": tree} for tree in _find_trees(trees)] if trees else []
    places += [{"series": series} for series in (DEBIAN if trees else PYTHONS)]
    rows, left_out = [], {}
    for place in places:
        try:
            row = _find_row(place)
        except Unavailable as error:
            left_out.setdefault(error.why, []).append(error.series)
            continue
        except RuntimeError as error:
            raise Refused("%s: %s" % (place.get("series") or place["tree"].name, error)) from error
        rows.append(row)
        also = ALSO_ON.get(row.build.series)
        if also:
            try:
                rows.append(_find_row(place, also))
            except RuntimeError as error:
                say("left out %s-python%s, there is no such Python: %s" % (row.name, also, str(error).splitlines()[0]))
    if left_out:
        told = ["%s: %s" % (", ".join(series), why) for why, series in left_out.items()]
        say(
            "left out %s; name a folder with source trees, TREES=/folder, or a repository, ODOO_GIT=..."
            % "; ".join(told)
        )
    if not rows:
        raise Refused("no series can be had")
    return sorted(rows, key=lambda row: (series_number(row.build.series), row.version, row.name))


def _find_row(place, python=None):
    build = find_build(python=python, **place)
    is_debian = build.description.startswith("Debian ")
    name = place["tree"].name if "tree" in place else "%s-%s" % ("debian" if is_debian else "git", build.series)
    options = ["--odoo=%s" % place.get("tree", build.series)]
    if python:
        name += "-python" + python
        options.append("--odoo-python=" + python)
    version = "Debian " + build.description.split()[-1] if is_debian else _tree_version(build.root)
    return Row(name, build, version, options)


def newest_servers():
    """Return the environment variables that choose the newest servers, once these can be run; none if some are chosen.

    :raise Refused: they can not be had, or what is chosen is no good
    """
    try:
        servers.check()
        if any(os.environ.get(variable) for variable in servers.NEWEST):
            return {}
        servers.postgres_programs(servers.NEWEST["POSTGRESQL"])
        servers.pgbouncer_program(servers.NEWEST["PGBOUNCER"])
    except RuntimeError as error:
        raise Refused(error) from error
    return servers.NEWEST


def on_newest_too(rows, newest):
    """Return ``rows``, and after the last of each series in `ON_NEWEST` the same one on the ``newest`` servers."""
    last = {row.build.series: row for row in rows if newest and row.build.series in ON_NEWEST}
    found = []
    for row in rows:
        found.append(row)
        if row is last.get(row.build.series):
            found.append(row._replace(name=row.name + "-newest-servers", servers=newest))
    return found


def _find_trees(folder):
    folder = Path(folder)
    if not folder.is_dir():
        raise Refused("TREES=%s: no such folder" % folder)
    trees = sorted(path.parent.absolute() for path in folder.glob("*/odoo-bin"))
    if not trees:
        raise Refused("TREES=%s: no source tree of Odoo in it, that is no %s/*/odoo-bin" % (folder, folder))
    for tree in trees:
        try:
            tree_release(tree)
        except RuntimeError as error:
            raise Refused("TREES=%s: %s" % (folder, error)) from error
        for addons in tree / "addons", tree / "odoo" / "addons":
            if (addons / "bus_alt_connection").exists():
                raise Refused(
                    "TREES=%s: %s has a bus_alt_connection, which Odoo would load in place of ours: take it out"
                    % (folder, addons)
                )
    return trees


def _tree_version(tree):
    """Return the version with the date that archives of Odoo have, or what their owner calls the folder.

    In a clone it is the date of its commit.
    """
    series, version = tree_release(tree)
    # That of an alpha tells no more than the series.
    if "-" in version:
        return version
    if (tree / ".git").exists():
        with contextlib.suppress(CommandError):
            day = run(["git", "-C", tree, "log", "-1", "--date=format:%Y%m%d", "--format=%cd"])
            return "%s-%s" % (series, day.strip())
    with contextlib.suppress(FileNotFoundError):
        return re.search(r"^Version: (\S+)", (tree / "PKG-INFO").read_text(), re.MULTILINE)[1]
    return tree.name


class Runner:
    """Runs pytest for rows and modes, until it is told to :meth:`stop`."""

    def __init__(self, arguments):
        self._arguments = arguments
        self._lock = threading.Lock()
        self._running = set()
        self._stopped = False

    def run(self, row, mode):
        """Return the :class:`Result`."""
        report = FOLDER / ("%s-%s.xml" % (row.name, mode))
        with contextlib.suppress(FileNotFoundError):
            report.unlink()
        # The results of many at a time are not what --last-failed is to know.
        options = [*row.options, "--odoo-mode=" + mode, "-p", "no:cacheprovider", "--junitxml=%s" % report]
        began = time.monotonic()
        result = self._try(["tests", *options, *self._arguments], report, log_of(row, mode), row.servers)
        again = [case for case in result.failed if case.count("::") == 1]
        if again and again == result.failed:
            # Real servers on a machine that others use as well may be late once: a second try, by itself.
            once_more = self._try([*map(_path, again), *options], report, log_of(row, mode, "again"), row.servers)
            result = Result(result.passed + once_more.passed, once_more.failed, 0, once_more.passed)
        return result._replace(seconds=time.monotonic() - began)

    def _try(self, arguments, report, log, variables):
        code = self._call([sys.executable, "-m", "pytest", *arguments], log, variables)
        return _read_result(report, code)

    def _call(self, command, log, variables):
        with open(log, "w") as output:
            with self._lock:
                if self._stopped:
                    return None
                # In a session of its own: Ctrl-C reaches us alone, and stop() passes it on once.
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **variables},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                guard.watch(process.pid)
                self._running.add(process)
            try:
                return process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()  # its own guard ends its servers
                process.wait()
                return "none after %d s" % DEADLINE
            finally:
                guard.forget(process.pid)
                with self._lock:
                    self._running.discard(process)

    def stop(self):
        """Have those that run end as Ctrl-C does, and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.send_signal(signal.SIGINT)


def log_of(row, mode, *more):
    return FOLDER / ("-".join([row.name, mode, *more]) + ".log")


def _read_result(report, code):
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (FileNotFoundError, ElementTree.ParseError):
        return Result(0, ["no result of pytest, exit code: %s" % code])
    failed = {_name(case) for case in cases if {"failure", "error"} & {child.tag for child in case}}
    skipped = {_name(case) for case in cases if case.find("skipped") is not None}
    passed = {_name(case) for case in cases} - failed - skipped
    if not failed and (code != 0 or not passed):
        failed = {"%d passed, exit code of pytest: %s" % (len(passed), code)}
    return Result(len(passed), sorted(failed))


def _name(case):
    return "%s::%s" % (case.get("classname"), case.get("name"))


def _path(name):
    """Return what pytest calls a test that has such a name in its report."""
    module, _, test = name.partition("::")
    return "%s.py::%s" % (module.replace(".", "/"), test)


def run_all(rows, jobs, arguments):
    """Run all rows in all modes, ``jobs`` at a time; return the results by row name and mode."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    runner = Runner(arguments)
    results = {}
    # Mode by mode: the first makes the database that the second uses as well.
    cells = [(row, mode) for mode in MODES for row in rows]
    with ThreadPoolExecutor(jobs) as executor:
        try:
            futures = {executor.submit(runner.run, row, mode): (row, mode) for row, mode in cells}
            for count, future in enumerate(as_completed(futures), 1):
                row, mode = futures[future]
                result = results[row.name, mode] = future.result()
                print(
                    "[%d/%d] %s %s (Odoo %s, Python %s): %s in %d s"
                    % (count, len(cells), row.name, mode, row.build.series, row.build.python, result, result.seconds),
                    flush=True,
                )
                if result.failed:
                    lines = [*result.failed, "see %s" % log_of(row, mode)]
                    print("\n".join("    " + line for line in lines), flush=True)
        except BaseException:
            runner.stop()
            raise
    return results


def describe(rows, results):
    """Return the results as text, in RST."""
    table = [
        {
            "series": row.build.series,
            "build": row.version,
            "Python": row.build.python,
            "psycopg2 (libpq)": "%s (%s)" % (row.build.psycopg2, _libpq(row.build)),
            "PostgreSQL": _version(servers.postgres_programs(row.servers.get("POSTGRESQL")) / "postgres"),
            "PgBouncer": _version(servers.pgbouncer_program(row.servers.get("PGBOUNCER"))),
            **{mode: str(results[row.name, mode]) for mode in MODES},
            "seconds": round(sum(results[row.name, mode].seconds for mode in MODES)),
        }
        for row in rows
    ]
    return "Run on %s:\n\n%s\n" % (
        datetime.date.today(),
        tabulate(table, headers="keys", tablefmt="rst", disable_numparse=True),
    )


def _libpq(build):
    number = run_python(build, "from psycopg2 import extensions; print(extensions.libpq_version())")
    return "%d.%d" % (number // 10000, number % 10000)


def _version(program):
    return re.search(r"\d+(\.\d+)+", run([program, "-V"]))[0]


def main():
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", help="folder with source trees of Odoo; default: Debian and git have them")
    parser.add_argument("--jobs", default="2", help="how many run side by side; default: 2")
    options, arguments = parser.parse_known_args()
    try:
        if not re.fullmatch("[1-9][0-9]*", options.jobs):
            raise Refused("JOBS=%s: not a number of 1 or more" % options.jobs)
        newest = newest_servers()
        rows = on_newest_too(find_rows(options.trees), newest)
        results = run_all(rows, int(options.jobs), arguments)
    except Refused as error:
        print("make matrix: %s" % error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    text = describe(rows, results)
    print("\n" + text)
    well = not any(result.failed for result in results.values())
    missing = sorted(set(PYTHONS) - {row.build.series for row in rows})
    reasons = {
        "arguments for pytest": arguments,
        "a choice of servers": not newest,
        "no %s" % ", ".join(missing): missing,
        "failures": not well,
    }
    why = [reason for reason, holds in reasons.items() if holds]
    if why:
        print("docs/%s is left as it was: %s." % (DOCUMENT.name, ", ".join(why)))
    else:
        DOCUMENT.write_text(text)
        print("Written to docs/%s." % DOCUMENT.name)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
