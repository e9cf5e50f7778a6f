"""A fresh machine of today: ``make demo`` and ``make unit`` in minimal systems of Debian, as a newcomer has them.

    python -m tools.fresh [SUITE...]

Needs root. A system is unpacked into a folder, has nothing but make and Python, and gets a new clone of this
repository, that is of what is committed. Where apt and pip find packages is taken from this machine. What the commands
print is kept in ``.stack/fresh/``. A run of all suites in which nothing failed is written to ``docs/fresh.rst``.
"""

import argparse
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
from typing import NamedTuple

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
COMMANDS = ("demo", "unit")
# Seconds for one command, all that it installs included.
DEADLINE = 3600

# All that README.rst asks for.
_PACKAGES = "make,python3"
_PLACE = "/srv/bus_alt_connection"
_TEMPORARY = "bus_alt_connection-fresh-"
# In a namespace for mounts, and one for processes, which end with their first. So nothing of it is left, whatever
# happens to us. The shell stays the first, as somebody has to see to the processes whose parents have ended.
_ENTER = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "sh", "-eu", "-c"]
_INSIDE = """
root=$1; bound=$2; shift 2
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for path in $bound; do mount --rbind -o ro "$path" "$root$path"; done
code=0
chroot "$root" "$@" || code=$?
exit $code
"""
_ENVIRONMENT = re.compile(r"(PIP|UV)_.*|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|(https?|all|no)_proxy", re.I)
# Where an administrator puts certificates that Debian is to trust as well.
_CERTIFICATES = "/usr/local/share/ca-certificates"
# In the settings of pip. An index refers to files beside it, so that the folder that it is in is wanted.
_PATH = re.compile(r"(?<![\w:/.-])(/[^\s'\",]+)")
_INDEX = re.compile(r"file://(/[^\s'\",]+)/")
_FACTS = {
    "system": "echo Debian $(cat /etc/debian_version)",
    "Python": "python3 -V",
    "of Odoo": ".stack/venv-19.0-py*/bin/python -V",
    "PostgreSQL": "/usr/lib/postgresql/*/bin/postgres -V",
    "PgBouncer": "/usr/sbin/pgbouncer -V",
}


class Result(NamedTuple):
    """What came of one command."""

    told: str  # such as "893 passed"
    well: bool
    seconds: float


class System:
    """A minimal system of a suite of Debian in a folder; a context manager, the folder goes with it."""

    def __init__(self, suite):
        self.suite = suite

    def __enter__(self):
        self._folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=CACHE))
        guard.watch(self._folder)
        self._folder.chmod(0o755)
        try:
            self._install()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception):
        # Those that are just dying may still write into it.
        wait_until(self._remove, 30, "%s to be removed" % self._folder)
        guard.forget(self._folder)

    def _remove(self):
        shutil.rmtree(self._folder, ignore_errors=True)
        return not self._folder.exists()

    def _install(self):
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as settings:
            settings.write(apt_settings(run(["apt-config", "dump", "Acquire"])))
            settings.flush()
            options = ["--variant=minbase", "--include=" + _PACKAGES, "--aptopt=" + settings.name]
            code, printed = _run(["mmdebstrap", "--quiet", *options, self.suite, str(self._folder), find_mirror()])
        if code != 0:
            raise RuntimeError("no minimal system of %s can be made\n%s" % (self.suite, printed))
        run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, self._inside(_PLACE)])
        self.environment, files, self._bound = of_this_machine(os.environ, _pip_settings())
        for path in files:
            self._inside(path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, self._inside(path))
        for path in self._bound:
            self._inside(path).mkdir(parents=True, exist_ok=True)

    def _inside(self, path):
        return self._folder / str(path).lstrip("/")

    def run(self, command, output=subprocess.PIPE):
        """Run a command line of sh in the clone; see :func:`_run`."""
        inside = ["env", "-i", *self.environment, "sh", "-c", "cd %s && %s" % (_PLACE, command)]
        return _run([*_ENTER, _INSIDE, "sh", str(self._folder), " ".join(self._bound), *inside], output)


def _run(command, output=subprocess.PIPE):
    """Run a program; return its exit code, and what it printed if ``output`` is left out.

    It ends after ``DEADLINE`` seconds, its exit code is None then; or with us, in whatever way.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    guard.watch(process.pid)
    try:
        printed, _none = process.communicate(timeout=DEADLINE)
        return process.returncode, printed
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        guard.forget(process.pid)


def apt_settings(dump):
    """Return those settings of this machine's apt that say how it downloads, such as its proxy."""
    lines = [line for line in dump.splitlines() if not re.match(r'Acquire::(IndexTargets|Changelogs)\b|.* "";$', line)]
    return "".join(line + "\n" for line in lines)


def of_this_machine(environ, pip):
    """Return what a system needs of this one to reach what this one reaches.

    :param pip: what pip tells of its settings
    :return: its environment, as ``name=value``; files to be copied; and folders to be there as well
    """
    chosen = {name: value for name, value in environ.items() if _ENVIRONMENT.fullmatch(name)}
    text = "\n".join([pip, *chosen.values()])
    found = [*_PATH.findall(text), *_INDEX.findall(text), "/etc/resolv.conf", "/etc/hosts", _CERTIFICATES]
    ours = [path for path in map(Path, dict.fromkeys(found)) if path.exists() and CACHE not in path.parents]
    # pip looks for its settings there.
    usual = {"HOME": str(Path.home()), "LANG": "C.UTF-8", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"}
    environment = ["%s=%s" % item for item in {**chosen, **usual}.items()]
    return environment, [path for path in ours if path.is_file()], [str(path) for path in ours if path.is_dir()]


def _pip_settings():
    pip = [sys.executable, "-m", "pip", "config"]
    # The files, and what is in them.
    return run([*pip, "debug"]) + run([*pip, "list"])


def try_system(suite):
    """Run all in a new system; return the facts on it by name, and the results by command."""
    say("%s: making a minimal system ..." % suite)
    with System(suite) as system:
        results = {}
        for command in COMMANDS:
            say("%s: make %s ..." % (suite, command))
            log = FOLDER / ("%s-%s.log" % (suite, command))
            began = time.monotonic()
            with open(log, "w") as output:
                code, _nothing = system.run("make " + command, output)
            result = results[command] = Result(told(log.read_text(), code), code == 0, time.monotonic() - began)
            print("%s: make %s: %s in %d s" % (suite, command, result.told, result.seconds), flush=True)
            if not result.well:
                print("\n".join("    " + line for line in [*log.read_text().splitlines()[-10:], "see %s" % log]))
        return {name: fact(*system.run(line)) for name, line in _FACTS.items()}, results


def told(printed, code):
    """Return what a command came to, as its last lines say; its exit code if they say nothing."""
    counts = re.findall(r"^=* ?((?:\d+ \w+, )*\d+ (?:passed|failed|error)\w*.*?)(?: in .*)?$", printed, re.MULTILINE)
    if counts:
        return counts[-1]
    return "OK" if code == 0 else "exit code %s" % code


def fact(code, printed):
    """Return the version in what a program prints, or all of it if there is none; "-" if it failed."""
    if code:
        return "-"
    text = printed.splitlines()[0]
    return text if text.startswith("Debian ") else re.search(r"\d+(\.\d+)+|$", text)[0] or text


def describe(systems):
    """Return as text, in RST, what :func:`try_system` has returned for each."""
    table = [
        {
            **facts,
            **{"make " + command: result.told for command, result in results.items()},
            "seconds": " + ".join("%.0f" % result.seconds for result in results.values()),
        }
        for facts, results in systems
    ]
    return "Run on %s in minimal systems, with all that the two commands download and install:\n\n%s\n" % (
        datetime.date.today(),
        tabulate(table, headers="keys", tablefmt="rst", disable_numparse=True),
    )


def main():
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="of Debian; default: %s" % ", ".join(SUITES))
    suites = parser.parse_args().suites or SUITES
    if os.geteuid() != 0:
        print("make fresh: only root can make a system in a folder", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        systems = [try_system(suite) for suite in suites]
    except RuntimeError as error:
        print("make fresh: %s" % error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    text = describe(systems)
    print("\n" + text)
    well = all(result.well for _facts, results in systems for result in results.values())
    if well and set(SUITES) <= set(suites):
        DOCUMENT.write_text(text)
        print("Written to docs/%s." % DOCUMENT.name)
    else:
        print("docs/%s is left as it was: %s." % (DOCUMENT.name, "not all suites" if well else "failures"))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
