"""A fresh machine of today: ``make demo`` and ``make test`` in minimal systems of Debian, as a newcomer has them.

    python -m tools.fresh [SUITE...]

Needs root. A system is unpacked into a folder, has nothing but make and Python, and gets a new clone of this
repository, that is of what is committed. Where apt and pip find packages is taken from this machine. What the commands
print is kept in ``.stack/fresh/``. A run of all suites in which nothing failed is written to ``docs/fresh.rst``.

In sid the tests of Odyssey and pgpool-II are run as well, which older Debians do not have, or not so new.
"""

import argparse
import contextlib
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

from stack import guard
from stack.archive import CACHE
from stack.commands import run, say
from stack.debian import find_mirror
from stack.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]
FOLDER = CACHE / "fresh"
DOCUMENT = ROOT / "docs" / "fresh.rst"

SUITES = ("bookworm", "trixie", "sid")
COMMANDS = {"make demo": "make demo", "make test": "make test"}
IN_SID = {"poolers": "make test ARGS='tests/odoo/test_poolers.py tests/postgres/test_poolers.py'"}
# Seconds for one command, all that it installs included.
DEADLINE = 3600

# All that README.rst asks for.
_PACKAGES = "make,python3"
_PLACE = "srv/bus_alt_connection"
# In a namespace for mounts, and one for processes, which end with their first. So nothing of it is left, whatever
# happens to us. The shell stays the first, as somebody has to see to the processes whose parents have ended.
_ENTER = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "sh", "-eu", "-c"]
_INSIDE = """
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
code=0
chroot "$@" || code=$?
exit $code
"""
_VARIABLES = re.compile(r"PIP_.*|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|(https?|all|no)_proxy", re.I)
# What says how this machine reaches others. Certificates are those that an administrator has added to Debian's.
_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/xdg/pip", "/usr/local/share/ca-certificates")
_VERSIONS = {
    "system": "echo Debian $(cat /etc/debian_version)",
    "Python": "python3 -V",
    "PostgreSQL": "/usr/lib/postgresql/*/bin/postgres -V",
    "PgBouncer": "/usr/sbin/pgbouncer -V",
}


@contextlib.contextmanager
def system(suite):
    """Yield the folder of a minimal system of a suite of Debian; it goes with the context."""
    folder = Path(tempfile.mkdtemp(prefix="bus_alt_connection-fresh-", dir=CACHE))
    guard.watch(folder)
    folder.chmod(0o755)
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as settings:
            settings.write(apt_settings(run(["apt-config", "dump", "Acquire"])))
            settings.flush()
            options = ["--variant=minbase", "--include=" + _PACKAGES, "--aptopt=" + settings.name]
            run(["mmdebstrap", "--quiet", *options, suite, folder, find_mirror()])
        run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, folder / _PLACE])
        # Of files that the variables name it is those that are needed.
        for path in [*_FILES, *filter(os.path.isfile, variables().values())]:
            if os.path.exists(path):
                run(["cp", "--recursive", "--parents", path, folder])
        yield folder
    finally:
        # Those that are just dying may still write into it.
        wait_until(lambda: shutil.rmtree(folder, ignore_errors=True) or not folder.exists(), 60, "%s to go" % folder)
        guard.forget(folder)


def apt_settings(dump):
    """Return those settings of this machine's apt that say how it downloads, such as its proxy."""
    lines = [line for line in dump.splitlines() if not re.match(r'Acquire::(IndexTargets|Changelogs)\b|.* "";$', line)]
    return "".join(line + "\n" for line in lines)


def variables():
    """Return the environment of the commands in a system."""
    usual = {"HOME": "/root", "LANG": "C.UTF-8", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"}
    return {**{name: value for name, value in os.environ.items() if _VARIABLES.fullmatch(name)}, **usual}


def call(folder, command, output):
    """Run a command line of sh in the clone in a system; return its exit code, None after :data:`DEADLINE` seconds."""
    inside = [_INSIDE, "sh", folder, "sh", "-c", "cd /%s && %s" % (_PLACE, command)]
    options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "env": variables(), "timeout": DEADLINE}
    with open(output, "w") as log, contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run([*_ENTER, *inside], stdout=log, **options).returncode


def try_system(suite):
    """Run all in a new system; return a row of the table, by the names of its columns, and whether all was well."""
    say("%s: making a minimal system ..." % suite)
    with system(suite) as folder:
        outcomes, well = {}, True
        for name, command in {**COMMANDS, **(IN_SID if suite == "sid" else {})}.items():
            say("%s: %s ..." % (suite, command))
            log = FOLDER / ("%s-%s.log" % (suite, name.replace(" ", "-")))
            began = time.monotonic()
            code = call(folder, command, log)
            outcomes[name] = "%s in %.0f s" % (told(log.read_text(), code), time.monotonic() - began)
            print("%s: %s: %s, see %s" % (suite, command, outcomes[name], log), flush=True)
            well = well and code == 0
        versions = {}
        for name, command in _VERSIONS.items():
            call(folder, command, FOLDER / "version")
            versions[name] = re.search(r"Debian .*|\d+(\.\d+)+|$", (FOLDER / "version").read_text())[0]
        return {**versions, **outcomes}, well


def told(printed, code):
    """Return what a command came to: what pytest counted, or else its exit code."""
    counts = re.findall(r"^=+ (.*\b(?:passed|failed|error)\w*\b.*?)(?: in [\d.]+s.*)? =+$", printed, re.MULTILINE)
    if counts:
        return counts[-1]
    return "OK" if code == 0 else "exit code %s" % code


def main():
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="of Debian; default: %s" % ", ".join(SUITES))
    suites = parser.parse_args().suites or SUITES
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        if os.geteuid() != 0:
            raise RuntimeError("only root can make a system in a folder")
        systems = [try_system(suite) for suite in suites]
    except RuntimeError as error:
        print("make fresh: %s" % error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    rows, well = [row for row, _well in systems], all(well for _row, well in systems)
    text = "Run on %s in minimal systems; the seconds include all that is downloaded and installed:\n\n%s\n" % (
        datetime.date.today(),
        tabulate(rows, headers="keys", tablefmt="rst", disable_numparse=True),
    )
    print("\n" + text)
    if well and set(SUITES) <= set(suites):
        DOCUMENT.write_text(text)
        print("Written to docs/%s." % DOCUMENT.name)
    else:
        print("docs/%s is left as it was: %s." % (DOCUMENT.name, "not all suites" if well else "failures"))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
