"""Source trees of Odoo by git: one branch without its history, kept in ``.stack/``.

The environment variable ``ODOO_GIT`` names the repository, as ``git clone`` takes it; default: Odoo's public one.
"""

import os
import re

from .archive import CACHE, kept
from .commands import reason, run, say
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
    say("getting Odoo %s by git ..." % series)
    # Without --no-local git takes all of the history of a repository on this machine.
    options = ["--quiet", "--depth=1", "--single-branch", "--no-tags", "--no-local", "--branch", branch]
    try:
        ensure_packages("git")
        run(["git", "clone", *options, "--", address, folder], env={**os.environ, **_ENVIRONMENT})
    except RuntimeError as error:
        message = (
            "Odoo %s can not be had from %s, branch %s: %s; name a repository that has it in ODOO_GIT, or a source tree"
            " (ODOO=/folder; for tests --odoo /folder)" % (series, address, branch, reason(error))
        )
        # Without the credentials that an address may have.
        raise Unavailable(re.sub(r"(?<=://)[^/@\s]+@", "", message)) from None
