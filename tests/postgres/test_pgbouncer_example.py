"""docs/pgbouncer.ini is what all tests run on; and PgBouncer takes from it what it says."""

import configparser
import contextlib
import re

from stack.pgbouncer import EXAMPLE, EXAMPLE_SERVER, PgBouncer

#: what a test's pooler must have otherwise
OURS = {"listen_port", "auth_file", "server_login_retry"}


def in_force(pooler):
    return {row["key"]: row["value"] for row in pooler.show("config")}


def test_every_setting_is_in_force_and_postgres_has_a_small_pool(server, pooler):
    example = configparser.RawConfigParser(comment_prefixes=";", strict=True)
    example.read_string(EXAMPLE.read_text())
    told, found = dict(example["pgbouncer"]), in_force(pooler)
    assert len(told) > 10 and told["pool_mode"] == "transaction"
    assert {name for name in told if told[name] != found[name]} == OURS
    assert not re.search("WARNING|ERROR|FATAL", pooler.log())

    assert dict(example["databases"]) == {"postgres": EXAMPLE_SERVER + " pool_size=5", "*": EXAMPLE_SERVER}
    server.execute("CREATE DATABASE another")
    for name in ("postgres", "another"):
        with contextlib.closing(pooler.connect(name)) as connection, connection.cursor() as cr:
            cr.execute("SELECT current_database()")
            assert cr.fetchall() == [(name,)]
    assert [row["pool_size"] for row in pooler.show("databases") if row["name"] == "postgres"] == [5]


class Including(PgBouncer):
    """A pooler with a file of its own, which includes the example."""

    own = ("default_pool_size = 4", "[databases]", "nowhere = host=db-02")

    def prepare(self):
        super().prepare()
        example = (self.folder / "pgbouncer.ini").rename(self.folder / "example.ini")
        self._write("pgbouncer.ini", ["%%include %s" % example, *self.own])


def test_it_can_be_included_as_it_says(server):
    with Including(server) as pooler:
        found = in_force(pooler)
        assert (found["default_pool_size"], found["max_client_conn"]) == ("4", "1000")
        assert {"postgres", "nowhere"} <= {row["name"] for row in pooler.show("databases")}
        assert not re.search("WARNING|ERROR|FATAL", pooler.log())
