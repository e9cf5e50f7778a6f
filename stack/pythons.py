"""Python interpreters of a wanted version, and virtual environments made with them.

    python3 -m stack.pythons VERSION...

prints the path of an interpreter of one of these versions, the best first.
"""

import contextlib
import hashlib
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from .archive import kept
from .commands import CommandError, run, say

REQUIREMENTS = Path(__file__).resolve().parents[1] / "tools" / "requirements"

# A name on PATH proves nothing: a shim of pyenv may refuse to run, and Debian's python3 may be unable to make virtual
# environments.
_PROBE = "import ensurepip, sys, venv; print(sys.executable, '%d.%d' % sys.version_info[:2], sep='\\n')"


class Interpreter(NamedTuple):
    """A Python that can make virtual environments."""

    path: str
    #: such as "3.11"
    version: str


def find_python(versions, python=None):
    """Return an :class:`Interpreter`: one on PATH, of pyenv, or of uv.

    :param versions: such as ``("3.11", "3.10")``, the best first
    :param python: path, command, or version of the only one to take, whatever ``versions`` says
    :raise RuntimeError: there is none; the message says in one line what to install
    """
    if python and not re.fullmatch(r"\d+\.\d+", python):
        found = _probe(python)
        if found is None:
            raise RuntimeError("%s does not run, or can not make virtual environments" % python)
        return found
    versions = [python] if python else versions
    for path in _candidates(versions):
        found = _probe(path)
        if found and found.version in versions:
            return found
    raise RuntimeError(
        "no Python %s with its module venv is on PATH, in pyenv or in uv; install one, such as by 'uv python install"
        " %s' or 'pyenv install %s'" % (" or ".join(versions), versions[0], versions[0])
    )


def _probe(path):
    """Return the :class:`Interpreter` behind a path or command, None if it is of no use."""
    try:
        return Interpreter(*run([path, "-c", _PROBE], timeout=60).splitlines())
    except CommandError:
        return None


def _candidates(versions):
    """Yield commands and paths that may be a Python of these versions: on PATH, then of pyenv, then of uv."""
    yield from ("python" + version for version in versions)
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for version in versions:
        yield from root.glob("versions/%s.*/bin/python" % version)
    for version in versions:
        # There may be no uv, or none of this version in it.
        with contextlib.suppress(CommandError):
            yield from run(["uv", "python", "find", "--no-python-downloads", version]).splitlines()


def find_environment(name, versions, python=None):
    """Return the interpreter of a virtual environment with what ``tools/requirements/<name>.txt`` says.

    It is made if there is none yet. Only the interpreter can be run: scripts have the path in them where it was made.

    :param versions: versions of Python, the best first
    :param python: as of :func:`find_python`
    :raise RuntimeError: no Python of these versions, or pip fails
    """
    requirements = REQUIREMENTS / (name + ".txt")
    interpreter = find_python(versions, python)
    identity = "\0".join([requirements.read_text(), interpreter.path])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:10]

    def install(folder):
        say("installing the Python packages of %s for Python %s ..." % (name, interpreter.version))
        run([interpreter.path, "-m", "venv", folder])
        pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
        # pip and what it builds with are pinned as well: the pip that comes with an old Python does not know today's
        # wheels. Without isolation it builds the few packages that have no wheel with these, not with the newest.
        builders = re.findall(r"^(?:pip|setuptools|wheel)==\S+", requirements.read_text(), re.MULTILINE)
        run([*pip, *builders])
        run([*pip, "--no-build-isolation", "-r", requirements])

    return kept("venv-%s-py%s-%s" % (name, interpreter.version, digest), install) / "bin" / "python"


def main():
    try:
        print(find_python(sys.argv[1:]).path)
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
