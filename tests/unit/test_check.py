"""The check before going live, where what is there answers nonsense. All else needs real servers."""

import types

import pytest
from psycopg2.extensions import Notify

from bus_alt_connection import check, connection


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Return a function that runs the check against what gives these rows to all statements."""
    conf = tmp_path / "odoo.conf"
    conf.write_text("[options]\ndb_host = 127.0.0.1\ndb_port = 6432\ndb_user = odoo\ndb_password = s3cret\n")
    monkeypatch.setenv("IMDISPATCHER_DB_PORT", "5432")
    for name in ("PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGSSLMODE"):
        monkeypatch.delenv(name, raising=False)

    class Nonsense(connection.Connection):
        def __init__(self, parameters):
            self.parameters, self.server_version = parameters, 150000

        def asking(self, query, values=None, timeout=None):
            yield from ()
            return rows

        def close(self):
            pass

    rows = None
    monkeypatch.setattr(connection, "connect", lambda parameters, kind=None: Nonsense(parameters))

    def run(answer):
        nonlocal rows
        rows = answer
        return check.main(["-c", str(conf)]), capsys.readouterr().out

    return run


@pytest.mark.parametrize("rows", [None, [()], [(1, 2, 3, 4, 5, 6, 7, 8, 9)]])
def test_an_answer_with_other_columns_is_an_error_of_what_is_there(run, rows):
    code, output = run(rows)
    assert code == 1
    assert "ERROR: ordinary: 127.0.0.1:6432: not the answer" in output
    assert output.splitlines()[-1].startswith("NOT OK")


@pytest.mark.parametrize(
    "conf, variables, database, warned",
    [
        ("", {}, "postgres", 0),
        ("", {"IMDISPATCHER_DB_DBNAME": "customer"}, "customer", 0),
        ("imdispatcher_db_dbname = customer", {}, "customer", 0),
        ("db_system = system", {"IMDISPATCHER_DB_DBNAME": "customer"}, "system", 1),
        ("db_system = False", {"IMDISPATCHER_DB_DBNAME": "customer"}, "customer", 0),
    ],
)
def test_both_ways_are_those_to_the_system_database(tmp_path, conf, variables, database, warned):
    path = tmp_path / "odoo.conf"
    path.write_text("[options]\n%s\n" % conf)
    _path, own, configured = check.read(["-c", str(path)], variables)
    assert own["dbname"] == database
    assert configured.parameters(own)["dbname"] == database
    assert len(configured.warnings) == warned


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
