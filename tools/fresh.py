"""A fresh machine of today: ``make demo`` and ``make test`` in minimal systems of Debian, as a newcomer has them.

    python -m tools.fresh [SUITE...]

Needs root. mmdebstrap makes a system in a folder, and removes it at the end. The system has nothing but make and
Python, and gets a new clone of this repository, that is of what is committed. Where apt and pip find packages is taken
from this machine. What the commands print is kept in ``.stack/fresh/``. The table at the end is for ``docs/fresh.rst``.

In sid the tests of Odyssey and pgpool-II are run as well, which older Debians do not have, or not so new.
"""

import argparse
import datetime
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tabulate import tabulate

from stack.archive import CACHE
from stack.commands import say
from stack.debian import find_mirror, minimal_system
from stack.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]
FOLDER = CACHE / "fresh"

_USUAL = "time make demo && time make test"
SUITES = {
    "bookworm": _USUAL,
    "trixie": _USUAL,
    "sid": _USUAL + " && make test ARGS=tests/odoo/test_poolers.py",
}
# All that README.rst asks for. Sid's python3 is 3.14, which Odoo 19.0 does not run on.
_PACKAGES = {"bookworm": "make,python3", "trixie": "make,python3", "sid": "make,python3,python3.13-venv"}
_PLACE = "/srv/bus_alt_connection"
# In a namespace for mounts, and one for processes, which end with their first. So nothing of it is left, whatever
# happens. The shell stays the first, as somebody has to see to the processes whose parents have ended.
_ENTER = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc"]
_ENTER += ["sh", "-c", '"$@"; exit $?', "sh"]
_VERSIONS = (
    "echo Debian $(cat /etc/debian_version); python3 -V; /usr/lib/postgresql/*/bin/postgres -V; /usr/sbin/pgbouncer -V"
)
# What the log has of them, at its end.
_VERSION = {
    "system": r"^(Debian \S+)$",
    "Python": r"^Python (\S+)$",
    "PostgreSQL": r"^postgres \(PostgreSQL\) (\S+)",
    "PgBouncer": r"^PgBouncer (\S+)$",
}
_VARIABLES = re.compile(r"PIP_.*|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|(https?|all|no)_proxy", re.I)
# What says how this machine reaches others. Certificates are those that an administrator has added to Debian's.
_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/xdg/pip", "/usr/local/share/ca-certificates")


def try_system(suite):
    """Run what :data:`SUITES` says in a new system of ``suite``; return a row of the table."""
    folder = Path(tempfile.mkdtemp(prefix="fresh-", dir=CACHE))
    # apt downloads as a user of its own.
    folder.chmod(0o755)
    try:
        command = [*_ENTER, *minimal_system(_PACKAGES[suite], folder / "apt.conf")]
        command += [*("--customize-hook=" + hook for hook in hooks(SUITES[suite])), suite, "/dev/null", find_mirror()]
        options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "env": {**variables(), "TMPDIR": folder}}
        log_path = FOLDER / (suite + ".log")
        with open(log_path, "w") as log, subprocess.Popen(command, stdout=log, **options) as process:
            try:
                code = process.wait()
            finally:
                process.kill()
        return row(log_path.read_text(errors="replace"), code)
    finally:
        # Those that are just dying may still write into it.
        wait_until(lambda: shutil.rmtree(folder, ignore_errors=True) or not folder.exists(), 60, "%s to go" % folder)


def row(log, code):
    """Return a row of the table, by the names of its columns: what the log tells, and the result."""
    versions = {column: re.findall(pattern, log, re.MULTILINE)[-1:] for column, pattern in _VERSION.items()}
    seconds = re.findall(r"^took (\d+) s$", log, re.MULTILINE)
    return {
        **{column: "".join(found) for column, found in versions.items()},
        **dict(zip(("make demo, s", "make test, s"), [*seconds, "", ""])),
        "result": "exit code %d" % code if code else "OK",
    }


def hooks(commands):
    """Return the command lines that mmdebstrap runs once there is a system, whose folder is ``$1``."""
    yield 'git clone --quiet --no-hardlinks %s "$1%s"' % (shlex.quote(str(ROOT)), _PLACE)
    # Of files that the variables name it is those that are needed.
    for path in [*_FILES, *filter(os.path.isfile, variables().values())]:
        if os.path.exists(path):
            yield 'cp --recursive --parents %s "$1"' % shlex.quote(path)
    script = "TIMEFORMAT='took %%0R s'; cd %s; %s; code=$?; %s; exit $code" % (_PLACE, commands, _VERSIONS)
    yield 'TMPDIR=/tmp chroot "$1" bash -c %s' % shlex.quote(script)


def variables():
    """Return the environment of the commands in a system."""
    usual = {"HOME": "/root", "LANG": "C.UTF-8", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    return {**{name: value for name, value in os.environ.items() if _VARIABLES.fullmatch(name)}, **usual}


def main():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="of Debian; default: %s" % ", ".join(SUITES))
    suites = parser.parse_args().suites or list(SUITES)
    if os.geteuid() != 0:
        parser.error("only root can make a system in a folder")
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = []
    for suite in suites:
        say("%s: %s, see %s ..." % (suite, SUITES[suite], FOLDER / (suite + ".log")))
        rows.append(try_system(suite))
    print("Run on %s:\n" % datetime.date.today())
    print(tabulate(rows, headers="keys", tablefmt="rst", disable_numparse=True))
    return any(found["result"] != "OK" for found in rows)


if __name__ == "__main__":
    sys.exit(main())
