"""Python interpreters of a wanted version, and virtual environments made with them.

    python3 -m stack.pythons VERSION...

prints the path of one of these versions, the best first.
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
from .commands import CommandError, reason, run, say
from .interpreters import SUITES, unpacked_python

REQUIREMENTS = Path(__file__).resolve().parents[1] / "tools" / "requirements"

_STAMP = "stamp.json"
# All that uv writes; the Pythons that its user has elsewhere it only reads.
_UV = CACHE / "uv"
_UV_FOLDERS = {"UV_CACHE_DIR": str(_UV / "cache"), "UV_PYTHON_BIN_DIR": str(_UV / "links")}
_IN_CACHE = {"UV_PYTHON_INSTALL_DIR": str(_UV / "pythons")}
# A name on PATH proves nothing: a shim of pyenv may refuse to run, Debian's python3 may be unable to make a virtual
# environment. Who answers this can be used, and tells its real place.
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
    """Return an :class:`Interpreter`.

    Searched are, in this order, PATH, pyenv's versions, and uv's. If none is there it is fetched from Debian, or by uv.

    :param versions: such as ``("3.11", "3.10")``, the best first
    :param python: path, command, or version of the only one to take, whatever ``versions`` says
    :raise RuntimeError: there is none; the message says what was searched, in one line
    """
    if python and not re.fullmatch(r"\d+\.\d+", str(python)):
        found = _probe(python)
        if found is None:
            raise RuntimeError("%s does not run, or can not make virtual environments" % python)
        return found
    versions = (str(python),) if python else versions
    for places in _on_path, _of_pyenv, _of_uv:
        for version in versions:
            for path in places(version):
                found = _probe(path)
                if found and found.version == version:
                    return found
    wanted = "Python " + " or ".join(versions)
    say("%s is neither on PATH nor among the versions of pyenv and uv" % wanted)
    failures = []
    for fetch in _from_debian, _from_uv:
        found = fetch(versions, failures)
        if found:
            return found
    raise RuntimeError(
        "%s is needed, with its venv module; it is neither on PATH nor among the versions of pyenv and uv, "
        "and can not be fetched: %s" % (wanted, "; ".join(failures))
    )


def _probe(path):
    """Return the :class:`Interpreter` behind a path or command, None if it is of no use."""
    try:
        executable, version = run([path, "-c", _PROBE], timeout=60).splitlines()
    except (CommandError, ValueError):
        return None
    return Interpreter(executable, version)


def _on_path(version):
    paths = (Path(folder) / ("python" + version) for folder in os.get_exec_path())
    return [path for path in paths if os.access(path, os.X_OK)]


def _of_pyenv(version):
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    try:
        return sorted(root.glob("versions/%s.*/bin/python" % version), key=_natural, reverse=True)
    except PermissionError:  # the variable is that of another user, left over by su or sudo
        return []


def _natural(path):
    return [int(number) for number in re.findall(r"\d+", str(path))]


def _of_uv(version):
    uv = _uv()
    return [*_uv_finds(uv, version, {}), *_uv_finds(uv, version, _IN_CACHE)] if uv else []


def _uv():
    own = _UV / "bin" / "uv"
    return str(own) if own.exists() else shutil.which("uv")


def _uv_finds(uv, version, place):
    only_its_own = ["--python-preference", "only-managed", "--no-python-downloads"]
    try:
        return _run_uv(uv, "find", *only_its_own, version, **place).splitlines()[:1]
    except CommandError:
        return []


def _run_uv(uv, *arguments, **variables):
    return run([uv, "python", *arguments], env={**os.environ, **_UV_FOLDERS, **variables})


def _from_debian(versions, failures):
    """Return an :class:`Interpreter` that is unpacked from Debian's packages; if there is none, None and why."""
    for version in versions:
        if version not in SUITES:
            continue
        try:
            found = _probe(unpacked_python(version))
        except RuntimeError as error:
            failures.append("Debian's %s: %s" % (version, reason(error)))
            continue
        if found:
            return found
        failures.append("Debian's %s does not run here" % version)
    return None


def _from_uv(versions, failures):
    """Return an :class:`Interpreter` that uv has downloaded; if there is none, None and why."""
    say("getting it with uv ...")
    try:
        uv = _uv() or _install_uv()
    except CommandError as error:
        failures.append("uv: %s" % reason(error))
        return None
    for version in versions:
        try:
            _run_uv(uv, "install", version, **_IN_CACHE)
        except CommandError as error:
            failures.append("uv's %s: %s" % (version, reason(error)))
            continue
        for path in _uv_finds(uv, version, _IN_CACHE):
            found = _probe(path)
            if found:
                return found
    return None


def _install_uv():
    run([sys.executable, "-m", "pip", "install", "--target", _UV, "-r", REQUIREMENTS / "uv.txt"])
    return _uv()


def find_environment(name, versions, python=None):
    """Return a virtual :class:`Environment` with what ``tools/requirements/<name>.txt`` says, making it if needed.

    Not to be called for the same name by two at the same time.

    :param versions: versions of Python, the best first; one that has its environment already comes before all others
    :param python: as of :func:`find_python`
    :raise RuntimeError: no Python of these versions, or pip fails
    """
    requirements = REQUIREMENTS / (name + ".txt")
    if not requirements.exists():
        raise RuntimeError("no pinned Python packages for %s: %s is missing" % (name, requirements))
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if python is None:
        for version in versions:
            found = _read_environment(_folder(name, version), digest)
            if found:
                return found
    interpreter = find_python(versions, python)
    folder = _folder(name, interpreter.version)
    found = _read_environment(folder, digest)
    if found and python and not _is_made_with(folder, interpreter):
        found = None
    return found or _make_environment(folder, interpreter, requirements, digest)


def _folder(name, version):
    return CACHE / ("venv-%s-py%s" % (name, version))


def _read_environment(folder, digest):
    """Return the :class:`Environment` in a folder, None if it is not there, incomplete, outdated, or moved."""
    try:
        stamp = json.loads((folder / _STAMP).read_text())
    except FileNotFoundError:
        return None
    python = folder / "bin" / "python"
    # Scripts in a virtual environment have its path inside, so it can not be moved along with the clone.
    if stamp["digest"] != digest or stamp["folder"] != str(folder) or not python.exists():
        return None
    return Environment(python, stamp["python"], stamp["psycopg2"])


def _is_made_with(folder, interpreter):
    return os.path.realpath(folder / "bin" / "python") == os.path.realpath(interpreter.path)


def _make_environment(folder, interpreter, requirements, digest):
    say("installing the Python packages of %s for Python %s ..." % (requirements.stem, interpreter.version))
    run([interpreter.path, "-m", "venv", "--clear", folder])
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    # pip and what it builds with are pinned as well: the pip that comes with an old Python does not know today's
    # wheels. Without isolation it builds the few packages that have no wheel with these, not with the newest.
    builders = re.findall(r"^(?:pip|setuptools|wheel)==\S+", requirements.read_text(), re.MULTILINE)
    run([*pip, *builders])
    run([*pip, "--no-build-isolation", "-r", requirements])
    facts = json.loads(run([python, "-c", _FACTS]))
    # Last of all, so that what was interrupted does not count.
    (folder / _STAMP).write_text(json.dumps({"digest": digest, "folder": str(folder), **facts}))
    return Environment(python, facts["python"], facts["psycopg2"])


def main():
    """Print the path of a Python of one of the versions that are named on the command line."""
    try:
        print(find_python(sys.argv[1:]).path)
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
