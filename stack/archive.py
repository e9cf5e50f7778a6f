"""Folders that take long to make are made once, and kept as tar files in ``.stack/`` of this clone.

Only the archives lie there: a clone may be in a folder that none but root may enter, a PostgreSQL cluster may not.
"""

import fcntl
import shutil
import subprocess
from pathlib import Path

from .process import identity

# Its real place: copies of the clone may share it by a link, and what is in it must not look moved to any of them.
# Resolved, since virtual environments hold the path they were made at.
CACHE = (Path(__file__).resolve().parents[1] / ".stack").resolve()


def kept(name, make):
    """Return the folder called ``name``. If there is none, have it made; it appears when it is complete.

    :param make: function that is given the path of a folder, which it makes; it is called at most once per name and
        clone, unless it fails
    """
    folder = CACHE / name
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / (name + ".lock"), "w") as lock:
        # Other processes that ask for the same name wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = CACHE / (name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


def archived(name, make):
    """Return the archives called ``name``: the path of a tar file for each part. If there are none, have them made.

    :param make: function that returns a context manager, which makes folders and gives the path of each by the name of
        its part
    """

    def archive(folder):
        with make() as parts:
            folder.mkdir()
            for part, path in parts.items():
                subprocess.run(["tar", "-cf", folder / (part + ".tar"), "-C", path, "."], check=True)

    return {path.stem: path for path in kept(name, archive).glob("*.tar")}


def unpack(path, folder, user=None):
    """Unpack an archive into an existing folder, as ``user``, who need not be able to read the archive."""
    with open(path, "rb") as archive:
        subprocess.run(
            ["tar", "-x", "--no-same-owner", "-p", "-f", "-", "-C", folder], stdin=archive, check=True, **identity(user)
        )
