"""Debian packages as plain folders: downloaded and unpacked, never installed.

apt finds the mirror and the way there (proxy, credentials) in this machine's own configuration. Everything that it
writes goes to ``.stack/``, so neither root nor a change of the machine's package sources is needed.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .commands import CommandError, run
from .system import KEYRING, ensure_packages

MIRROR_VARIABLE = "DEBIAN_MIRROR"
_LIST_SOURCES = ["indextargets", "--format", "$(REPO_URI) $(LABEL)", "Created-By: Packages"]
# It holds only what is newer there; what that needs comes from the other.
_COMPLETED_BY = {"experimental": "sid"}
# By their names, which end in the version of their interface. What only compiles queries, or runs Perl, is large.
_LIBRARY = re.compile(r"(?!.*(perl|llvm|z3))z?lib\S*\d\S*")


def unpack_packages(suite, packages, folder, exclude=(), libraries=False, without=()):
    """Download the newest versions of packages of a Debian suite and unpack all into one new folder.

    The folder appears when it is complete. Not to be called for the same folder by two at the same time.

    :param suite: such as ``sid``
    :param packages: names; their dependencies are not fetched
    :param libraries: whether to fetch the libraries that they depend on all the same, that of C included
    :param without: names of libraries that are not fetched
    :param folder: path; the file ``packages`` in it gets one line "name version" for each package
    :param exclude: patterns of paths that are not unpacked, as ``tar --exclude`` takes them
    :raise RuntimeError: no mirror is known, it does not have the packages, or it can not be reached
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="apt-", dir=folder.parent) as scratch:
        scratch = Path(scratch)
        for archive in _download(suite, packages, scratch, libraries, without):
            _unpack(archive, scratch / "unpacked", exclude)
            archive.unlink()
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch / "unpacked", folder)


def find_mirror():
    """Return the address of a Debian mirror: the one named in the environment, or this machine's.

    :raise RuntimeError: none is known
    """
    with tempfile.TemporaryDirectory(prefix="apt-") as scratch:
        return _mirror(_Apt(Path(scratch)))


def package_versions(folder):
    """Return the packages that were unpacked into a folder, as "name version"."""
    return (folder / "packages").read_text().splitlines()


def _download(suite, packages, scratch, libraries, without):
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise RuntimeError("Debian packages can only be had where there are apt-get and dpkg-deb")
    ensure_packages("debian-archive-keyring")
    apt = _Apt(scratch)
    mirror = _mirror(apt)
    suites = [suite, *filter(None, [_COMPLETED_BY.get(suite)])]
    apt.use_sources(["deb [signed-by=%s] %s %s main" % (KEYRING, mirror, one) for one in suites])
    if len(suites) > 1:
        apt.prefer(suite, packages)
    try:
        apt.update()
    except CommandError as error:
        raise RuntimeError("Debian's %s can not be had from %s\n%s" % (suite, mirror, error)) from None
    target = scratch / "download"
    target.mkdir()
    if libraries:
        packages = {*packages, *filter(_LIBRARY.fullmatch, apt.needed(packages))} - set(without)
    apt.get("download", *packages, cwd=target)
    return sorted(target.glob("*.deb"))


class _Apt:
    """apt with the machine's settings, but package lists, package sources and cache of its own."""

    # Nothing counts as installed, or apt would ask for the version that this machine has, not for that of the suite.
    # The commands that a machine runs after an update concern its own lists, and may need root. The user _apt, who
    # does the downloads when we are root, may not be able to enter our folder. Translations only take time.
    _SETTINGS = """
        Dir::State::lists "{0}/lists";
        Dir::State::status "{0}/status";
        Dir::Cache "{0}/cache";
        APT::Sandbox::User "root";
        APT::Default-Release "";
        Acquire::Languages "none";
        Acquire::Retries "3";
        #clear APT::Update::Pre-Invoke;
        #clear APT::Update::Post-Invoke;
        #clear APT::Update::Post-Invoke-Success;
    """
    _OWN_SOURCE = """
        Dir::Etc::sourcelist "{0}/sources.list";
        Dir::Etc::sourceparts "-";
        Dir::Etc::preferences "{0}/preferences";
        Dir::Etc::preferencesparts "-";
    """

    def __init__(self, scratch):
        self._scratch = scratch
        self._settings = scratch / "apt.conf"
        self._settings.write_text(self._SETTINGS.format(scratch))
        for name in "lists", "cache":
            (scratch / name).mkdir()
        for name in "status", "preferences":
            (scratch / name).touch()

    def use_sources(self, lines):
        """Use only these lines of a sources.list from now on."""
        (self._scratch / "sources.list").write_text("".join(line + "\n" for line in lines))
        with open(self._settings, "a") as settings:
            settings.write(self._OWN_SOURCE.format(self._scratch))

    def update(self):
        # Not every failed download makes apt-get fail.
        self.get("update", "-o", "APT::Update::Error-Mode=any")

    def prefer(self, suite, packages):
        """Take these packages from this suite, and all others from wherever they usually come."""
        lines = "Package: %s\nPin: release a=%s\nPin-Priority: 990\n" % (" ".join(packages), suite)
        (self._scratch / "preferences").write_text(lines)

    def needed(self, packages):
        """Return the names of all packages that an empty machine would have to install for ``packages``."""
        printed = self.get("install", "--simulate", "--no-install-recommends", *packages)
        return re.findall(r"^Inst (\S+)", printed, re.MULTILINE)

    def get(self, *arguments, **options):
        return run(["apt-get", "-q", "-c", self._settings, *arguments], **options)


def _mirror(apt):
    address = os.environ.get(MIRROR_VARIABLE) or _labelled_debian(run(["apt-get", *_LIST_SOURCES]))
    if not address:
        # Labels come with the lists. A fresh machine may have none yet: get them, though not for the machine.
        apt.update()
        address = _labelled_debian(apt.get(*_LIST_SOURCES))
    if not address:
        raise RuntimeError(
            "this machine's apt knows no mirror of Debian; set the environment variable %s to the address of one"
            % MIRROR_VARIABLE
        )
    return address


def _labelled_debian(sources):
    # "Debian-Security" and "Debian Backports" are others.
    pairs = (line.partition(" ") for line in sources.splitlines())
    return next((address for address, _, label in pairs if label == "Debian"), None)


def _unpack(archive, folder, exclude):
    folder.mkdir(exist_ok=True)
    patterns = ["--exclude=" + pattern for pattern in exclude]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as contents:
        command = ["tar", "-x", "--no-same-owner", "-C", str(folder), *patterns]
        tar = subprocess.run(command, stdin=contents.stdout, stderr=subprocess.PIPE, encoding="utf-8")
    if tar.returncode or contents.returncode:
        raise CommandError("%s can not be unpacked\n%s" % (archive.name, tar.stderr))
    with open(folder / "packages", "a") as packages:
        packages.write(run(["dpkg-deb", "-W", "--showformat=${Package} ${Version}\n", archive]))
