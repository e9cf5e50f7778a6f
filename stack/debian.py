"""Debian packages as plain folders: downloaded and unpacked, never installed.

apt finds the mirror and the way there (proxy, credentials) in this machine's own configuration. Everything that it
writes goes to ``.stack/``, so neither root nor a change of the machine's package sources is needed.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from .commands import run
from .system import KEYRING, ensure_packages

MIRROR_VARIABLE = "DEBIAN_MIRROR"

_SETTINGS = Path(__file__).with_name("apt.conf")


def unpack_packages(suite, packages, folder, exclude=()):
    """Download the newest versions of packages of a Debian suite and unpack all into one new folder.

    The folder appears when it is complete. Not to be called for the same folder by two at the same time.

    :param suite: such as ``sid``
    :param packages: names; their dependencies are not fetched
    :param folder: path; the file ``packages`` in it gets one line "name version" for each package
    :param exclude: patterns of paths that are not unpacked, as ``tar --exclude`` takes them
    :raise RuntimeError: no mirror is known, it does not have the packages, or it can not be reached
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="apt-", dir=folder.parent) as scratch:
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        for archive in _download(suite, packages, Path(scratch)):
            _unpack(archive, unpacked, exclude)
        unpacked.rename(folder)


def find_mirror():
    """Return the address of a Debian mirror: the one named in the environment, or this machine's.

    :raise RuntimeError: none is known
    """
    address = os.environ.get(MIRROR_VARIABLE)
    if address:
        return address
    targets = run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(LABEL)", "Created-By: Packages"])
    # Labels come with the package lists, which a fresh machine may not have yet. Security updates have another label.
    pairs = [line.rstrip().partition(" ") for line in targets.splitlines()]
    mirrors = [uri for uri, _, label in pairs if label == "Debian" or not label and uri.endswith("/debian/")]
    if not mirrors:
        raise RuntimeError(
            "this machine's apt knows no mirror of Debian; set the environment variable %s to the address of one"
            % MIRROR_VARIABLE
        )
    return mirrors[0]


def minimal_system(packages, settings):
    """Return the command that makes a minimal system, but for its last arguments: the suite, the target and sources.

    :param packages: names, separated by commas
    :param settings: a path, to which it writes how this machine's apt downloads, such as its proxy
    """
    lines = run(["apt-config", "dump", "Acquire"]).splitlines(keepends=True)
    kept = [line for line in lines if not re.match(r'Acquire::(IndexTargets|Changelogs)\b|.* "";$', line)]
    settings.write_text("".join(kept))
    return ["mmdebstrap", "--quiet", "--variant=minbase", "--include=" + packages, "--aptopt=%s" % settings]


def package_versions(folder):
    """Return the packages that were unpacked into a folder, as "name version"."""
    return (folder / "packages").read_text().splitlines()


def _download(suite, packages, scratch):
    ensure_packages("debian-archive-keyring")
    for name in ("lists", "cache", "download"):
        (scratch / name).mkdir()
    (scratch / "status").touch()
    (scratch / "sources.list").write_text("deb [signed-by=%s] %s %s main\n" % (KEYRING, find_mirror(), suite))
    settings = scratch / "apt.conf"
    settings.write_text(_SETTINGS.read_text().format(scratch))
    apt_get = ["apt-get", "-q", "-c", settings]
    run([*apt_get, "update"])
    run([*apt_get, "download", *packages], cwd=scratch / "download")
    return sorted((scratch / "download").glob("*.deb"))


def _unpack(archive, folder, exclude):
    contents = folder.parent / "contents.tar"
    with open(contents, "wb") as output:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], stdout=output, check=True)
    patterns = ["--exclude=" + pattern for pattern in exclude]
    run(["tar", "-x", "--no-same-owner", "-f", contents, "-C", folder, *patterns])
    with open(folder / "packages", "a") as packages:
        packages.write(run(["dpkg-deb", "-W", "--showformat=${Package} ${Version}\n", archive]))
