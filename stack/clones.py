"""Source trees of Odoo by git: one branch without its history, kept in ``.stack/``.

The environment variable ``ODOO_GIT`` names the repository, as ``git clone`` takes it; default: Odoo's public one.
"""

import contextlib
import functools
import os
import re
import select
import shutil
import signal
import subprocess
import sys

from . import guard
from .archive import CACHE, locked
from .commands import CommandError, reason, say
from .system import ensure_packages
from .trees import read_tree

VARIABLE = "ODOO_GIT"
PUBLIC = "https://github.com/odoo/odoo.git"

# Seconds without a word. git itself waits for minutes, or for ever, for a host that swallows what it is sent. The
# list of branches comes at once; in a clone the server, and a slow disk, may be quiet for a while.
_PATIENCE_BRANCHES = 30
_PATIENCE_CLONE = 60

# In .git of a clone: which repository it is from.
_ORIGIN = "bus_alt_connection_origin"


class Unavailable(RuntimeError):
    """The sources of a series can not be had; the message is one line."""

    def __init__(self, series, why):
        super().__init__(
            "Odoo %s can not be had: %s; name a repository that has it in %s, or a source tree (ODOO=/folder; for tests"
            " --odoo /folder)" % (series, why, VARIABLE)
        )
        self.series = series
        #: the same for all series where they have it in common
        self.why = why


def find_clone(series):
    """Return the folder of a clone that has the series, made now if there is none yet.

    One that is there is taken as it is, and nobody is asked; but if ``ODOO_GIT`` names another repository than that
    which it is from, it is replaced.

    :raise Unavailable: the repository can not be reached or does not have it, or git is missing
    """
    folder = _folder(series)
    with locked(folder.name):
        if not is_cloned(series):
            _clone(series, folder)
    return folder


def is_cloned(series):
    """Return whether :func:`find_clone` has one, from the repository that is asked for."""
    try:
        origin = (_folder(series) / ".git" / _ORIGIN).read_text()
    except FileNotFoundError:
        return False
    return not _named() or origin == _address()


def branch(series):
    """Return what Odoo calls the branch of a series: "17.0", but "saas-19.1"."""
    return series if series.endswith(".0") else "saas-" + series


def _folder(series):
    return CACHE / ("odoo-%s-git" % series)


def _named():
    return os.environ.get(VARIABLE, "").strip()


def _address():
    address = _named() or PUBLIC
    return os.path.abspath(address) if os.path.isdir(address) else address


def _clone(series, folder):
    address = _address()
    branches, why = _branches(address)
    if branches is None:
        raise Unavailable(series, why)
    if branch(series) not in branches:
        raise Unavailable(series, "%s has no branch of it" % _shown(address))
    origin = "branch %s of %s" % (branch(series), _shown(address))
    say("getting Odoo %s by git, %s ..." % (series, origin))
    # Whatever was interrupted is under the other name.
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    # Without --no-local git takes all of the history of a repository on this machine.
    options = ["--progress", "--depth=1", "--single-branch", "--no-tags", "--no-local", "--branch", branch(series)]
    try:
        _git(_PATIENCE_CLONE, "clone", *options, "--", address, unfinished)
        tree = read_tree(unfinished)
        if tree.series != series:
            raise RuntimeError("it has Odoo %s" % tree.series)
        (unfinished / ".git" / _ORIGIN).write_text(address)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    except RuntimeError as error:
        raise Unavailable(series, "%s: %s" % (origin, _shown(reason(error)))) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    say("got Odoo %s: %s" % (series, folder))


# Once, also if it fails: whoever wants several series is not kept waiting for each.
@functools.cache
def _branches(address):
    """Return the names of all branches, and None; or None, and why the repository can not be asked."""
    try:
        ensure_packages("git")
        printed = _git(_PATIENCE_BRANCHES, "ls-remote", "--heads", "--", address)
    except RuntimeError as error:
        why = re.sub(r"^unable to access '.*?': ", "", reason(error))
        return None, "%s can not be reached by git: %s" % (_shown(address), _shown(why))
    return set(re.findall(r"^[0-9a-f]+\trefs/heads/(.+)$", printed, re.MULTILINE)), None


def _git(patience, *arguments):
    """Run git and return all that it prints; on a terminal it is shown as well, for the progress.

    :raise CommandError: it failed, or printed nothing for ``patience`` seconds
    """
    process = subprocess.Popen(
        ["git", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # In English, for reason(); and it asks nobody for a password.
        env={**os.environ, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"},
        # git's helpers, which do the transport, outlive it otherwise.
        start_new_session=True,
    )
    guard.watch(process.pid)
    try:
        printed = b""
        while True:
            if not select.select([process.stdout], [], [], patience)[0]:
                raise CommandError("nothing has come for %g s" % patience)
            some = os.read(process.stdout.fileno(), 65536)
            if not some:
                break
            printed += some
            if "--progress" in arguments and sys.stderr.isatty():
                sys.stderr.buffer.write(some)
                sys.stderr.flush()
        if process.wait():
            raise CommandError(printed.decode("utf-8", "replace"))
        return printed.decode("utf-8", "replace")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        guard.forget(process.pid)


def _shown(text):
    """Return it without the credentials that an address may have."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)
