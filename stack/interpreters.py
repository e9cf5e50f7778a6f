"""Other versions of Python than those of this machine: from Debian's packages, unpacked, not installed.

What it makes is kept in ``.stack/`` of this clone.
"""

import os

from .archive import CACHE, locked
from .commands import run, say
from .debian import unpack_packages

#: Version -> the suite of Debian that has it.
SUITES = {"3.9": "bullseye", "3.11": "bookworm", "3.13": "trixie"}

# What makes virtual environments is in packages of its own, which have changed: pip, and what old ones of it import.
_PACKAGES = ["python{0}", "python{0}-minimal", "python{0}-venv", "patchelf"]
_MORE = {
    "3.9": ["python-pip-whl", "python3-distutils"],
    "3.11": ["python3-pip-whl", "python3-setuptools-whl", "python3-distutils"],
    "3.13": ["python3-pip-whl"],
}
_NOT_UNPACKED = ("*/share/doc/*", "*/man/*", "*/locale/*")
# Those of the machine serve where its own Python is newer, and so its C library; on others the interpreter fails.
_OF_THE_MACHINE = ("libc6", "libgcc-s1", "libstdc++6")
# Where Debian's ensurepip looks for pip, and what says the same of the interpreter that asks.
_WHEELS = {
    "'/usr/share/python-wheels": "sys.base_prefix + '/share/python-wheels",
    "sysconfig.get_config_var('WHEEL_PKG_DIR')": "sys.base_prefix + '/share/python-wheels'",
}


def unpacked_python(version):
    """Return the path of an interpreter of a version in :data:`SUITES`, which need not run on this machine.

    :raise RuntimeError: it can not be had; the message says why
    """
    folder = CACHE / ("python-" + version)
    with locked(folder.name):
        if not folder.exists():
            say("downloading Python %s from Debian ..." % version)
            unfinished = folder.with_name(folder.name + ".unfinished")
            packages = [name.format(version) for name in _PACKAGES] + _MORE[version]
            unpack_packages(SUITES[version], packages, unfinished, _NOT_UNPACKED, True, _OF_THE_MACHINE)
            _settle(unfinished, version)
            os.replace(unfinished, folder)
    return _interpreter(folder, version)


def _interpreter(folder, version):
    return folder / "usr" / "bin" / ("python" + version)


def _settle(folder, version):
    """Have the interpreter in ``folder`` find its libraries and its pip there, wherever the folder is."""
    python = _interpreter(folder, version)
    libraries = [path for root in ("lib", "usr/lib") for path in folder.glob(root + "/*-linux-gnu*")]
    places = ":".join("$ORIGIN/" + os.path.relpath(path, python.parent) for path in libraries)
    # An RPATH, unlike a RUNPATH, counts for the libraries of its modules as well; a variable in the environment would
    # for all programs that it starts.
    run([folder / "usr" / "bin" / "patchelf", "--force-rpath", "--set-rpath", places, python])
    ensurepip = folder / "usr" / "lib" / ("python" + version) / "ensurepip" / "__init__.py"
    text = ensurepip.read_text()
    for where, instead in _WHEELS.items():
        text = text.replace(where, instead)
    ensurepip.write_text(text)
