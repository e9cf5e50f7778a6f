"""Python interpreters of a wanted version, and virtual environments made with them.

    python3 -m stack.pythons VERSION...

prints the path of an interpreter of one of these versions, the best first.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from .archive import CACHE
from .commands import CommandError, run, say
from .system import ensure_packages

REQUIREMENTS = Path(__file__).resolve().parents[1] / "tools" / "requirements"

# A name on PATH proves nothing: a shim of pyenv may refuse to run, and Debian's python3 may be unable to make virtual
# environments.
_PROBE = "import ensurepip, sys, venv; print(sys.executable, '%d.%d' % sys.version_info[:2], sep='\\n')"
_FACTS = """
import json, platform, psycopg2
print(json.dumps({"python": platform.python_version(), "psycopg2": psycopg2.__version__.split()[0]}))
"""


class Interpreter(NamedTuple):
    """A Python that can make virtual environments."""

    path: str
    #: such as "3.11"
    version: str


class Environment(NamedTuple):
    """A virtual environment."""

    #: path of its interpreter
    python: Path
    #: full version, such as "3.11.7"
    python_version: str
    psycopg2_version: str


def find_python(versions, python=None):
    """Return an :class:`Interpreter`: one on PATH, of pyenv, or of uv; or one that the distribution has as a package.

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
    for places in _on_path, _of_pyenv, _of_uv, _of_distribution:
        for version in versions:
            for path in places(version):
                found = _probe(path)
                if found and found.version == version:
                    return found
    raise RuntimeError(
        "no Python %s with its module venv is on PATH, in pyenv, in uv or among the distribution's packages; install"
        " one, such as by 'uv python install %s' or 'pyenv install %s'"
        % (" or ".join(versions), versions[0], versions[0])
    )


def _probe(path):
    """Return the :class:`Interpreter` behind a path or command, None if it is of no use."""
    try:
        return Interpreter(*run([path, "-c", _PROBE], timeout=60).splitlines())
    except CommandError:
        return None


def _on_path(version):
    return ["python" + version]


def _of_pyenv(version):
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    return [path for path in root.glob("versions/%s.*/bin/python" % version) if os.access(path, os.X_OK)]


def _of_uv(version):
    if shutil.which("uv") is None:
        return []
    try:
        return run(["uv", "python", "find", "--no-python-downloads", version]).splitlines()
    except CommandError:
        return []


def _of_distribution(version):
    package = "python%s-venv" % version
    try:
        run(["apt-cache", "show", package])
        ensure_packages(package)
    except RuntimeError:
        return []
    return ["python" + version]


def find_environment(name, versions, python=None):
    """Return a virtual :class:`Environment` with what ``tools/requirements/<name>.txt`` says, making it if needed.

    Not to be called for the same name by two at the same time.

    :param versions: versions of Python, the best first
    :param python: as of :func:`find_python`
    :raise RuntimeError: no Python of these versions, or pip fails
    """
    requirements = REQUIREMENTS / (name + ".txt")
    interpreter = find_python(versions, python)
    # Scripts in a virtual environment have its path inside, so it can not be moved along with the clone.
    identity = "\0".join([requirements.read_text(), interpreter.path, str(CACHE)])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
    folder = CACHE / ("venv-%s-py%s-%s" % (name, interpreter.version, digest))
    facts = folder / "facts.json"
    if not facts.exists():
        say("installing the Python packages of %s for Python %s ..." % (name, interpreter.version))
        printed = _install(interpreter, folder, requirements)
        # Last of all, so that what was interrupted does not count.
        facts.write_text(printed)
    versions = json.loads(facts.read_text())
    return Environment(folder / "bin" / "python", versions["python"], versions["psycopg2"])


def _install(interpreter, folder, requirements):
    run([interpreter.path, "-m", "venv", "--clear", folder])
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    # pip and what it builds with are pinned as well: the pip that comes with an old Python does not know today's
    # wheels. Without isolation it builds the few packages that have no wheel with these, not with the newest.
    builders = re.findall(r"^(?:pip|setuptools|wheel)==\S+", requirements.read_text(), re.MULTILINE)
    run([*pip, *builders])
    run([*pip, "--no-build-isolation", "-r", requirements])
    return run([python, "-c", _FACTS])


def main():
    try:
        print(find_python(sys.argv[1:]).path)
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
