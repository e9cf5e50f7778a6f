"""What looks like a source tree of Odoo."""

from pathlib import Path

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
