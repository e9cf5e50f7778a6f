"""What git gets is a whole tree of the series that was asked for, or one line says why there is none."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from stack import archive, clones
from stack.process import is_alive
from stack.waiting import wait_until
from tests.support.trees import commit, git, make_tree

PROJECT = Path(__file__).resolve().parents[2]

#: A git that clones all right, but never ends; it has a child, as git has for the transport.
NEVER_ENDS = """#!/bin/sh
if [ "$1" = clone ]; then
    %s "$@"
    sleep 1000 &
    wait
fi
exec %s "$@"
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Return the folder in place of ``.stack/``."""
    folder = tmp_path / "stack"
    monkeypatch.setattr(archive, "CACHE", folder)
    monkeypatch.setattr(clones, "CACHE", folder)
    clones._branches.cache_clear()
    yield folder
    clones._branches.cache_clear()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return a repository with 16.0 and 17.0, of two commits each."""
    folder = tmp_path_factory.mktemp("original")
    git(folder, "init", "--quiet")
    for series in "16.0", "17.0":
        git(folder, "checkout", "--quiet", "--orphan", series)
        commit(make_tree(folder, series))
        commit(folder)
    return folder


@pytest.fixture
def repository(original, tmp_path, monkeypatch):
    """Return a copy of the original, on 17.0, that ``ODOO_GIT`` names."""
    folder = shutil.copytree(original, tmp_path / "repository")
    monkeypatch.setenv("ODOO_GIT", str(folder))
    return folder


@pytest.fixture
def slow_git(tmp_path, monkeypatch):
    """Put one on PATH that never ends; return a function that puts the real one back."""
    path = os.environ["PATH"]
    program = tmp_path / "bin" / "git"
    program.parent.mkdir()
    program.write_text(NEVER_ENDS % (shutil.which("git"), shutil.which("git")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(program.parent), path]))
    return lambda: monkeypatch.setenv("PATH", path)


def refusal(series):
    with pytest.raises(clones.Unavailable) as refused:
        clones.find_clone(series)
    assert "\n" not in str(refused.value)
    assert "ODOO_GIT" in str(refused.value)
    return refused.value.why


def test_a_clone_has_the_branch_that_was_asked_for_and_no_history(repository, capsys):
    clone = clones.find_clone("16.0")
    assert "'16.0'" in (clone / "odoo" / "release.py").read_text()
    assert git(clone, "rev-list", "--all", "--count") == "1"
    assert git(clone, "branch", "--all", "--format=%(refname:short)").split() == ["16.0", "origin/16.0"]
    begin, end = capsys.readouterr().err.splitlines()
    assert begin == "getting Odoo 16.0 by git, branch 16.0 of %s ..." % repository
    assert end == "got Odoo 16.0: %s" % clone


def test_the_second_time_nobody_is_asked(repository, monkeypatch):
    clone = clones.find_clone("17.0")
    shutil.rmtree(repository)
    clones._branches.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert clones.find_clone("17.0") == clone
    monkeypatch.delenv("ODOO_GIT")
    assert clones.find_clone("17.0") == clone


def test_a_clone_of_another_repository_is_replaced(repository, monkeypatch):
    clone = clones.find_clone("17.0")
    other = repository.with_name("other")
    repository.rename(other)
    monkeypatch.setenv("ODOO_GIT", str(other))
    (other / "odoo" / "new.py").touch()
    commit(other)
    assert clones.find_clone("17.0") == clone
    assert (clone / "odoo" / "new.py").exists()


def test_a_series_between_two_releases_has_a_branch_of_its_own_name(repository):
    git(repository, "checkout", "--quiet", "-b", "saas-17.4")
    commit(make_tree(repository, "saas~17.4"))
    assert "saas~17.4" in (clones.find_clone("17.4") / "odoo" / "release.py").read_text()


def test_a_branch_that_there_is_not_is_said(repository, cache):
    assert refusal("18.0") == "%s has no branch of it" % repository
    assert [path.name for path in cache.iterdir()] == ["odoo-18.0-git.lock"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: make_tree(tree, "16.0"), ": it has Odoo 16.0"),
        (lambda tree: shutil.rmtree(tree / "addons"), " in its addons, nor in its odoo/addons"),
        (lambda tree: (tree / "odoo-bin").unlink(), ": it has no odoo-bin or no odoo/release.py"),
    ],
)
def test_a_branch_that_has_something_else_is_no_clone(repository, cache, change, said):
    change(repository)
    commit(repository)
    why = refusal("17.0")
    assert why.startswith("branch 17.0 of %s: " % repository)
    assert why.endswith(said)
    assert [path.name for path in cache.iterdir()] == ["odoo-17.0-git.lock"]


def find_elsewhere(cache, stderr):
    """Start a process that looks for a clone of 17.0; return it."""
    script = "import signal, sys; from pathlib import Path; from stack import archive, clones; "
    # Whoever is run in the background is deaf to it, and so are its children.
    script += "signal.signal(signal.SIGINT, signal.default_int_handler); "
    script += "archive.CACHE = clones.CACHE = Path(sys.argv[1]); clones.find_clone('17.0')"
    return subprocess.Popen([sys.executable, "-c", script, cache], cwd=PROJECT, stderr=stderr, start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_clone_is_not_taken_for_a_whole_one(repository, cache, slow_git, number):
    def family():
        found = psutil.Process(interrupted.pid).children(recursive=True)
        with contextlib.suppress(psutil.NoSuchProcess):  # the real git's are ending
            return found if "sleep" in [process.name() for process in found] else None

    interrupted = find_elsewhere(cache, subprocess.DEVNULL)
    children = []
    try:
        children = wait_until(family, 20)
        interrupted.send_signal(number)
        interrupted.wait(10)
        wait_until(lambda: not any(map(is_alive, children)), 10, "git to end")
    finally:
        for process in [interrupted, *filter(is_alive, children)]:
            process.kill()
        interrupted.wait()
    assert not clones.is_cloned("17.0")
    slow_git()
    # What kill -9 leaves may be anything.
    unfinished = cache / "odoo-17.0-git.unfinished"
    (unfinished / "rubbish").mkdir(parents=True, exist_ok=True)
    clone = clones.find_clone("17.0")
    assert git(clone, "status", "--porcelain") == ""
    assert not unfinished.exists()


def test_progress_is_shown_on_a_terminal(repository, cache):
    ours, theirs = os.openpty()
    process = find_elsewhere(cache, theirs)
    os.close(theirs)
    shown = b""
    with open(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # as it ends
        for some in iter(lambda: terminal.read(4096), b""):
            shown += some
    assert process.wait(10) == 0
    assert b"Receiving objects: 100%" in shown


def test_a_clone_that_makes_no_progress_is_given_up(repository, slow_git, monkeypatch):
    monkeypatch.setattr(clones, "_PATIENCE_CLONE", 0.5)
    assert refusal("17.0") == "branch 17.0 of %s: nothing has come for 0.5 s" % repository


@pytest.fixture
def listening():
    """Return a socket that listens on a free port, and accepts nobody."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def test_an_address_that_can_not_be_reached_is_said_without_its_password(repository, listening, monkeypatch):
    port = listening.getsockname()[1]
    listening.close()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("ODOO_GIT", "http://me:s3cret@127.0.0.1:%d/odoo.git" % port)
    why = refusal("17.0")
    assert why.startswith("http://127.0.0.1:%d/odoo.git can not be reached by git: Failed to connect to " % port)


def test_no_repository_is_said(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("ODOO_GIT", str(tmp_path / "none"))
    why = refusal("17.0")
    assert why.startswith("%s can not be reached by git: '%s' does not appear to be" % ((tmp_path / "none",) * 2))


def test_an_address_that_does_not_answer_is_waited_for_once(repository, listening, monkeypatch):
    monkeypatch.setattr(clones, "_PATIENCE_BRANCHES", 0.5)
    address = "http://127.0.0.1:%d/odoo.git" % listening.getsockname()[1]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("ODOO_GIT", address)
    why = refusal("17.0")
    assert why == address + " can not be reached by git: nothing has come for 0.5 s"
    monkeypatch.setattr(clones, "_PATIENCE_BRANCHES", 1000)
    assert refusal("16.0") == why


def test_without_git_and_without_a_way_to_install_it_that_is_said(repository, monkeypatch):
    def refuse(*names):
        raise RuntimeError("not root, and no sudo without password; run as root: apt-get install git")

    monkeypatch.setattr(clones, "ensure_packages", refuse)
    monkeypatch.setenv("PATH", "")
    assert refusal("17.0").endswith("run as root: apt-get install git")
