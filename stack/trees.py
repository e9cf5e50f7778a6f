"""Source trees of Odoo: what is one, and what is in it."""

import runpy
from pathlib import Path
from typing import NamedTuple

# What an Odoo with a bus can't do without. The folders alone prove nothing: git leaves some of what it has removed.
_NEEDED = ("base/__manifest__.py", "web/__manifest__.py", "bus/models/bus.py")


class Tree(NamedTuple):
    """A source tree, whole as far as can be seen."""

    root: Path
    #: such as "15.0"
    series: str
    #: such as "15.0-20221019"; in a clone the same as the series
    version: str
    #: folders for ``--addons-path``; empty if Odoo finds its standard addons without
    addons_paths: list
    #: the folder of the module ``bus``
    bus: Path


def read_tree(root):
    """Return the :class:`Tree` in a folder.

    :raise RuntimeError: it is none; the message is one line that says what is missing or wrong
    """
    root = Path(root)
    release = root / "odoo" / "release.py"
    if not (root / "odoo-bin").is_file() or not release.is_file():
        raise RuntimeError("%s is no source tree of Odoo: it has no odoo-bin or no odoo/release.py" % root)
    series, version = _read_release(release)
    # A clone has "base" in odoo/addons and the others in addons; a release archive has all in odoo/addons, where Odoo
    # looks without being told; some have both folders. What is in both Odoo takes from the addons path.
    addons, within = root / "addons", root / "odoo" / "addons"
    for needed in _NEEDED:
        if not any((folder / needed).is_file() for folder in (addons, within)):
            raise RuntimeError(
                "%s is no whole source tree of Odoo: there is no %s in its addons, nor in its odoo/addons"
                % (root, needed)
            )
    return Tree(
        root,
        series,
        version,
        # Odoo refuses a folder without modules.
        addons_paths=[addons] if any(addons.glob("*/__manifest__.py")) else [],
        bus=(addons if (addons / "bus" / "models" / "bus.py").is_file() else within) / "bus",
    )


def _read_release(path):
    try:
        found = runpy.run_path(str(path))
        # The branches between two releases call themselves "saas~19.1".
        return found["series"].replace("saas~", ""), found.get("version", found["series"])
    except (Exception, SystemExit) as error:  # whatever it has in place of what belongs there
        what = " ".join(str(error).split())
        raise RuntimeError("%s tells no series of Odoo: %s: %s" % (path, type(error).__name__, what)) from error
