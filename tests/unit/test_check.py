"""The check before going live, where what is there answers nonsense. All else needs real servers."""

import pytest

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

        def execute(self, query, values=None, timeout=None):
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


@pytest.mark.parametrize("rows", [None, [], [()], [(1,)], [(1, 2, 3, 4, 5, 6, 7, 8, 9)]])
def test_an_answer_with_other_columns_is_an_error_of_what_is_there(run, rows):
    code, output = run(rows)
    assert code == 1
    assert "ERROR: ordinary: 127.0.0.1:6432: not the answer" in output
    assert output.splitlines()[-1].startswith("NOT OK")
