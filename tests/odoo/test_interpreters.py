"""A Python that the machine does not have, from Debian's packages: what Odoo 14.0 runs on where there is none."""

import json

import pytest

from stack.archive import CACHE
from stack.commands import run
from stack.interpreters import unpacked_python

_LIBRARIES = """
import bz2, ctypes, decimal, json, lzma, readline, sqlite3, ssl, uuid
print(json.dumps([line.split()[-1] for line in open("/proc/self/maps") if ".so" in line]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a virtual environment."""
    folder = tmp_path_factory.mktemp("venv")
    run([unpacked_python("3.9"), "-m", "venv", folder])
    return folder / "bin" / "python"


def test_it_has_its_own_libraries_and_the_c_library_of_the_machine(python):
    loaded = json.loads(run([python, "-c", _LIBRARIES]))
    own = {path.rpartition("/")[2].partition(".")[0] for path in loaded if path.startswith(str(CACHE))}
    assert {"libbz2", "libcrypto", "libffi", "liblzma", "libmpdec", "libreadline", "libsqlite3", "libssl"} <= own
    assert "libc" not in own


def test_it_has_pip(python):
    assert "python 3.9" in run([python, "-m", "pip", "--version"])
