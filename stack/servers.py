"""Other versions of PostgreSQL than the one of this machine: from Debian's packages, unpacked, not installed.

    with PostgreSQL(programs=server_programs("18")) as server:
        ...

The first call for a version takes half a minute; what it makes is kept in ``.stack/`` of this clone.
"""

import contextlib
import functools
import os
import shutil
import stat
import tempfile
from pathlib import Path

from . import guard
from .archive import CACHE, archived, unpack
from .commands import run, say
from .debian import unpack_packages

#: Version -> the suite of Debian that has it.
SUITES = {"17": "trixie", "18": "sid", "19": "experimental"}

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


@functools.cache
def server_programs(version):
    """Return the folder with the programs of a major version of PostgreSQL, such as ``"18"``; they run where they are.

    It lasts as long as this process.

    :raise RuntimeError: it can not be had; the message says why
    """
    if version not in SUITES:
        raise RuntimeError("no suite of Debian is known to have PostgreSQL %s (but %s)" % (version, ", ".join(SUITES)))
    archive = archived("postgresql-%s-programs" % version, lambda: _unpacked(version))["programs"]
    # The server's user may not be able to enter the folder of this clone.
    folder = Path(tempfile.mkdtemp(prefix="bus_alt_connection-postgresql-%s-" % version))
    guard.watch(folder)
    folder.chmod(0o755)
    unpack(archive, folder)
    return folder / _programs(version)


def _programs(version):
    return Path("usr", "lib", "postgresql", version, "bin")


@contextlib.contextmanager
def _unpacked(version):
    say("downloading PostgreSQL %s from Debian ..." % version)
    with tempfile.TemporaryDirectory(prefix="postgresql-", dir=CACHE) as scratch:
        folder = Path(scratch) / "unpacked"
        packages = ["postgresql-" + version, "postgresql-client-" + version, "libpq5"]
        unpack_packages(SUITES[version], packages, folder, _NOT_UNPACKED, libraries=True)
        programs = folder / _programs(version)
        (loader,) = folder.glob("usr/lib/*-linux-gnu*/ld-linux*")
        shutil.move(programs, programs.with_name("programs"))
        programs.mkdir()
        for program in programs.with_name("programs").iterdir():
            _write_start(programs / program.name, program, loader, folder)
        run([programs / "postgres", "-V"])
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
