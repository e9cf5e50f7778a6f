"""The programs of PostgreSQL and PgBouncer, installed with apt where they are missing.

The environment variable ``POSTGRESQL`` names the major version of PostgreSQL that is used, one of those that are
installed; default: the newest.
"""

import functools
import os
import shutil
from pathlib import Path

from .system import ensure_packages

# Debian keeps the programs of all versions there, off PATH.
_FOLDER = Path("/usr/lib/postgresql")


def postgres_programs(version=None):
    """Return the folder with the programs of a PostgreSQL, such as ``initdb``.

    :param version: the major one, such as ``"18"``; default: what the environment says
    :raise RuntimeError: it can not be had; the message says why
    """
    version = version or os.environ.get("POSTGRESQL", "").strip()
    if not version:
        return _newest_postgres()
    folder = _FOLDER / version / "bin"
    if not (folder / "initdb").exists():
        raise RuntimeError("there is no PostgreSQL %s in %s; apt.postgresql.org has all versions" % (version, _FOLDER))
    return folder


@functools.cache
def _newest_postgres():
    ensure_packages("postgresql")
    found = sorted(_FOLDER.glob("[0-9]*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    initdb = found[-1] if found else shutil.which("initdb")
    if initdb is None:
        raise RuntimeError("no PostgreSQL server found: neither in %s nor on PATH" % _FOLDER)
    return Path(initdb).parent


@functools.cache
def program(name, package):
    """Return the path of a server's program, installing the Debian package that has it if there is none.

    :raise RuntimeError: it can not be had; the message says why
    """
    # Debian installs servers where only root's PATH looks.
    path = os.pathsep.join([*os.get_exec_path(), "/usr/sbin", "/usr/local/sbin"])
    if shutil.which(name, path=path) is None:
        ensure_packages(package)
    found = shutil.which(name, path=path)
    if found is None:
        raise RuntimeError("no %s found: neither in /usr/sbin nor on PATH" % name)
    return Path(found)
