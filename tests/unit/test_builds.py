"""Where an Odoo comes from: Debian, git where Debian does not have it, or the source tree that was named."""

import pytest

from stack import archive, builds
from stack.clones import Unavailable
from stack.commands import CommandError, reason
from stack.pythons import Environment
from tests.support.trees import add_modules, make_tree

APT = """exit code 100 of: apt-get -q update
Ign:1 http://localhost bullseye InRelease
Err:2 http://localhost bullseye Release
  404  Not Found
E: The repository 'http://localhost bullseye Release' does not have a Release file.
W: Updating from such a repository can't be done securely."""


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """Debian and git, of which each can be made to refuse; what they are asked for is in ``asked``."""

    class World:
        debian = git = None  # why it refuses

        def unpack(self, suite, packages, folder, exclude):
            self.asked.append("Debian")
            if self.debian:
                raise CommandError(self.debian)
            add_modules(folder / "usr/lib/python3/dist-packages/odoo/addons", "bus")
            (folder / "packages").write_text("%s 1.2\n" % packages[0])

        def is_cloned(self, series):
            return (tmp_path / "git" / series).exists()

        def find_clone(self, series):
            if not self.is_cloned(series):
                self.asked.append("git")
                if self.git:
                    raise Unavailable(series, self.git)
                make_tree(tmp_path / "git" / series, series)
            return tmp_path / "git" / series

        def find_environment(self, name, versions, python):
            return Environment("python", python or versions[0], "2.9")

    world = World()
    world.asked = []
    monkeypatch.setattr(archive, "CACHE", tmp_path)
    monkeypatch.setattr(builds, "CACHE", tmp_path)
    monkeypatch.setattr(builds, "_USED", {})
    monkeypatch.setattr(builds, "unpack_packages", world.unpack)
    for name in "is_cloned", "find_clone", "find_environment":
        monkeypatch.setattr(builds, name, getattr(world, name))
    return world


def test_what_debian_has_is_from_debian(world):
    for _again in range(2):
        assert builds.find_build("19.0").description == "Debian odoo-19 1.2"
    assert world.asked == ["Debian"]


def test_what_debian_does_not_have_is_from_git(world, tmp_path):
    for _again in range(2):
        build = builds.find_build("17.0", python="3.10")
        assert (build.root, build.series, build.python) == (tmp_path / "git" / "17.0", "17.0", "3.10")
    assert world.asked == ["git"]


def test_what_debian_no_longer_has_is_from_git_and_debian_is_asked_once(world, tmp_path, capsys):
    world.debian = APT
    for _again in range(2):
        assert builds.find_build("14.0").root == tmp_path / "git" / "14.0"
    assert world.asked == ["Debian", "git"]
    said = "Debian's Odoo 14.0 can not be had: The repository 'http://localhost bullseye Release' does not have a"
    assert said in capsys.readouterr().err


def test_if_neither_has_it_both_reasons_are_told(world):
    world.debian, world.git = APT, "it can not be reached"
    with pytest.raises(Unavailable) as refused:
        builds.find_build("14.0")
    assert "\n" not in str(refused.value)
    first = (
        "Odoo 14.0 can not be had: it can not be reached; nor from Debian: The repository 'http://localhost bullseye"
    )
    assert str(refused.value).startswith(first)


def test_an_unknown_series_is_asked_for_nowhere(world):
    with pytest.raises(RuntimeError, match="^Odoo 11.0 is unknown; known are 12.0, [^\n]*$"):
        builds.find_build("11.0")
    assert world.asked == []


@pytest.mark.parametrize("odoo", ["series", "tree"])
def test_an_odoo_that_was_chosen_is_what_its_series_means(world, tmp_path, odoo):
    tree = make_tree(tmp_path / "tree", "17.0")
    assert builds.use("17.0" if odoo == "series" else str(tree), "3.12") == "17.0"
    build = builds.find_build("17.0")
    assert build.root == (tree if odoo == "tree" else tmp_path / "git" / "17.0")
    assert build.python == "3.12"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (CommandError(APT), "The repository 'http://localhost bullseye Release' does not have a Release file."),
        (CommandError("Cloning into 'x'...\nfatal: no space\nerror: more"), "no space"),
        (
            CommandError("fatal: unable to connect to localhost:\nerrno=Connection refused"),
            "unable to connect to localhost",
        ),
        (CommandError("exit code 1 of: true\nwhat it printed last\n"), "what it printed last"),
        (CommandError(""), "CommandError"),
        (RuntimeError("not root\nTry it yourself"), "not root"),
    ],
)
def test_the_reason_is_one_line(error, why):
    assert reason(error) == why
