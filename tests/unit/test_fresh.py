"""What a fresh system takes over from this machine, and what is told of it."""

import pytest

from tools import fresh
from tools.fresh import Result


def test_apt_downloads_as_this_machine_does():
    dump = [
        'Acquire "";',
        'Acquire::http::Proxy "http://proxy.example:3128";',
        'Acquire::Languages "";',
        'Acquire::Languages:: "none";',
        'Acquire::IndexTargets::deb::Packages::Optional "0";',
        'Acquire::Changelogs::AlwaysOnline "true";',
    ]
    assert fresh.apt_settings("\n".join(dump)).splitlines() == [dump[1], dump[3]]


def test_pip_finds_what_it_finds_on_this_machine_and_nothing_else_is_taken_over(tmp_path):
    for folder in "index/simple", "wheels", "elsewhere":
        (tmp_path / folder).mkdir(parents=True)
    for name in "pip.conf", "ca.crt":
        (tmp_path / name).touch()
    pip = """
        {0}/pip.conf, exists: True
        {0}/none/pip.conf, exists: False
        global.index-url: https://example.com{0}/elsewhere
        global.extra-index-url: file://{0}/index/simple
    """.format(tmp_path)
    variables = {"PIP_FIND_LINKS": "%s/wheels" % tmp_path, "SSL_CERT_FILE": "%s/ca.crt" % tmp_path}
    environment, files, folders = fresh.of_this_machine({**variables, "PYTHONPATH": "%s/elsewhere" % tmp_path}, pip)
    assert {"%s=%s" % item for item in variables.items()} == {
        one for one in environment if not one.startswith(("HOME=", "LANG=", "PATH="))
    }
    assert {path for path in files if tmp_path in path.parents} == {tmp_path / "pip.conf", tmp_path / "ca.crt"}
    assert {path for path in folders if path.startswith(str(tmp_path))} == {
        "%s/%s" % (tmp_path, name) for name in ("wheels", "index")
    }


@pytest.mark.parametrize(
    "printed, code, told",
    [
        ("...\n==== 893 passed in 50.93s ====\n", 0, "893 passed"),
        ("1 failed, 2 passed, 1 skipped in 3s", 1, "1 failed, 2 passed, 1 skipped"),
        ("All of this was measured: OK (54 s)\n", 0, "OK"),
        ("make: *** Error\n", 2, "exit code 2"),
        ("", None, "exit code None"),
    ],
)
def test_what_a_command_came_to(printed, code, told):
    assert fresh.told(printed, code) == told


@pytest.mark.parametrize(
    "printed, code, version",
    [
        ("Debian 13.1\n", 0, "Debian 13.1"),
        ("Debian forky/sid\n", 0, "Debian forky/sid"),
        ("Python 3.14.0\n", 0, "3.14.0"),
        ("postgres (PostgreSQL) 18.1 (Debian 18.1-1)\n", 0, "18.1"),
        ("PgBouncer 1.25.0\nlibevent 2.1.12-stable\n", 0, "1.25.0"),
        ("sh: 1: not found\n", 127, "-"),
    ],
)
def test_a_version_is_read_from_what_a_program_prints(printed, code, version):
    assert fresh.fact(code, printed) == version


def test_the_table_has_a_row_for_each_system():
    facts = dict.fromkeys(fresh._FACTS, "1.0")
    text = fresh.describe([(facts, {"demo": Result("OK", True, 61.4), "unit": Result("2 passed", True, 9.6)})])
    assert "make demo" in text and "OK" in text and "2 passed" in text and "61 + 10" in text
