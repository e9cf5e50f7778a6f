"""The matrix names what it can not run, fails if anything did, or if nothing ran, and makes a table of the rest."""

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stack import servers
from stack.builds import tree_release
from stack.clones import Unavailable
from tests.support.trees import commit, git, make_tree
from tools import matrix


def no_folder(folder):
    return folder / "none"


def no_trees(folder):
    return folder


def a_tree_itself(folder):
    return make_tree(folder)


def no_release(folder):
    (make_tree(folder / "broken") / "odoo" / "release.py").unlink()
    return folder


def a_series_of_the_past(folder):
    make_tree(folder / "old", "11.0")
    return folder


def no_bus(folder):
    shutil.rmtree(make_tree(folder / "half") / "addons" / "bus")
    return folder


def an_addon_of_the_same_name(folder):
    (make_tree(folder / "with_oca") / "addons" / "bus_alt_connection").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (no_folder, "no such folder$"),
        (no_trees, r"no source tree of Odoo in it, that is no .*/\*/odoo-bin$"),
        (a_tree_itself, r"no source tree of Odoo in it, that is no .*/\*/odoo-bin$"),
        (no_release, r"/broken is no source tree of Odoo: it has no odoo-bin or no odoo/release\.py$"),
        (a_series_of_the_past, "/old has Odoo 11.0, which is unknown; known are 12.0, .*, 19.1$"),
        (no_bus, "/half is no whole source tree of Odoo: there is no bus/models/bus.py in [^\n]*$"),
        (an_addon_of_the_same_name, "/with_oca/addons has a bus_alt_connection, .*: take it out$"),
    ],
)
def test_what_is_no_good_is_named_in_one_line(tmp_path, make, why):
    folder = make(tmp_path)
    with pytest.raises(matrix.Refused, match="(?s)^TREES=%s: [^\n]*%s" % (folder, why)):
        matrix.find_rows(folder)


def test_the_build_is_what_the_tree_tells_or_the_name_of_its_folder(tmp_path):
    assert matrix._tree_version(make_tree(tmp_path / "one", "15.0", "15.0-20221019")) == "15.0-20221019"
    two = make_tree(tmp_path / "two")
    assert matrix._tree_version(two) == "two"
    assert matrix._tree_version(make_tree(tmp_path / "alpha", "19.1", "19.1a1")) == "alpha"
    (two / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: odoo\nVersion: 15.0.post20221019\n")
    assert matrix._tree_version(two) == "15.0.post20221019"


@pytest.mark.parametrize(("series", "version"), [("19.1", "19.1a1"), ("saas~19.1", "saas~19.1")])
def test_neither_an_alpha_nor_what_odoos_servers_run_is_a_series_of_its_own(tmp_path, series, version):
    assert tree_release(make_tree(tmp_path, series, version)) == ("19.1", version)


def test_the_build_of_a_clone_has_the_day_of_its_commit(tmp_path):
    tree = make_tree(tmp_path / "odoo")
    git(tree, "init", "--quiet")
    assert matrix._tree_version(tree) == "odoo"
    commit(tree, GIT_COMMITTER_DATE="2022-10-19T12:00:00Z")
    assert matrix._tree_version(tree) == "15.0-20221019"


@pytest.fixture
def had(tmp_path, monkeypatch):
    """Return a dictionary: what is found of a series, "Debian", "git", or why it can't be had."""
    had = dict.fromkeys(matrix.PYTHONS, "git")

    def find_build(series=None, tree=None, python=None):
        found = had[series] if series else "tree"
        if found not in ("Debian", "git", "tree"):
            raise Unavailable(series, found)
        if python == "3.6":
            raise RuntimeError("there is none\nnowhere")
        root = tree or make_tree(tmp_path / "odoo" / series, series)
        if series is None:
            series, _version = matrix.tree_release(tree)
        return SimpleNamespace(series=series, root=root, description="Debian odoo 1.2" if found == "Debian" else "x")

    monkeypatch.setattr(matrix, "find_build", find_build)
    return had


def test_without_trees_it_is_all_series_as_they_can_be_had(had, capsys):
    had["19.0"] = "Debian"
    rows = matrix.find_rows(None)
    assert [row.name for row in rows] == [had[series].lower() + "-" + series for series in had]
    assert [row.version for row in rows if row.name == "debian-19.0"] == ["Debian 1.2"]
    assert [row.options for row in rows] == [["--odoo=" + series] for series in had]
    assert capsys.readouterr().err == "left out git-12.0-python3.6, there is no such Python: there is none\n"


def test_what_can_not_be_had_is_left_out_and_told_in_one_line(had, capsys):
    had.update(dict.fromkeys(["13.0", "15.0"], "no way"), **{"14.0": "none whatever"})
    rows = matrix.find_rows(None)
    assert [row.build.series for row in rows] == [series for series in had if series not in ("13.0", "14.0", "15.0")]
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("left out 13.0, 15.0: no way; 14.0: none whatever; name a folder")


def test_if_none_can_be_had_that_is_said(had, capsys):
    had.update(dict.fromkeys(had, "no way"))
    with pytest.raises(matrix.Refused, match="^no series can be had$"):
        matrix.find_rows(None)
    assert capsys.readouterr().err.count("\n") == 1


def test_with_trees_it_is_these_and_debians(had, tmp_path):
    had.update(dict.fromkeys(matrix.DEBIAN, "Debian"))
    tree = make_tree(tmp_path / "trees" / "one", "15.0")
    rows = matrix.find_rows(tree.parent)
    assert [row.name for row in rows] == ["debian-14.0", "one", "debian-19.0"]
    assert [row.options for row in rows] == [["--odoo=14.0"], ["--odoo=%s" % tree], ["--odoo=19.0"]]


@pytest.mark.parametrize(
    ("report", "code", "passed", "failed"),
    [
        ('<testcase classname="a" name="b"/><testcase classname="a" name="c"><skipped/></testcase>', 0, 1, []),
        ('<testcase classname="a" name="b"/><testcase classname="a" name="c"><failure/></testcase>', 1, 1, ["a::c"]),
        ('<testcase classname="a" name="b"/><testcase classname="a" name="b"><error/></testcase>', 1, 0, ["a::b"]),
        ('<testcase classname="a" name="b"/>', 3, 1, ["1 passed, exit code of pytest: 3"]),
        ('<testcase classname="a" name="b"><skipped/></testcase>', 0, 0, ["0 passed, exit code of pytest: 0"]),
        ("", 5, 0, ["0 passed, exit code of pytest: 5"]),
        (None, 4, 0, ["no result of pytest, exit code: 4"]),
    ],
)
def test_only_what_ran_and_did_not_fail_counts(tmp_path, report, code, passed, failed):
    path = tmp_path / "report.xml"
    if report is not None:
        path.write_text("<testsuites><testsuite>%s</testsuite></testsuites>" % report)
    assert matrix._read_result(path, code) == matrix.Result(passed, failed)


@pytest.mark.parametrize(("second", "said"), [("", "2 passed, 1 on retry"), ("<failure/>", "1 failed, 1 passed")])
def test_what_failed_is_tried_again_and_the_table_says_so(tmp_path, monkeypatch, second, said):
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    runner = matrix.Runner([])
    commands = []

    def call(command, log, variables):
        commands.append(command)
        outcome = second if len(commands) > 1 else "<failure/>"
        cases = '<testcase classname="tests.odoo.test_stop" name="test_a[13.0-prefork]">%s</testcase>' % outcome
        if len(commands) == 1:
            cases += '<testcase classname="tests.odoo.test_stop" name="test_b"/>'
        (tmp_path / "13.0-prefork.xml").write_text("<testsuite>%s</testsuite>" % cases)
        return int(bool(outcome))

    monkeypatch.setattr(runner, "_call", call)
    row = matrix.Row("13.0", None, "13.0", ["--odoo=13.0"])
    assert str(runner.run(row, "prefork")) == said
    assert "tests/odoo/test_stop.py::test_a[13.0-prefork]" in commands[1]
    assert "tests" not in commands[1]


def row(series, name):
    return matrix.Row(name, SimpleNamespace(series=series), series, ["--odoo=" + series])


def test_the_last_of_some_series_is_run_on_the_newest_servers_too():
    rows = [row("14.0", "a"), row("14.0", "b"), row("18.0", "c"), row("19.0", "d")]
    newest = {"POSTGRESQL": "18", "PGBOUNCER": "sid"}
    found = [(one.name, one.options[0], one.servers) for one in matrix.on_newest_too(rows, newest)]
    assert found == [
        ("a", "--odoo=14.0", {}),
        ("b", "--odoo=14.0", {}),
        ("b-newest-servers", "--odoo=14.0", newest),
        ("c", "--odoo=18.0", {}),
        ("d", "--odoo=19.0", {}),
        ("d-newest-servers", "--odoo=19.0", newest),
    ]
    assert matrix.on_newest_too(rows, {}) == rows


@pytest.fixture
def got(monkeypatch):
    """The servers that were got, as a list that fills; there are none in the environment."""
    got = []
    for name in servers.NEWEST:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(servers, "postgres_programs", got.append)
    monkeypatch.setattr(servers, "pgbouncer_program", got.append)
    return got


def test_the_newest_servers_are_got_before_anything_is_run(got):
    assert matrix.newest_servers() == servers.NEWEST
    assert got == list(servers.NEWEST.values())


def test_servers_that_are_chosen_are_the_only_ones(got, monkeypatch):
    monkeypatch.setenv("PGBOUNCER", "trixie")
    assert matrix.newest_servers() == {}
    assert got == []


def test_servers_that_there_are_not_are_refused(got, monkeypatch):
    monkeypatch.setenv("PGBOUNCER", "1.24")
    with pytest.raises(matrix.Refused, match="^PGBOUNCER=1.24: [^\n]*$"):
        matrix.newest_servers()


def test_who_runs_pytest_passes_on_the_choice_of_servers(tmp_path):
    log = tmp_path / "log"
    show = "import os; print(os.environ['PGBOUNCER'], 'HOME' in os.environ)"
    assert matrix.Runner([])._call([sys.executable, "-c", show], log, {"PGBOUNCER": "sid"}) == 0
    assert log.read_text() == "sid True\n"


def test_the_table_has_a_row_for_each_odoo_and_a_result_for_each_mode(monkeypatch):
    monkeypatch.setattr(servers, "postgres_programs", lambda version: Path(version or "15"))
    monkeypatch.setattr(servers, "pgbouncer_program", lambda suite: suite or "bookworm")
    monkeypatch.setattr(matrix, "_version", str)
    monkeypatch.setattr(matrix, "_libpq", lambda build: "15.3")
    build = SimpleNamespace(series="13.0", python="3.7.9", psycopg2="2.8.6")
    rows = [
        matrix.Row("odoo-13", build, "13.0-20221019", []),
        matrix.Row("again", build, "Debian 13.0", [], servers.NEWEST),
    ]
    results = {
        ("odoo-13", "threaded"): matrix.Result(20, [], 60.2),
        ("odoo-13", "prefork"): matrix.Result(18, ["a::b", "a::c"], 61),
        ("again", "threaded"): matrix.Result(20, [], 1, 1),
        ("again", "prefork"): matrix.Result(20, [], 2),
    }
    table = [re.split("  +", line) for line in matrix.describe(rows, results).splitlines() if "2.8.6" in line]
    assert table == [
        [
            "13.0",
            "13.0-20221019",
            "3.7.9",
            "2.8.6 (15.3)",
            "15/postgres",
            "bookworm",
            "20 passed",
            "2 failed, 18 passed",
            "121",
        ],
        [
            "13.0",
            "Debian 13.0",
            "3.7.9",
            "2.8.6 (15.3)",
            "18/postgres",
            "sid",
            "20 passed, 1 on retry",
            "20 passed",
            "3",
        ],
    ]
