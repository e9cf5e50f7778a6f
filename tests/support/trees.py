"""What looks like a source tree of Odoo, and git for it."""

import os
from pathlib import Path

from stack.commands import run
from stack.system import ensure_packages

#: what is in the folder of a module, as far as anybody looks
MODULES = {
    "base": ["__init__.py", "__manifest__.py"],
    "web": ["__init__.py", "__manifest__.py"],
    "bus": ["__init__.py", "__manifest__.py", "models/bus.py"],
}


def make_tree(folder, series="15.0", version=None, addons="addons"):
    """Make one, as a clone has its files, and return its path.

    :param addons: where all modules but ``base`` are
    """
    folder = Path(folder)
    release = "series = %r\nversion = %r\n" % (series, version or series)
    for name, text in [("odoo-bin", ""), ("odoo/release.py", release)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    add_modules(folder / "odoo" / "addons", "base")
    add_modules(folder / addons, "web", "bus")
    return folder


def add_modules(addons, *names):
    for name in names:
        for file in MODULES[name]:
            (addons / name / file).parent.mkdir(parents=True, exist_ok=True)
            (addons / name / file).touch()


def git(folder, *arguments, **variables):
    """Run git in a folder, not as this machine's owner likes it, and return what it prints."""
    ensure_packages("git")
    environ = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for role in "AUTHOR", "COMMITTER":
        environ.update({"GIT_%s_NAME" % role: "Odoo", "GIT_%s_EMAIL" % role: "odoo@localhost"})
    return run(["git", "-C", folder, *arguments], env={**os.environ, **environ, **variables}).strip()


def commit(folder, **variables):
    """Commit all that is in a folder, be it nothing new."""
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "x", **variables)
