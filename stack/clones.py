"""Source trees of Odoo by git: one branch without its history, kept in ``.stack/``.

The environment variable ``ODOO_GIT`` names the repository, as ``git clone`` takes it; default: Odoo's public one.
"""

import functools
import os
import re

from .archive import CACHE, kept
from .commands import CommandError, reason, run, say
from .system import ensure_packages

PUBLIC = "https://github.com/odoo/odoo.git"

# It asks nobody for a password, and gives up a server that sends nothing for a minute.
_ENVIRONMENT = {
    "LC_ALL": "C",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_HTTP_LOW_SPEED_LIMIT": "1",
    "GIT_HTTP_LOW_SPEED_TIME": "60",
}


class Unavailable(RuntimeError):
    """The sources of a series can not be had; the message is one line."""

    def __init__(self, series, why):
        super().__init__(
            "Odoo %s can not be had: %s; name a repository that has it in ODOO_GIT, or a source tree (ODOO=/folder; for"
            " tests --odoo /folder)" % (series, why)
        )
        self.series = series
        #: the same for all series where they have it in common
        self.why = why


def clone_folder(series):
    """Return the folder that :func:`find_clone` clones a series into."""
    return CACHE / ("odoo-%s-git" % series)


def find_clone(series):
    """Return the folder of a clone that has the series; it is made if there is none yet.

    :raise Unavailable: the repository can not be reached or does not have it, or git is missing
    """
    return kept(clone_folder(series).name, lambda folder: _clone(series, folder))


def _clone(series, folder):
    address = os.environ.get("ODOO_GIT", "").strip() or PUBLIC
    # Odoo calls its branches "17.0", but "saas-19.1".
    branch = series if series.endswith(".0") else "saas-" + series
    why = _why_unreachable(address)
    if why:
        raise Unavailable(series, why)
    say("getting Odoo %s by git ..." % series)
    # Without --no-local git takes all of the history of a repository on this machine.
    options = ["--quiet", "--depth=1", "--single-branch", "--no-tags", "--no-local", "--branch", branch]
    try:
        _git("clone", *options, "--", address, folder)
    except CommandError as error:
        raise Unavailable(series, "branch %s: %s" % (branch, _without_credentials(reason(error)))) from error


# Once, also if it fails: whoever wants several series is not kept waiting for each.
@functools.cache
def _why_unreachable(address):
    try:
        ensure_packages("git")
        _git("ls-remote", "--heads", "--", address, timeout=60)
    except RuntimeError as error:
        return _without_credentials("%s can not be reached by git: %s" % (address, reason(error)))
    return None


def _git(*arguments, **options):
    run(["git", *arguments], env={**os.environ, **_ENVIRONMENT}, **options)


def _without_credentials(text):
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)
