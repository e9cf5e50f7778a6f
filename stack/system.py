"""Packages of the system, installed with apt where they are missing.

    python3 -m stack.system PACKAGE...

installs packages, as :func:`ensure_packages` does, with nothing but Python's own library.
"""

import glob
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .commands import CommandError, run, say

#: what Debian's packages are verified with; Ubuntu has it as a package
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_INSTALL = Path(__file__).with_name("install.sh")

# What may be there without Debian's package of it.
_PRESENT = {
    "debian-archive-keyring": KEYRING.exists,
    "git": lambda: shutil.which("git"),
    "iproute2": lambda: shutil.which("ip"),
    "pgbouncer": lambda: shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"),
    "postgresql": lambda: shutil.which("initdb") or glob.glob("/usr/lib/postgresql/*/bin/initdb"),
    # A fresh Debian has python3, but not what makes virtual environments.
    "python3-venv": lambda: importlib.util.find_spec("ensurepip"),
}


def ensure_packages(*names):
    """Install those of the Debian packages that are missing; services they bring are not started.

    PostgreSQL makes itself a cluster ``main`` all the same, which is of no use to us and does no harm.

    :raise RuntimeError: there is no apt, we may not use it, or it fails; the message says what to do
    """
    missing = [name for name in names if not _is_there(name)]
    if not missing:
        return
    by_hand = "apt-get update && apt-get install --no-install-recommends " + " ".join(missing)
    if shutil.which("apt-get") is None:
        raise RuntimeError("this machine has no apt; install what corresponds to: " + by_hand)
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if sudo and not (shutil.which("sudo") and subprocess.run([*sudo, "true"], capture_output=True).returncode == 0):
        raise RuntimeError("not root, and no sudo without password; run as root: " + by_hand)
    say("installing %s ..." % ", ".join(missing))
    try:
        run([*sudo, "sh", _INSTALL, *missing])
    except CommandError as error:
        raise RuntimeError("%s\nTry it yourself, as root: %s" % (error, by_hand)) from None


def _is_there(package):
    if package in _PRESENT and _PRESENT[package]():
        return True
    try:
        return run(["dpkg-query", "-W", "-f", "${db:Status-Status}", package]) == "installed"
    except CommandError:
        return False


def main():
    try:
        ensure_packages(*sys.argv[1:])
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
