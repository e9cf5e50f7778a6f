"""A fresh machine of today: ``make demo`` and ``make test`` in minimal systems of Debian, as a newcomer has them.

    python -m tools.fresh [SUITE...]

Needs root. mmdebstrap makes a system in a folder, and removes it at the end. The system has nothing but make and
Python, and gets a new clone of this repository, that is of what is committed. Where apt and pip find packages is taken
from this machine. What the commands print is kept in ``.stack/fresh/``; the last lines are the versions.

In sid the tests of Odyssey and pgpool-II are run as well, which older Debians do not have, or not so new.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from stack.archive import CACHE
from stack.commands import run, say
from stack.debian import find_mirror
from stack.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]
FOLDER = CACHE / "fresh"

_USUAL = "make demo && make test"
SUITES = {
    "bookworm": _USUAL,
    "trixie": _USUAL,
    "sid": _USUAL + " && make test ARGS='tests/odoo/test_poolers.py tests/postgres/test_poolers.py'",
}
# All that README.rst asks for.
_PACKAGES = "make,python3"
_PLACE = "/srv/bus_alt_connection"
# In a namespace for mounts, and one for processes, which end with their first. So nothing of it is left, whatever
# happens. The shell stays the first, as somebody has to see to the processes whose parents have ended.
_ENTER = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc"]
_ENTER += ["sh", "-c", '"$@"; exit $?', "sh"]
_VERSIONS = (
    "echo Debian $(cat /etc/debian_version); python3 -V; /usr/lib/postgresql/*/bin/postgres -V; /usr/sbin/pgbouncer -V"
)
_VARIABLES = re.compile(r"PIP_.*|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|(https?|all|no)_proxy", re.I)
# What says how this machine reaches others. Certificates are those that an administrator has added to Debian's.
_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/xdg/pip", "/usr/local/share/ca-certificates")


def try_system(suite):
    """Run what :data:`SUITES` says in a new system of ``suite``; return the exit code."""
    folder = Path(tempfile.mkdtemp(prefix="fresh-", dir=CACHE))
    # apt downloads as a user of its own.
    folder.chmod(0o755)
    try:
        settings = folder / "apt.conf"
        settings.write_text(apt_settings(run(["apt-config", "dump", "Acquire"])))
        arguments = ["--quiet", "--variant=minbase", "--include=" + _PACKAGES, "--aptopt=%s" % settings]
        arguments += ["--customize-hook=" + hook for hook in hooks(SUITES[suite])]
        command = [*_ENTER, "mmdebstrap", *arguments, suite, "/dev/null", find_mirror()]
        options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "env": {**variables(), "TMPDIR": folder}}
        with open(FOLDER / (suite + ".log"), "w") as log:
            with subprocess.Popen(command, stdout=log, **options) as process:
                try:
                    return process.wait()
                finally:
                    process.kill()
    finally:
        # Those that are just dying may still write into it.
        wait_until(lambda: shutil.rmtree(folder, ignore_errors=True) or not folder.exists(), 60, "%s to go" % folder)


def apt_settings(dump):
    """Return those settings of this machine's apt that say how it downloads, such as its proxy."""
    lines = [line for line in dump.splitlines() if not re.match(r'Acquire::(IndexTargets|Changelogs)\b|.* "";$', line)]
    return "".join(line + "\n" for line in lines)


def hooks(commands):
    """Return the command lines of sh that mmdebstrap runs once there is a system, whose folder is ``$1``."""
    yield 'git clone --quiet --no-hardlinks %s "$1%s"' % (shlex.quote(str(ROOT)), _PLACE)
    # Of files that the variables name it is those that are needed.
    for path in [*_FILES, *filter(os.path.isfile, variables().values())]:
        if os.path.exists(path):
            yield 'cp --recursive --parents %s "$1"' % shlex.quote(path)
    script = "cd %s; %s; code=$?; %s; exit $code" % (_PLACE, commands, _VERSIONS)
    yield 'TMPDIR=/tmp chroot "$1" sh -c %s' % shlex.quote(script)


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
    codes = []
    for suite in suites:
        say("%s: %s ..." % (suite, SUITES[suite]))
        codes.append(try_system(suite))
        print("%s: exit code %d, see %s" % (suite, codes[-1], FOLDER / (suite + ".log")), flush=True)
    return any(codes)


if __name__ == "__main__":
    sys.exit(main())
