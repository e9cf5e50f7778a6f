"""Programs of the system: installed with apt where they are missing, found where they are.

    python3 -m stack.system PACKAGE... [--later PACKAGE...]

installs packages, as :func:`ensure_packages` does, with nothing but Python's own library.
"""

import argparse
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .commands import CommandError, run, say

#: what Debian's packages are verified with; Ubuntu has it as a package
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# A machine that runs tests must not get two more servers on their default ports, now or before the tests are done.
# policy-rc.d is how Debian lets an administrator say so. Written in sh, since it is to run as root in one go: whatever
# happens to apt or to us, the file goes again; after kill -9 it stays, and allows everything. One of somebody else's
# is left alone.
_INSTALL = r"""
policy=/usr/sbin/policy-rc.d
exec 9< /usr/sbin
flock 9
if [ ! -e $policy ] || grep -q 'tests of bus_alt_connection' $policy; then
    trap 'rm -f $policy' EXIT
    trap 'exit 130' HUP INT TERM
    printf '#!/bin/sh\n# No new services while the tests of bus_alt_connection install packages.\n' > $policy
    printf 'if kill -0 %s 2> /dev/null; then exit 101; fi\n' $$ >> $policy
    chmod 755 $policy
fi
export DEBIAN_FRONTEND=noninteractive
install() {
    apt-get install -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 "$@"
}
# The lists may be missing or out of date, and getting them takes time: only if it does not go without.
install "$@" || { apt-get update -q && install "$@"; }
"""


def ensure_packages(*names, later=()):
    """Install those of the Debian packages that are missing; services they bring are not started.

    PostgreSQL makes itself a cluster ``main`` all the same, which is of no use to us and does no harm.

    :param later: packages that will be wanted after these, where Debian's can be had: who must install them himself is
        told of all at once
    :raise RuntimeError: there is no apt, we may not use it, or it fails; the message says what to do
    """
    missing = [name for name in names if not _is_there(name)]
    if not missing:
        return
    all_missing = missing + [name for name in later if _is_debian() and not _is_there(name)]
    by_hand = "apt-get update && apt-get install --no-install-recommends " + " ".join(all_missing)
    if shutil.which("apt-get") is None:
        raise RuntimeError("this machine has no apt; install what corresponds to: " + by_hand)
    prefix = _as_root(by_hand)
    say("installing %s ..." % ", ".join(missing))
    try:
        run([*prefix, "sh", "-c", _INSTALL, "sh", *missing])
    except CommandError as error:
        raise RuntimeError("%s\nTry it yourself, as root: %s" % (error, by_hand)) from None


def is_installed(package):
    """Return whether the Debian package is installed."""
    try:
        status = run(["dpkg-query", "-W", "-f", "${db:Status-Status}", package])
    except CommandError:
        return False
    return status == "installed"


def _is_there(package):
    # The programs may be there without Debian's package of them.
    return bool(package in _PROGRAMS and _PROGRAMS[package]()) or is_installed(package)


def _is_debian():
    try:
        return "ID=debian" in Path("/etc/os-release").read_text().splitlines()
    except FileNotFoundError:
        return False


def _as_root(by_hand):
    if os.geteuid() == 0:
        return []
    sudo = ["sudo", "-n"]
    if shutil.which("sudo") and subprocess.run([*sudo, "true"], capture_output=True).returncode == 0:
        return sudo
    raise RuntimeError("not root, and no sudo without password; run as root: " + by_hand)


@functools.cache
def postgres_bin():
    """Return the folder with the programs of the newest PostgreSQL server, installing it if there is none."""
    found = _postgres_bin()
    if found is None:
        ensure_packages("postgresql")
        found = _postgres_bin()
    if found is None:
        raise RuntimeError("no PostgreSQL server found: neither in /usr/lib/postgresql nor on PATH")
    return found


def _postgres_bin():
    # Debian keeps the servers of all versions off PATH.
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_major, reverse=True)
    folders += map(Path, os.get_exec_path())
    return next((folder for folder in folders if _is_program(folder / "initdb", folder / "pg_ctl")), None)


def _major(folder):
    return int(re.match(r"\d*", folder.parent.name)[0] or 0)


def _is_program(*paths):
    return all(os.access(path, os.X_OK) for path in paths)


@functools.cache
def pgbouncer_bin():
    """Return the path of the program ``pgbouncer``, installing it if there is none."""
    found = _pgbouncer_bin()
    if found is None:
        ensure_packages("pgbouncer")
        found = _pgbouncer_bin()
    if found is None:
        raise RuntimeError("no pgbouncer found: neither in /usr/sbin nor on PATH")
    return Path(found)


def _pgbouncer_bin():
    # Debian installs it where only root's PATH looks.
    return shutil.which("pgbouncer", path=os.pathsep.join([*os.get_exec_path(), "/usr/sbin", "/usr/local/sbin"]))


_PROGRAMS = {
    # What is fetched from Debian is fetched with apt.
    "debian-archive-keyring": lambda: KEYRING.exists() or shutil.which("apt-get") is None,
    "git": lambda: shutil.which("git"),
    "iproute2": lambda: shutil.which("ip"),
    "pgbouncer": _pgbouncer_bin,
    "postgresql": _postgres_bin,
    # A fresh Debian has python3, but not what makes virtual environments.
    "python3-venv": lambda: importlib.util.find_spec("ensurepip"),
    "util-linux": lambda: shutil.which("unshare"),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("packages", nargs="+")
    parser.add_argument("--later", nargs="*", default=[])
    options = parser.parse_args()
    try:
        ensure_packages(*options.packages, later=options.later)
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
