"""Odoo, ready to run: from Debian's packages, by git or from a source tree, with the Python packages that it needs.

    build = find_build("19.0")
    subprocess.run([*build.command, "--version"], env={**os.environ, **build.env})

The first call for a series takes a minute or two; what it makes is kept in ``.stack/`` of this clone.
"""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

from .archive import kept
from .clones import clone_folder, find_clone
from .commands import CommandError, reason, run, say
from .debian import package_versions, unpack_packages
from .pythons import find_environment
from .trees import Tree, read_tree

#: The versions of Python that run a series, the best first.
PYTHONS = {
    "12.0": ("3.7", "3.6"),
    "13.0": ("3.7", "3.8", "3.6"),
    "14.0": ("3.9", "3.8", "3.7"),
    "15.0": ("3.9", "3.8"),
    "16.0": ("3.11", "3.10"),
    "17.0": ("3.11", "3.12", "3.10"),
    "18.0": ("3.12", "3.11", "3.13", "3.10"),
    "19.0": ("3.12", "3.13", "3.11", "3.10"),
    "19.1": ("3.12", "3.13"),
    "20.0": ("3.12", "3.13"),
}

#: The series that Debian has: suite, and packages. Debian's package of Odoo has links to some libraries of the web
#: client, which are packages of their own; the fonts that it has links to as well only change how pages look.
DEBIAN = {
    "14.0": ("bullseye", ("odoo-14", "libjs-jquery", "libjs-jquery-ui", "libjs-underscore")),
    "19.0": ("sid", ("odoo-19", "libjs-jquery", "libjs-jquery-form", "libjs-underscore")),
}

#: What :func:`use` has said: (source tree or None, interpreter or None) by series.
_USED = {}

# Two thirds of a package are translations.
_NOT_UNPACKED = ("*/i18n/*", "*/i18n_extra/*")


@dataclasses.dataclass(frozen=True)
class Build:
    """One Odoo and how to run it."""

    #: such as "19.0"
    series: str
    #: folder of the source tree, or the one with the package ``odoo``
    root: Path
    #: interpreter and script; arguments of Odoo's follow
    command: list
    #: environment variables that it needs besides the usual ones
    env: dict
    #: folders for ``--addons-path``; empty if Odoo finds its standard addons without
    addons_paths: list
    #: for people, such as "Debian 19.0.0+dfsg-1" or "15.0-20221019"; of a clone it is the series
    version: str
    #: what websocket clients must say they are, None where the bus has no websocket
    websocket_version: str
    #: whether the bus wants to be called when Odoo ends, as it does since late 15.0
    with_stop_hook: bool
    #: short name for caches of what this very build, with these very Python packages, has made
    key: str


def find_build(series=None, tree=None, python=None):
    """Return a :class:`Build` that can be run, downloading and installing into ``.stack/`` what is missing.

    It is the package of Debian where that has the series. Where it has not, or no longer, it is a clone.

    :param series: such as "19.0"; may be left out with ``tree``
    :param tree: folder of an Odoo source tree, to take that; default: the one of :func:`use`
    :param python: path, command or version of the interpreter; default: one that suits the series
    :raise clones.Unavailable: it can neither be had from Debian nor by git
    :raise RuntimeError: it can not be had; the message says why, and what to do
    """
    if tree is None and series in _USED:
        tree, python = _USED[series]
    if tree is None:
        if series not in PYTHONS:
            raise RuntimeError("Odoo %s is unknown; known are %s" % (series, ", ".join(PYTHONS)))
        # Where Debian once could not give it, it is not asked each time.
        if series in DEBIAN and not clone_folder(series).exists():
            return _build_from_debian(series, python)
        tree = find_clone(series)
    return _build_from_tree(tree, python)


def use(odoo, python=None):
    """Have :func:`find_build` take this Odoo for its series from now on; return the series.

    :param odoo: a series, or the path of a source tree
    :param python: as of :func:`find_build`
    :raise RuntimeError: it can not be had
    """
    is_tree = os.sep in odoo
    build = find_build(python=python, **{"tree" if is_tree else "series": odoo})
    _USED[build.series] = build.root if is_tree else None, python
    return build.series


def python_versions(build):
    """Return the versions of what runs ``build``: of Python, of psycopg2, and of its libpq, a number such as 160004."""
    program = """
import json, platform, psycopg2
print(json.dumps([platform.python_version(), psycopg2.__version__.split()[0], psycopg2.extensions.libpq_version()]))
"""
    return json.loads(run([build.command[0], "-c", program], timeout=60))


def _build_from_debian(series, python):
    suite, packages = DEBIAN[series]

    def download(folder):
        say("downloading Odoo %s from Debian ..." % series)
        unpack_packages(suite, packages, folder, _NOT_UNPACKED)

    try:
        folder = kept("odoo-" + series, download)
    except RuntimeError as error:
        say("Debian's Odoo %s can not be had: %s" % (series, reason(error)))
        return _build_from_tree(find_clone(series), python)
    (version,) = [one.split()[1] for one in package_versions(folder) if one.startswith(packages[0] + " ")]
    root = folder / "usr" / "lib" / "python3" / "dist-packages"
    tree = Tree(root, series, "Debian " + version, [], root / "odoo" / "addons" / "bus")
    return _build(tree, python, folder / "usr" / "bin" / "odoo", {"PYTHONPATH": str(root)})


def _build_from_tree(folder, python):
    tree = read_tree(folder)
    if tree.series not in PYTHONS:
        raise RuntimeError("%s has Odoo %s, which is unknown; known are %s" % (folder, tree.series, ", ".join(PYTHONS)))
    return _build(tree, python, tree.root / "odoo-bin", {})


def _build(tree, python, script, env):
    interpreter = find_environment(tree.series, PYTHONS[tree.series], python)
    identity = [str(tree.root), tree.version, _commit(tree.root), str(interpreter)]
    return Build(
        series=tree.series,
        root=tree.root,
        command=[str(interpreter), str(script)],
        env=env,
        addons_paths=tree.addons_paths,
        version=tree.version,
        websocket_version=_websocket_version(tree.bus),
        with_stop_hook=any("on_stop(" in path.read_text(encoding="utf-8") for path in _dispatchers(tree.bus)),
        key="%s-%s" % (tree.series, hashlib.sha256("\0".join(identity).encode()).hexdigest()[:10]),
    )


def _dispatchers(bus):
    # 20.0 has it in a file of its own.
    return [path for path in (bus / "models" / "bus.py", bus / "bus_dispatcher.py") if path.exists()]


def _websocket_version(bus):
    path = bus / "websocket.py"
    source = path.read_text(encoding="utf-8") if path.exists() else ""
    # Clients of 16.0 need not say theirs.
    found = re.search(r"""^\s+_VERSION = ["']([^"']+)["']""", source, re.MULTILINE)
    return found and found[1]


def _commit(root):
    """Return what changes when somebody updates a source tree; nothing if it is not a clone."""
    try:
        return run(["git", "-C", root, "rev-parse", "HEAD"]) if (root / ".git").exists() else ""
    except CommandError:
        return ""
