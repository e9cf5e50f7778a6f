"""The check before going live, where what is there answers nonsense. All else needs real servers."""

import types

import pytest
from psycopg2.extensions import Notify

from bus_alt_connection import check, connection


@pytest.mark.parametrize("rows", [None, [()], [(1, 2, 3, 4, 5, 6, 7, 8, 9)]])
def test_an_answer_with_other_columns_is_an_error_of_what_is_there(monkeypatch, capsys, rows):
    class Nonsense(connection.Connection):
        server_version = 150000

        def __init__(self, parameters, kind=None):
            self.parameters = parameters

        def asking(self, query, values=None, timeout=None):
            yield from ()
            return rows

        def close(self):
            pass

    monkeypatch.setattr(connection, "connect", Nonsense)
    monkeypatch.setattr(check.os, "environ", {"IMDISPATCHER_DB_PORT": "5432"})
    assert check.main(["--db_host", "127.0.0.1", "--db_port", "6432"]) == 1
    output = capsys.readouterr().out
    assert "ERROR: ordinary: 127.0.0.1:6432 returned the result of another query" in output
    assert output.splitlines()[-1].startswith("NOT OK")


def test_odoos_own_system_database_comes_first(tmp_path):
    path = tmp_path / "odoo.conf"
    for conf, database in (("db_system = system", "system"), ("db_system = False", "customer")):
        path.write_text("[options]\n%s\n" % conf)
        _path, _options, own, configured = check.read(["-c", str(path)], {"IMDISPATCHER_DB_DBNAME": "customer"})
        assert configured.parameters(own)["dbname"] == database


def test_what_is_no_option_is_not_shown(capsys):
    with pytest.raises(SystemExit) as ended:
        check.read(["--db_password=s3cret", "s3cret"], {})
    assert ended.value.code == 2
    assert "s3cret" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(("hears", "is_right"), [("receiver", True), ("sender", False), (None, False)])
def test_a_listener_has_to_hear_by_itself_what_is_sent(monkeypatch, hears, is_right):
    class Way:
        def __init__(self, name):
            self.receive = lambda: [Notify(1, check.CHANNEL, "check")] if name == hears else []
            self.name, self.examining = name, None

        def listen(self, channels, warn):
            assert channels == {check.CHANNEL}

        def execute(self, statement, values=None):
            executed.append((self.name, statement.split()[0]))

        def explaining(self, examining_sender, sent_at, leaked):
            yield from ()
            return None, "leaked" if leaked else "silent"

        def close(self):
            pass

    executed = []
    ways = iter(["receiver", "other", "sender"])
    monkeypatch.setattr(connection, "connect", lambda _parameters, _kind=None: Way(next(ways)))
    monkeypatch.setattr(check, "TIMEOUT", 0.1)
    place = check.Place({}, None)
    expected = None if is_right else "leaked" if hears else "silent"
    assert check.why_deaf(place, place) == expected
    # A pooler may leave a server connection with its last client as long as no other client wants it.
    assert executed[:3] == [("other", "BEGIN;"), ("sender", "SELECT"), ("receiver", "UNLISTEN")]


@pytest.mark.parametrize(
    "options, share, direct, pooled",
    [
        ({}, True, "plan for 1 direct connection(s)", "at most 71 connections to the pooler: 64 for"),
        (
            {"workers": "4", "db_maxconn": "16"},
            True,
            "plan for 1 direct connection(s), 3 for a moment when the process that shares its connection ends",
            "at most 133 connections to the pooler: 16 for each of 7 process(es) and 21",
        ),
        ({"workers": "4", "max_cron_threads": "1"}, False, "plan for 2 direct connection(s)", "at most 398 "),
        ({"workers": "many"}, False, "plan for 1 direct connection(s)", "at most 71 "),
    ],
)
def test_it_says_how_many_connections_to_plan_for(monkeypatch, capsys, options, share, direct, pooled):
    opened = types.SimpleNamespace(row=lambda *_query: (100, 3, 96), close=lambda: None)
    monkeypatch.setattr(connection, "connect", lambda parameters: opened)
    warnings = check.plan(check.Place({}, None), options, share)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == direct and pooled in second
    assert third.endswith("max_connections is 100, 3 of them are for superusers only, 96 are in use")
    needed = 3 if "max_cron_threads" not in options and options.get("workers") == "4" else 1
    assert bool(warnings) == (needed > 1 or "max_cron_threads" in options)
