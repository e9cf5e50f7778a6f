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
    assert "ERROR: ordinary: 127.0.0.1:6432: not the answer" in output
    assert output.splitlines()[-1].startswith("NOT OK")


def test_odoos_own_system_database_comes_first(tmp_path):
    path = tmp_path / "odoo.conf"
    for conf, database in (("db_system = system", "system"), ("db_system = False", "customer")):
        path.write_text("[options]\n%s\n" % conf)
        _path, own, configured = check.read(["-c", str(path)], {"IMDISPATCHER_DB_DBNAME": "customer"})
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

        def execute(self, statement, values=None):
            pass

        def close(self):
            pass

    ways = iter(["receiver", "other", "sender"])
    monkeypatch.setattr(connection, "connect", lambda _parameters: Way(next(ways)))
    monkeypatch.setattr(check, "time", types.SimpleNamespace(sleep=lambda _seconds: None))
    facts = connection.Facts("db-01:5432", 1, False, False, "postgres", "15.3", 1000)
    place = check.Place({}, facts, True, "server")
    assert (check._why_deaf(place, place) == []) is is_right
