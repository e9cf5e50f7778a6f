"""Which Python is taken, and where one comes from that the machine does not have."""

import pytest

from stack import pythons
from stack.commands import CommandError
from stack.pythons import Interpreter


@pytest.fixture
def machine(monkeypatch):
    """A machine with no Python of the wanted versions; ``fetched`` is what was asked for."""
    for places in "_on_path", "_of_pyenv", "_of_uv":
        monkeypatch.setattr(pythons, places, lambda version: [])

    class Machine:
        fetched = []
        debian, uv = None, None

        def unpack(self, version):
            self.fetched.append("debian " + version)
            if version != self.debian:
                raise RuntimeError("no mirror of Debian")
            return "/debian/python" + version

        def run_uv(self, uv, command, *arguments, **variables):
            version = arguments[-1]
            self.fetched.append("uv %s %s" % (command, version))
            if version != self.uv:
                raise CommandError("no network")
            return "/uv/python%s\n" % version

    machine = Machine()
    machine.fetched = []
    monkeypatch.setattr(pythons, "unpacked_python", machine.unpack)
    monkeypatch.setattr(pythons, "_uv", lambda: "uv")
    monkeypatch.setattr(pythons, "_run_uv", machine.run_uv)
    monkeypatch.setattr(pythons, "_probe", lambda path: Interpreter(path, path.rpartition("python")[2]))
    return machine


def test_debian_is_asked_first_as_it_needs_nothing_but_the_mirror_of_the_machine(machine):
    machine.debian = machine.uv = "3.9"
    assert pythons.find_python(("3.9", "3.8")).path == "/debian/python3.9"
    assert machine.fetched == ["debian 3.9"]


def test_uv_is_asked_for_what_debian_does_not_have(machine):
    machine.uv = "3.7"
    assert pythons.find_python(("3.9", "3.7")).path == "/uv/python3.7"
    assert machine.fetched == ["debian 3.9", "uv install 3.9", "uv install 3.7", "uv find 3.7"]


def test_the_error_says_in_one_line_what_is_missing_and_why(machine):
    with pytest.raises(RuntimeError) as caught:
        pythons.find_python(("3.9",))
    assert str(caught.value) == (
        "Python 3.9 is needed, with its venv module; it is neither on PATH nor among the versions of pyenv and uv, "
        "and can not be fetched: Debian's 3.9: no mirror of Debian; uv's 3.9: no network"
    )


def test_all_that_uv_writes_is_in_the_folder_that_make_clean_removes(monkeypatch):
    ran = []
    monkeypatch.setattr(pythons, "run", lambda command, env: ran.append(env) or "")
    monkeypatch.setattr(pythons, "_uv", lambda: "uv")
    monkeypatch.setattr(pythons, "unpacked_python", lambda version: "/nowhere")
    pythons._from_uv(("3.9",), [])
    install = ran[0]
    for name in "UV_CACHE_DIR", "UV_PYTHON_BIN_DIR", "UV_PYTHON_INSTALL_DIR":
        assert install[name].startswith(str(pythons.CACHE))
