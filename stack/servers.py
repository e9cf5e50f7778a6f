"""PostgreSQL and PgBouncer: those of this machine, or others from Debian's packages, unpacked, not installed.

    with PostgreSQL(programs=postgres_programs("18")) as server:
        ...

Environment variables say which ones all that asks for no other gets:

==============  =====================================================================================
``POSTGRESQL``  major version, one of :data:`POSTGRESQL`; default: the newest that this machine has
``PGBOUNCER``   suite of Debian that has it, one of :data:`PGBOUNCER`; default: the one of this machine
==============  =====================================================================================

The first call for one takes half a minute; what it makes is kept in ``.stack/`` of this clone.
"""

import contextlib
import functools
import os
import shutil
import stat
import tempfile
from pathlib import Path

from . import guard, system
from .archive import CACHE, archived, unpack
from .commands import run, say
from .debian import unpack_packages

#: Major version of PostgreSQL -> the suite of Debian that has it.
POSTGRESQL = {"17": "trixie", "18": "sid", "19": "experimental"}
#: Suites of Debian, the oldest first; each has another PgBouncer.
PGBOUNCER = ("trixie", "sid")
#: The newest released ones, as the environment variables have them.
NEWEST = {"POSTGRESQL": "18", "PGBOUNCER": "sid"}

# Documents and translations; and what compiles queries, which needs a library larger than all the rest.
_NOT_UNPACKED = ("*/share/doc/*", "*/man/*", "*/locale/*", "*/gconv/*", "*/bitcode/*", "*/llvmjit*")

# They want a newer C library than the machine may have. It brings its own loader, which is told where the libraries
# are: in the environment that would reach the programs of the machine as well that PostgreSQL starts. PostgreSQL looks
# for its files from its own name on, so that it has to be told that.
_START = """\
#!/bin/sh
root=${0%%/*}/%(up)s
exec "$root/%(loader)s" --argv0 "$0" --library-path "$root/%(libraries)s" "$root/%(program)s" "$@"
"""


def check(environ=os.environ):
    """See that the environment variables name what there is.

    :raise RuntimeError: one does not; the message is one line
    """
    for variable, known in (("POSTGRESQL", POSTGRESQL), ("PGBOUNCER", PGBOUNCER)):
        value = environ.get(variable, "").strip()
        if value and value not in known:
            raise RuntimeError(
                "%s=%s: Debian's packages have %s; leave it out for that of this machine"
                % (variable, value, ", ".join(known))
            )


def postgres_programs(version=None):
    """Return the folder with the programs of a PostgreSQL, such as ``initdb``; they run where they are.

    It lasts as long as this process.

    :param version: the major one, such as ``"18"``; default: what the environment says
    :raise RuntimeError: it can not be had; the message says why
    """
    version = version or _chosen("POSTGRESQL")
    if not version:
        return system.postgres_bin()
    if version not in POSTGRESQL:
        raise RuntimeError(
            "no suite of Debian is known to have PostgreSQL %s (but %s)" % (version, ", ".join(POSTGRESQL))
        )
    packages = ("postgresql-" + version, "postgresql-client-" + version, "libpq5")
    return unpacked_program(POSTGRESQL[version], packages, "usr/lib/postgresql/%s/bin/postgres" % version).parent


def pgbouncer_program(suite=None):
    """Return the path of a PgBouncer, which runs where it is; see :func:`postgres_programs`.

    :param suite: of Debian, such as ``"sid"``; default: what the environment says
    :raise RuntimeError: it can not be had; the message says why
    """
    suite = suite or _chosen("PGBOUNCER")
    if not suite:
        return system.pgbouncer_bin()
    return unpacked_program(suite, ("pgbouncer",), "usr/sbin/pgbouncer")


def _chosen(variable):
    check()
    return os.environ.get(variable, "").strip()


@functools.cache
def unpacked_program(suite, packages, program):
    """Return the path of a program of Debian's packages, which runs where it is, as those beside it do.

    It lasts as long as this process.

    :param suite: such as ``"sid"``
    :param packages: a tuple of names; the libraries that they need come by themselves
    :param program: its path within the packages
    :raise RuntimeError: it can not be had; the message says why
    """
    name = "%s-%s" % (packages[0], suite)
    archive = archived(name + "-programs", lambda: _download(suite, packages, program))["programs"]
    # The server's user may not be able to enter the folder of this clone.
    folder = Path(tempfile.mkdtemp(prefix="bus_alt_connection-%s-" % name))
    guard.watch(folder)
    folder.chmod(0o755)
    unpack(archive, folder)
    return folder / program


@contextlib.contextmanager
def _download(suite, packages, program):
    say("downloading %s of Debian %s ..." % (packages[0], suite))
    with tempfile.TemporaryDirectory(prefix=packages[0] + "-", dir=CACHE) as scratch:
        folder = Path(scratch) / "unpacked"
        unpack_packages(suite, packages, folder, _NOT_UNPACKED, libraries=True)
        programs = (folder / program).parent
        (loader,) = folder.glob("usr/lib/*-linux-gnu*/ld-linux*")
        shutil.move(programs, programs.with_name("programs"))
        programs.mkdir()
        for one in programs.with_name("programs").iterdir():
            _write_start(programs / one.name, one, loader, folder)
        run([folder / program, "--version"])
        yield {"programs": folder}


def _write_start(path, program, loader, root):
    places = {
        "up": os.path.relpath(root, path.parent),
        "loader": loader.relative_to(root),
        "libraries": loader.parent.relative_to(root),
        "program": program.relative_to(root),
    }
    path.write_text(_START % places)
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
