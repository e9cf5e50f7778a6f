"""Source trees of Odoo: what is one, and what is in it."""

import runpy
from pathlib import Path
from typing import NamedTuple


class Tree(NamedTuple):
    """A source tree."""

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

    :raise RuntimeError: it is none; the message is one line
    """
    root = Path(root).resolve()
    # A clone has "bus" in addons, a release archive has it in odoo/addons, where Odoo looks without being told.
    addons = root / "addons"
    buses = [path for path in (addons / "bus", root / "odoo" / "addons" / "bus") if (path / "models").is_dir()]
    if not (root / "odoo-bin").is_file() or not buses:
        raise RuntimeError("%s is no source tree of Odoo: it has no odoo-bin or no module bus" % root)
    try:
        release = runpy.run_path(str(root / "odoo" / "release.py"))
        # The branches between two releases call themselves "saas~19.1".
        series = release["series"].replace("saas~", "")
    except Exception as error:
        raise RuntimeError("%s/odoo/release.py tells no series of Odoo: %r" % (root, error)) from error
    # Odoo refuses a folder without modules.
    addons_paths = [addons] if any(addons.glob("*/__manifest__.py")) else []
    return Tree(root, series, release.get("version", series), addons_paths, buses[0])
