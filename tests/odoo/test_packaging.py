"""What pip makes of the addon: that it is whole, and that Odoo finds it where pip puts it."""

import ast
import dataclasses
import email
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from stack.builds import find_build
from stack.commands import run
from stack.odoo import default_load
from stack.stack import ADDON, Stack

NAME = "bus_alt_connection"
INSTALLED = "odoo/addons/" + NAME
#: No series begins like this, nor does a release of ours: who keeps a version of his own does not come up with it.
VERSION = "98.7.6"
#: In the folder of the addon, but only there to make the package; and what may lie about in it.
NOT_INSTALLED = {"pyproject.toml", "tests/test_it.py", "odoo.conf", "settings.py~"}

pytestmark = pytest.mark.rest


def build(source, target, *options):
    """Make a wheel of a folder: with ``--wheel`` straight from it, else from a source distribution made of it."""
    run([sys.executable, "-m", "build", "--outdir", target, *options, source])
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the folders that packages are made of, with another version, and with files that are none of it."""
    folder = tmp_path_factory.mktemp("clone")
    for name in NAME, "setup":
        unwanted = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        shutil.copytree(ADDON / name, folder / name, symlinks=True, ignore=unwanted)
    manifest = folder / NAME / "__manifest__.py"
    version = ast.literal_eval(manifest.read_text())["version"]
    manifest.write_text(manifest.read_text().replace(version, VERSION))
    for name in NOT_INSTALLED - {"pyproject.toml"}:
        path = folder / NAME / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("# not part of the addon\n")
    return folder


def files(folder):
    """Return what is in the files of a folder, by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What "pip install" makes first, of whatever it is given.
@pytest.mark.parametrize("source, options", [(NAME, ["--wheel"]), (NAME, []), ("setup/" + NAME, ["--wheel"])])
def test_a_wheel_has_the_whole_addon_and_nothing_else_and_suits_any_series(clone, tmp_path, source, options):
    wheel = build(clone / source, tmp_path / "dist", *options)
    assert wheel.name == "%s-%s-py3-none-any.whl" % (NAME, VERSION)
    information = "%s-%s.dist-info/" % (NAME, VERSION)
    zipfile.ZipFile(wheel).extractall(tmp_path / "wheel")
    installed = {name: content for name, content in files(tmp_path / "wheel").items() if information not in name}
    own = {name: content for name, content in files(clone / NAME).items() if name not in NOT_INSTALLED}
    assert installed == {"%s/%s" % (INSTALLED, name): content for name, content in own.items()}
    # Odoo's list of apps shows these; the licence asks to be handed on.
    assert {"LICENSE", "README.rst", "static/description/icon.png", "static/description/index.html"} <= set(own)

    metadata = email.message_from_string((tmp_path / "wheel" / information / "METADATA").read_text())
    assert metadata["Version"] == VERSION
    assert metadata["Requires-Python"] == ">=3.5"
    # Neither Odoo, which pip need not have installed, nor psycopg2, which Odoo has brought under one name or another.
    assert metadata.get_all("Requires-Dist") is None


@pytest.fixture
def installation(tmp_path):
    """A build of Odoo with a fresh virtual environment, which has what Odoo needs and not the addon."""
    found = find_build("19.0")
    python = tmp_path / "venv" / "bin" / "python"
    run([found.command[0], "-m", "venv", "--without-pip", tmp_path / "venv"])
    # Behind its own packages those of the environment that Odoo has for the other tests, pip among them.
    (site_packages(python) / "stack.pth").write_text("%s\n" % site_packages(found.command[0]))
    return dataclasses.replace(found, command=[str(python), *found.command[1:]])


def site_packages(python):
    return Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())


def test_odoo_finds_what_pip_has_installed_and_its_bus_works(installation, clone, tmp_path):
    python = installation.command[0]
    wheel = build(clone / NAME, tmp_path / "dist", "--wheel")
    run([python, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", wheel])
    assert (site_packages(python) / INSTALLED / "__init__.py").exists()
    load = "%s,%s" % (default_load(installation.series), NAME)
    with Stack(build=installation, addon=None, load=load) as stack, stack.client() as client:
        stack.odoo.wait_for_log("listening on .*imbus.* confirmed")
        stack.send("tests", "hello")
        client.wait_for("hello")
